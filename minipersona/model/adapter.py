"""What LoRA adds to one linear layer (Hu et al. 2021): y = W x + (alpha / r) B A dropout(x).

r = rank, I/O = the layer's inputs/outputs, T = tokens, n = layers that read the same input

Adapters are fp32 masters, cast to the stream's precision at use: in bf16 a late update of relative size 1e-4 would
round away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipersona.config import LoraConfig
from minipersona.model.dropout import channel_keys, hashed_dropout


class Adapter(nn.Module):
    """The low-rank product that is added to one linear layer's output."""

    channel_keys: Tensor  # (I,) int32

    def __init__(self, inputs: int, outputs: int, config: LoraConfig, name: str, device: torch.device) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(config.rank, inputs, device=device))  # (r, I)
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank, device=device))  # (O, r)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.enabled = True
        # Derived from the name, so not part of a checkpoint.
        self.register_buffer("channel_keys", channel_keys(name, inputs).to(device), persistent=False)

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x (T, I) -> (alpha/r) B A dropout(x), (T, O). `dropout_keys` (T,) of `token_keys`, None for no dropout."""
        return F.linear(self.low(x, dropout_keys), self.lora_B.to(x.dtype))

    def low(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x (T, I) -> (alpha/r) A dropout(x), (T, r)."""
        if dropout_keys is not None and self.dropout > 0:
            x = hashed_dropout(x, dropout_keys, self.channel_keys, self.dropout)
        return F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # scaled where it is smallest

    def delta(self) -> Tensor:
        """The merged update (alpha/r) B A, (O, I) in the masters' precision."""
        return self.scale * (self.lora_B @ self.lora_A)

    def squared_norm(self) -> Tensor:
        """||(alpha/r) B A||_F^2 = (alpha/r)^2 trace((B^T B)(A A^T)), fp64, without forming the product."""
        a, b = self.lora_A.double(), self.lora_B.double()
        return self.scale**2 * ((b.T @ b) * (a @ a.T)).sum()


def low_one_by_one(adapters: Sequence[Adapter], x: Tensor, dropout_keys: Tensor | None) -> Tensor:
    """x (T, I) -> what every adapter's `low` gives, side by side, (T, n r)."""
    return torch.cat([adapter.low(x, dropout_keys) for adapter in adapters], dim=-1)


def low_together(adapters: Sequence[Adapter], x: Tensor, dropout_keys: Tensor | None) -> Tensor:
    """The same as one product: the dropped-out copies of x, side by side, with the A of all on a block diagonal.

    A GPU takes a fixed time for a product of rank 32, more than its bytes would, forward and twice backward. So one
    product is faster than three, though two thirds of the block diagonal are zeros (docs/log.md).
    """
    first = adapters[0]
    assert all((a.scale, a.dropout) == (first.scale, first.dropout) for a in adapters), "one LoraConfig a model"
    if dropout_keys is not None and first.dropout > 0:
        channels = torch.stack([adapter.channel_keys for adapter in adapters])  # (n, I)
        x = hashed_dropout(x[:, None], dropout_keys, channels, first.dropout).flatten(1)  # (T, n I)
        lora_A = torch.block_diag(*(adapter.lora_A.to(x.dtype) for adapter in adapters))  # (n r, n I)
    else:
        lora_A = torch.cat([adapter.lora_A.to(x.dtype) for adapter in adapters])  # (n r, I)
    return F.linear(x, lora_A) * first.scale
