"""The flash kernel for one new token a slot."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from minipersona.model.acceleration.token_attention import newest_token

from .test_attention import HEADS, KV_HEADS, naive


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_newest_token_sees_what_its_slot_holds_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    slots, room, lengths = 3, 24, [5, 24, 1]
    q = torch.randn(slots, HEADS, 64, generator=generator)
    keys, values = (torch.randn(slots, room, KV_HEADS, 64, generator=generator) for _ in range(2))
    each = torch.arange(slots + 1, device="cuda", dtype=torch.int32)
    used = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    half = [x.to("cuda", torch.bfloat16) for x in (q, keys, values)]
    ours = newest_token(*half, used, each * (HEADS // KV_HEADS), each * room)

    def expected(used: list[int]) -> Tensor:
        k, v = (torch.cat([x[s, :n] for s, n in enumerate(used)]).double() for x in half[1:])
        everyone = torch.cat([half[0][s].expand(n, -1, -1) for s, n in enumerate(used)]).double()
        ends = torch.tensor(used).cumsum(0) - 1
        return naive(everyone, k, v, used)[ends.tolist()]

    assert relative_error(ours, expected(lengths)) < 1e-2
    assert relative_error(ours, expected([5, 23, 1])) > 0.05  # the control: a token less is seen


def test_the_kernels_interface_is_the_one_that_is_called() -> None:
    """Also without CUDA: torch's private kernel takes the arguments that `newest_token` gives, in that order."""
    taken = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert taken[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    assert "seqused_k" in taken
