"""Attention: both back ends against an explicit loop, causal, grouped, and blind across documents."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from minipersona.model import attention as module
from minipersona.model.attention import Spans, attention, scaled_dot_product

LENGTHS = [5, 1, 17, 9]
HEADS, KV_HEADS, CHANNELS = 6, 2, 8


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool = True) -> Tensor:
    """One document, one head at a time."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // group].T / math.sqrt(q.shape[-1])
            if causal:
                scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -math.inf)
            out[rows, head] = scores.softmax(-1) @ v[rows, head // group]
        start += n
    return out


def stream(dtype: torch.dtype, device: str = "cpu", channels: int = CHANNELS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    q = torch.randn(tokens, HEADS, channels, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(tokens, KV_HEADS, channels, generator=generator, dtype=torch.float64) for _ in range(2))
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype), boundaries.to(device)


def within(
    back_end: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int
) -> Tensor:
    spans = Spans(boundaries, longest)
    return back_end(q, k, v, spans, spans)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_portable_back_end_equals_the_loop(dtype: torch.dtype, bound: float) -> None:
    q, k, v, boundaries = stream(dtype)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    ours = within(attention, q, k, v, boundaries, max(LENGTHS))
    expected = naive(q, k, v, LENGTHS)
    assert relative_error(ours, expected) < bound
    weights = torch.linspace(-1, 1, ours.numel(), dtype=dtype).view_as(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        assert relative_error(a, b) < bound


def test_control_a_window_that_is_not_causal_is_another_function() -> None:
    q, k, v, boundaries = stream(torch.float64)
    assert (
        relative_error(within(attention, q, k, v, boundaries, max(LENGTHS)), naive(q, k, v, LENGTHS, causal=False))
        > 0.1
    )


def test_control_one_document_instead_of_four_is_another_function() -> None:
    q, k, v, boundaries = stream(torch.float64)
    merged = boundaries[[0, -1]]
    assert relative_error(within(attention, q, k, v, merged, q.shape[0]), naive(q, k, v, LENGTHS)) > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_flash_back_end_equals_the_loop_to_bf16_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, boundaries = stream(torch.bfloat16, "cuda", channels=64)
    for x in (q, k, v):
        x.requires_grad_()
    ours = within(attention, q, k, v, boundaries, max(LENGTHS))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = naive(*wide, LENGTHS)
    assert relative_error(ours, expected) < 1e-2
    assert relative_error(within(scaled_dot_product, q, k, v, boundaries, max(LENGTHS)), expected) < 1e-2
    weights = torch.linspace(-1, 1, ours.numel(), device="cuda").view_as(ours)
    got = torch.autograd.grad((ours.float() * weights).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((expected * weights).sum(), wide), strict=True):
        assert relative_error(a, b) < 2e-2
    # The control: the back end's own default window is not causal, and this test sees it.
    original = module.varlen_attn
    monkeypatch.setattr(module, "varlen_attn", lambda *args, **kw: original(*args, **{**kw, "window_size": (-1, -1)}))
    assert relative_error(within(attention, q, k, v, boundaries, max(LENGTHS)), expected) > 0.1


LAST = [2, 1, 5, 9]  # of each document's tokens, those that query


def queries_of_the_last(q: Tensor) -> tuple[Tensor, Spans]:
    documents = q.split(LENGTHS)
    boundaries = torch.tensor([0, *torch.tensor(LAST).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
    return torch.cat([d[-n:] for d, n in zip(documents, LAST, strict=True)]), Spans(boundaries, max(LAST))


def test_the_last_tokens_alone_see_what_they_see_together() -> None:
    q, k, v, boundaries = stream(torch.float64)
    last, spans = queries_of_the_last(q)
    expected, _ = queries_of_the_last(naive(q, k, v, LENGTHS))
    assert relative_error(attention(last, k, v, spans, Spans(boundaries, max(LENGTHS))), expected) < 1e-10
    first = torch.cat([d[:n] for d, n in zip(q.split(LENGTHS), LAST, strict=True)])  # control: other queries
    assert relative_error(attention(first, k, v, spans, Spans(boundaries, max(LENGTHS))), expected) > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_flash_aligns_the_last_tokens_too() -> None:
    q, k, v, boundaries = stream(torch.bfloat16, "cuda", channels=64)
    last, spans = queries_of_the_last(q)
    expected, _ = queries_of_the_last(naive(q.double(), k.double(), v.double(), LENGTHS))
    assert relative_error(attention(last, k, v, spans, Spans(boundaries, max(LENGTHS))), expected) < 1e-2
