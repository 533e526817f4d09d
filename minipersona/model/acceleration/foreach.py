"""Operations on many tensors as one kernel launch: a launch for each would take longer than the work itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in place, cast to the target's precision."""
    torch._foreach_copy_(list(targets), list(sources))
