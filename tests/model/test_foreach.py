"""One launch for many tensors does what one operation each would do."""

from __future__ import annotations

import torch

from minipersona.model.acceleration.foreach import copy_each, multiply_each


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.linspace(-1, 1, n, dtype=dtype) for n in (3, 1, 8)]


def test_each_source_is_copied_into_its_target_and_cast() -> None:
    sources, wide = tensors(torch.float32), torch.zeros(12, dtype=torch.bfloat16)
    targets = list(wide.split([3, 1, 8]))
    copy_each(targets, sources)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(targets, sources, strict=True))
    assert torch.equal(wide, torch.cat(sources).bfloat16())  # in place


def test_every_tensor_is_multiplied_in_place() -> None:
    found, expected = tensors(torch.float64), [x * 0.3 for x in tensors(torch.float64)]
    before = [x.data_ptr() for x in found]
    multiply_each(found, torch.tensor(0.3, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [x.data_ptr() for x in found] == before
