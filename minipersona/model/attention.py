"""Causal attention within documents: one function, two back ends.

T = tokens, S = documents, H/K = query/key heads (H a multiple of K: grouped queries), d = channels of a head
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes fewer key heads than query heads silently; later versions want to be told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attention(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, where a token sees itself and what precedes it in its own document.

    q (T, H, d); k, v (T, K, d); boundaries (S+1,) int32; longest: tokens of the longest document.
    Returns (T, H, d). Flash kernels want CUDA and half precision; everything else goes through `scaled_dot_product`.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # The default window is not causal: (-1, 0) is "everything before, nothing after".
        out = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, window_size=(-1, 0), **_GROUPED)
        assert isinstance(out, Tensor)
        return out
    return scaled_dot_product(q, k, v, boundaries, longest)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    """The portable back end. Documents are laid out as rows (S, longest) for the duration of this function.

    The rows' tails hold copies of a token; causality alone keeps every real token from seeing them.
    """
    lengths = boundaries.diff()  # (S,)
    offsets = torch.arange(longest, device=q.device)
    rows = boundaries[:-1, None] + torch.minimum(offsets, lengths[:, None] - 1)  # (S, longest) stream indices

    def by_document(x: Tensor) -> Tensor:
        return x[rows].transpose(1, 2)  # (S, heads, longest, d)

    out = F.scaled_dot_product_attention(
        by_document(q), by_document(k), by_document(v), is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    real = (offsets < lengths[:, None]).nonzero()  # (T, 2) of (document, position), in stream order
    return out[real[:, 0], :, real[:, 1]]  # (T, H, d)
