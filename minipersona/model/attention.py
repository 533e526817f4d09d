"""Causal attention within documents: rotary positions, what a token sees, and two back ends that compute it.

T = tokens, S = documents, H/K = query/key heads (H a multiple of K: grouped queries), d = channels of a head
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.model.config import ModelConfig, RotaryScaling

if torch.cuda.is_available():  # it imports torch's compiler, which takes more than a second and is not needed on a CPU
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts fewer key heads than query heads as it is; later versions need this argument.
    _GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# ---------------------------------------------------------------- rotary positions (Su et al. 2021)


def frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """(d/2,) radians by which each position turns a pair of channels: theta^(-2i/d), scaled if the config says so."""
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


# ---------------------------------------------------------------- attention


class Scope(Protocol):
    """What the tokens of a pass see. A block gives it the pass's queries, keys and values, already rotated."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d); k, v (T, K, d) -> (T, H, d)."""
        ...


@dataclass(frozen=True)
class Spans:
    """Documents end to end: document s is the rows from boundaries[s] to boundaries[s + 1]; (S+1,) int32."""

    boundaries: Tensor
    longest: int


@dataclass(frozen=True)
class WithinDocuments:
    """A token sees itself and what precedes it in its own document: training, and prompts from their beginning."""

    documents: Spans

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d); k, v (T, K, d) -> (T, H, d)."""
        return attention(q, k, v, self.documents, self.documents)


def attention(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, where a document's queries are its last tokens and see what precedes them.

    q (T, H, d) in spans `queries`; k, v (T', K, d) in spans `keys`, of which each document has at least as many.
    Returns (T, H, d). Flash kernels need CUDA and half precision; everything else goes through `scaled_dot_product`.
    """
    if has_flash(q):
        # The default window is not causal: (-1, 0) is "everything before, nothing after", aligned at the last token.
        out = varlen_attn(
            q, k, v, queries.boundaries, keys.boundaries, queries.longest, keys.longest, window_size=(-1, 0), **_GROUPED
        )
        assert isinstance(out, Tensor)
        return out
    return scaled_dot_product(q, k, v, queries, keys)


def has_flash(x: Tensor) -> bool:
    """Whether the flash kernels can compute with this tensor."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans) -> Tensor:
    """The portable back end. Documents are laid out as rows (S, longest) for the duration of this function.

    The rows' tails hold copies of a token. Where a document's queries are all of its tokens, causality alone keeps
    every real token from seeing them; elsewhere a mask says what is seen.
    """
    offsets, lengths = _rows(queries)
    laid_out = _laid_out(q, queries), _laid_out(k, keys), _laid_out(v, keys)
    grouped = q.shape[1] != k.shape[1]
    if queries is keys:
        out = F.scaled_dot_product_attention(*laid_out, is_causal=True, enable_gqa=grouped)
    else:
        before = keys.boundaries.diff() - lengths  # (S,) keys that precede a document's first query
        positions = before[:, None] + offsets  # (S, longest) of the queries among the keys
        key_offsets, _ = _rows(keys)
        seen = key_offsets <= positions[:, :, None]  # (S, longest, longest key)
        out = F.scaled_dot_product_attention(*laid_out, attn_mask=seen[:, None], enable_gqa=grouped)
    real = (offsets < lengths[:, None]).nonzero()  # (T, 2) of (document, position), in stream order
    return out[real[:, 0], :, real[:, 1]]  # (T, H, d)


def _rows(spans: Spans) -> tuple[Tensor, Tensor]:
    return torch.arange(spans.longest, device=spans.boundaries.device), spans.boundaries.diff()  # (longest,), (S,)


def _laid_out(x: Tensor, spans: Spans) -> Tensor:
    """(T, heads, d) -> (S, heads, longest, d)."""
    offsets, lengths = _rows(spans)
    rows = spans.boundaries[:-1, None] + torch.minimum(offsets, lengths[:, None] - 1)  # (S, longest) stream indices
    return x[rows].transpose(1, 2)
