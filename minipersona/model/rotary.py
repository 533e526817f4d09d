"""Rotary position embeddings (Su et al. 2021): pairs of channels are turned by position times a frequency.

T = tokens, d = channels of a head
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minipersona.model.config import ModelConfig, RotaryScaling


def frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """(d/2,) radians a position: theta^(-2i/d), scaled where the config says so."""
    channel = torch.arange(0, config.head_dim, 2, device=device, dtype=dtype)
    plain = 1.0 / config.rope_theta ** (channel / config.head_dim)
    return plain if config.rope_scaling is None else scaled(plain, config.rope_scaling)


def scaled(plain: Tensor, scaling: RotaryScaling) -> Tensor:
    """Llama 3.1's frequencies, for texts `factor` times as long as the original ones.

    A wave that turns more than `high_freq_factor` times within the original length keeps its frequency; one that turns
    less than `low_freq_factor` times becomes `factor` times as long; between the two, the frequency is interpolated.
    Source: `apply_scaling` in meta-llama/llama-models, models/llama3/model.py.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotary_angles(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (T,) -> cos and sin (T, 1, d) of position * frequency, the d/2 frequencies laid out twice."""
    angles = positions.to(dtype)[:, None] * frequencies(config, dtype, positions.device)  # (T, d/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]  # (T, 1, d)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (T, heads, d); channel i is paired with channel i + d/2, as Hugging Face stores them.

    In x's precision, computed in that of cos and sin.
    """
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
