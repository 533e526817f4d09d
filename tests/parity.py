"""transformers' model as the reference of parity tests."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def exact_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def exact_frequencies(config: Any) -> Tensor:
    """As transformers computes them, in fp64: each channel's wave kept, stretched, or in between."""
    width, rope = config.hidden_size // config.num_attention_heads, config.rope_parameters
    width = getattr(config, "head_dim", None) or width
    found = []
    for channel in range(0, width, 2):
        frequency = rope["rope_theta"] ** -(channel / width)
        if rope["rope_type"] == "llama3":
            original, wave = rope["original_max_position_embeddings"], 2 * math.pi / frequency
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wave > original / low:
                frequency /= rope["factor"]
            elif wave >= original / high:
                smooth = (original / wave - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64)


def exact_rotary(frequencies: Tensor, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].double() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model. Its norms, rotations and eager softmax are fp32 whatever the dtype: fp64 gets exact ones."""
    from transformers import AutoModelForCausalLM

    if dtype == torch.float64:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
        frequencies = exact_frequencies(model.config)
        replaced = set()
        for module in model.modules():
            name = type(module).__name__
            if name.endswith("RMSNorm"):
                module.forward = functools.partial(exact_norm, module)
                replaced.add("norm")
            if name.endswith("RotaryEmbedding"):
                module.forward = functools.partial(exact_rotary, frequencies)
                replaced.add("rotary")
        assert replaced == {"norm", "rotary"}
        return model
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
