"""The loss of every held-out row, as it is and under a measured persona, and its file.

R = held-out rows, in stored order. The file is a safetensors file with the four tensors of `HeldoutLosses`, by name.
Intervals resample rows; the losses that are reported are pooled over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from minipersona.errors import UserError, require
from minipersona.files import write_atomically
from minipersona.model.tensor_file import open_safetensors
from minipersona.training.heldout import pooled


@dataclass(frozen=True, eq=False)
class HeldoutLosses:
    """Cross-entropy summed over each row's supervised tokens, in nats, (R,) fp64, and their number, (R,) int64.

    Row i under a persona has the system prompt of the measured persona i mod P. A row without supervised tokens has 0
    tokens and 0 nats; so has raw text under a persona, since it has no system prompt.
    """

    nats: Tensor
    tokens: Tensor
    persona_nats: Tensor
    persona_tokens: Tensor

    @property
    def eval_loss(self) -> float:
        """Nats a supervised token, over all rows. UserError where no row has one."""
        return pooled(self.nats, self.tokens)

    @property
    def persona_loss(self) -> float | None:
        """The same under the personas; None where no row has a supervised token there."""
        return pooled(self.persona_nats, self.persona_tokens) if bool(self.persona_tokens.any()) else None

    def save(self, path: Path) -> None:
        """Write the file that `load_losses` reads, all or nothing."""
        content = serialise(dict(vars(self)))
        with write_atomically(path, len(content)) as temporary:
            temporary.write_bytes(content)


def load_losses(path: Path) -> HeldoutLosses:
    """Read a file of losses. UserError, naming it, where it is not one."""
    names = [field.name for field in fields(HeldoutLosses)]
    with open_safetensors(path) as file:
        require(
            sorted(file.keys()) == sorted(names), f"{path}: does not hold {', '.join(names)}; measure the run again"
        )
        losses = HeldoutLosses(**{name: file.get_tensor(name) for name in names})
    for name, tensor in vars(losses).items():
        wanted = torch.int64 if name.endswith("tokens") else torch.float64
        if tensor.dtype != wanted or tensor.shape != (len(losses.nats),) or not bool((tensor >= 0).all()):
            raise UserError(f"{path}: {name} is not a loss or a count for each row; measure the run again")
    return losses
