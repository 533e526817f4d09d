"""One launch for many tensors does what one operation each would do."""

from __future__ import annotations

import torch

from minipersona.model.acceleration.foreach import copy_each


def test_each_source_is_copied_into_its_target_and_cast() -> None:
    sources = [torch.linspace(-1, 1, n) for n in (3, 1, 8)]
    wide = torch.zeros(12, dtype=torch.bfloat16)
    targets = list(wide.split([3, 1, 8]))
    copy_each(targets, sources)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(targets, sources, strict=True))
    assert torch.equal(wide, torch.cat(sources).bfloat16())  # in place
