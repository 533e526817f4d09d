"""Dropout as a function of the token: a counter-based hash decides, not a random stream.

Whether channel c of token t is dropped in module m follows from (seed, step, document, position, channel, module)
alone. So packing, micro-batches, ranks, recomputation and resuming cannot change a mask, and none is ever stored.

T = tokens, C = channels of the module's input
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from minipersona.model.pack import Pack


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 32-bit words in which every input bit reaches every output bit (Wellons' lowbias32)."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def token_keys(seed: int, step: int, pack: Pack) -> Tensor:
    """(T,) int32: one well-mixed word a token, from (seed, step, document, position). The pack lies on the CPU."""
    lengths = pack.boundaries.diff().numpy()
    documents = np.repeat(pack.documents.numpy(), lengths)  # (T,)
    keys = np.zeros(pack.tokens, dtype=np.uint32)
    for word in (np.array([seed]), np.array([step]), documents, pack.positions.numpy()):
        keys = _mix(keys ^ (word & 0xFFFFFFFF).astype(np.uint32))
        keys = _mix(keys + (word >> 32).astype(np.uint32) + np.uint32(0x9E3779B9))
    return torch.from_numpy(keys.view(np.int32))


def channel_keys(module: str, channels: int) -> Tensor:
    """(C,) int32: one word a channel, different for every module name, so that modules' masks are independent."""
    salt = _mix(np.array([zlib.crc32(module.encode())], dtype=np.uint32))
    keys = _mix(_mix(np.arange(1, channels + 1, dtype=np.uint32)) ^ salt)
    return torch.from_numpy(keys.view(np.int32))


def keep_mask(tokens: Tensor, channels: Tensor, probability: float) -> Tensor:
    """channels (C,) -> (T, C) bool, or (n, C) -> (T, n, C); False with `probability`.

    Both keys are mixed already; two multiplications decorrelate their combinations. int32 arithmetic wraps, a
    signed comparison against a shifted threshold stands for the unsigned one, and the mask after the right shift
    makes it a logical one. So little integer work hides behind the memory traffic of the product it precedes.
    """
    x = tokens.view(-1, *[1] * channels.ndim) ^ channels  # (T, C) or (T, n, C)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975  # 0x846CA68B as a signed word
    return x >= int(probability * 2**32) - 2**31


def hashed_dropout(x: Tensor, tokens: Tensor, channels: Tensor, probability: float) -> Tensor:
    """Inverted dropout of x (T, C): dropped entries are 0, kept ones x / (1 - probability).

    With the channels of several modules, (n, C), and x (T, 1, C): the dropped-out copy of each, (T, n, C).
    """
    keep = keep_mask(tokens, channels, probability)
    return torch.where(keep, x * (1.0 / (1.0 - probability)), 0.0)
