"""The small parts of training: schedule, optimiser, packs, dropout's hash."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from conftest import relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipersona.model.dropout import channel_keys, hashed_dropout, keep_mask, token_keys
from minipersona.model.pack import IGNORE, make_pack, split
from minipersona.training.distributed import Distributed
from minipersona.training.optimizer import AdamW, Flat, learning_rate, norm_and_scale

# ---------------------------------------------------------------- schedule


def test_schedule_is_the_registered_one() -> None:
    """375 steps, 3%: 12 updates of warm-up, then (376 - k) / 363."""
    rates = [learning_rate(k, 2e-5, 375, 0.03) for k in range(1, 376)]
    assert rates[0] == 0.0
    assert rates[12] == 2e-5  # update 13 is the peak
    for k in range(1, 376):
        expected = 2e-5 * ((k - 1) / 12 if k <= 12 else (376 - k) / 363)
        assert math.isclose(rates[k - 1], expected, rel_tol=1e-12, abs_tol=0)


@pytest.mark.parametrize("steps, warmup", [(375, 0.03), (20, 0.15), (7, 0.0), (5, 1.0), (1, 0.03)])
def test_schedule_equals_hugging_face(steps: int, warmup: float) -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)
    for k in range(1, steps + 1):
        assert learning_rate(k, 1.0, steps, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------- optimiser

AS_THEY_ARE, ALLOWED = torch.tensor(1.0), torch.tensor(True)


@pytest.mark.parametrize("compiled", [False, True])
def test_adamw_equals_torch_and_decay_matters(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # needs no C++
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), (3, 4)]
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    mine = [nn.Parameter(t.clone()) for t in start]
    theirs = [nn.Parameter(t.clone()) for t in start]
    optimizer = AdamW(Flat(mine), 0.9, 0.999, 1e-8, 0.1, compiled)
    groups = [{"params": [theirs[0], theirs[2]]}, {"params": [theirs[1]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(10):
        for a, b in zip(mine, theirs, strict=True):
            assert a.grad is not None
            a.grad.copy_(torch.randn(a.shape, generator=generator, dtype=torch.float64))
            b.grad = a.grad.clone()
        rate = 0.01 * (step + 1)
        for group in reference.param_groups:
            group["lr"] = rate
        optimizer.update(rate, AS_THEY_ARE, ALLOWED)
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        assert relative_error(a, b) < 1e-12
    # The control: without the decay the matrices end elsewhere.
    assert relative_error(mine[0] / (1 - 0.01 * 0.1), theirs[0]) > 1e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_an_update_that_is_not_allowed_changes_nothing(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    weight = nn.Parameter(torch.ones(2, 3))
    layout = Flat([weight])
    optimizer = AdamW(layout, 0.9, 0.999, 1e-8, 0.1, compiled)

    def kept() -> list[torch.Tensor]:
        moments = (*layout.exp_avg, *layout.exp_avg_sq)
        return [t.clone() for t in (weight.detach(), *moments, torch.tensor(optimizer.updates))]

    def update(gradient: float, allowed: bool) -> None:
        assert weight.grad is not None
        weight.grad.fill_(gradient)
        optimizer.update(0.1, AS_THEY_ARE, torch.tensor(allowed))

    update(math.nan, allowed=False)  # the first of all: there are no moments yet
    assert torch.equal(weight, torch.ones(2, 3)) and optimizer.updates == 0
    update(1.0, allowed=True)
    before = kept()
    for gradient in (math.nan, math.inf, 1.0):
        update(gradient, allowed=False)
        assert all(map(torch.equal, kept(), before))
    update(1.0, allowed=True)
    assert optimizer.updates == 2 and not any(map(torch.equal, kept(), before))


def test_small_updates_survive_in_fp32_and_would_round_away_in_bf16() -> None:
    """Why adapters are fp32 masters: a late update of relative size 1e-4 is below bf16's half step of 2e-3."""
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        weight = nn.Parameter(torch.full((4, 4), 1.0, dtype=dtype))
        optimizer = AdamW(Flat([weight]), 0.9, 0.999, 1e-8, 0.0)
        assert weight.grad is not None
        weight.grad.fill_(1)
        optimizer.update(1e-4, AS_THEY_ARE, ALLOWED)
        assert bool((weight != 1.0).any()) is moves


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_clipping_equals_torch(size: float) -> None:
    gradients = [torch.randn(5, 3, dtype=torch.float64) * size, torch.randn(4, dtype=torch.float64) * size]
    mine = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    theirs = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    layout = Flat(mine)
    for ours, parameter, gradient in zip(mine, theirs, gradients, strict=True):
        assert ours.grad is not None
        ours.grad.copy_(gradient)
        parameter.grad = gradient / 7
    norm, scale = norm_and_scale(layout, Distributed(0, 1, torch.device("cpu")), 7, 1.0)
    assert relative_error(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0)) < 1e-12
    for ours, parameter in zip(mine, theirs, strict=True):
        assert ours.grad is not None and parameter.grad is not None
        assert relative_error(ours.grad * scale, parameter.grad) < 1e-12


def test_parameters_are_views_and_gradients_accumulate_where_they_are_used() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(1, 2))]
    before = [w.detach().clone() for w in weights]
    layout = Flat(weights)
    optimizer = AdamW(layout, 0.9, 0.999, 1e-8, 0.0)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    for _ in range(2):
        sum((w * (i + 1)).sum() for i, w in enumerate(weights)).backward()  # type: ignore[union-attr]
    matrices, vectors = (sorted(piece.gradient.tolist()) for group in layout.update_groups() for piece in group)
    assert (matrices, vectors) == ([4.0] * 4 + [6.0] * 2, [2.0] * 3)
    optimizer.update(0.1, AS_THEY_ARE, ALLOWED)
    assert all(bool((w < 1).all()) for w in weights)


@given(st.lists(st.sampled_from([(2, 3), (4, 3), (3, 2), (3,), (5,)]), min_size=1, max_size=12), st.data())
def test_gradients_are_added_to_their_own_parameters(shapes: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Whatever their order, whichever have none, and though some are slices of a larger tensor."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    layout = Flat(weights)
    larger = [torch.randn([2 * size for size in shape]) for shape in shapes]
    given = [
        wide[tuple(slice(size) for size in shape)] if data.draw(st.booleans()) else None
        for shape, wide in zip(shapes, larger, strict=True)
    ]
    for _ in range(2):
        layout.add_gradients(given)
    for weight, gradient in zip(weights, given, strict=True):
        expected = torch.zeros_like(weight) if gradient is None else 2 * gradient
        assert weight.grad is not None and torch.equal(weight.grad, expected)


# ---------------------------------------------------------------- packs


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 700))
def test_splitting_keeps_order_and_bound(lengths: list[int], most: int) -> None:
    groups = split(lengths, most)
    assert [item for group in groups for item in group] == list(range(len(lengths)))
    for group in groups:
        assert group and (len(group) == 1 or sum(lengths[i] for i in group) <= most)


def test_pack_targets_never_cross_a_boundary() -> None:
    pack = make_pack([np.array([5, 6, 7]), np.array([8]), np.array([9, 4])], [np.ones(n, bool) for n in (3, 1, 2)])
    assert pack.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert pack.targets.tolist() == [6, 7, IGNORE, IGNORE, 4, IGNORE]
    assert pack.supervised.tolist() == [0, 1, 4]
    assert pack.boundaries.tolist() == [0, 3, 4, 6] and pack.last.tolist() == [2, 3, 5] and pack.longest == 3


# ---------------------------------------------------------------- hashed dropout

P = 0.05


def masks(step: int = 3, module: str = "a", tokens: int = 2000, channels: int = 1000, seed: int = 42) -> torch.Tensor:
    pack = make_pack([np.zeros(tokens // 4, dtype=np.int64)] * 4, documents=[0, 1, 2, 1_000_003])
    return ~keep_mask(token_keys(seed, step, pack), channel_keys(module, channels), P)


def test_dropout_rate_by_token_and_by_channel() -> None:
    dropped = masks().double()
    cells = dropped.numel()
    assert abs(float(dropped.mean()) - P) < 5 * math.sqrt(P * (1 - P) / cells)
    for axis, size in ((0, 2000), (1, 1000)):
        rates = dropped.mean(axis)
        z = (rates - P) / math.sqrt(P * (1 - P) / size)
        assert float(z.abs().max()) < 5 and 0.9 < float(z.square().mean()) < 1.1


def test_dropout_masks_are_independent() -> None:
    """Neighbouring tokens, channels, steps, seeds, documents, modules: a pair overlaps as often as chance has it."""
    base = masks()
    pairs = {
        "step": (base, masks(step=4)),
        "seed": (base, masks(seed=43)),
        "module": (base, masks(module="b")),
        "token": (base[:-1], base[1:]),
        "channel": (base[:, :-1], base[:, 1:]),
        "document": (base[:500], base[500:1000]),
        "far": (base[:-512], base[512:]),
    }
    for name, (a, b) in pairs.items():
        overlap = float((a & b).double().mean())
        assert abs(overlap - P * P) < 5 * math.sqrt(P * P / a.numel()), name
    # The control: a hash that forgot the module would give the same mask.
    assert float((base & base).double().mean()) > 10 * P * P


def test_dropout_follows_the_document_not_the_pack() -> None:
    ids = [np.zeros(n, dtype=np.int64) for n in (5, 9, 3)]
    whole = token_keys(1, 2, make_pack(ids, documents=[10, 20, 30]))
    alone = token_keys(1, 2, make_pack([ids[1]], documents=[20]))
    assert torch.equal(whole[5:14], alone)
    assert not torch.equal(whole[:5], alone[:5])


def test_dropout_keeps_the_mean_and_zero_is_identity() -> None:
    x = torch.ones(2000, 1000)
    pack = make_pack([np.zeros(2000, dtype=np.int64)])
    out = hashed_dropout(x, token_keys(0, 1, pack), channel_keys("m", 1000), P)
    assert abs(float(out.mean()) - 1) < 1e-3
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - P)))}
    assert torch.equal(hashed_dropout(x, token_keys(0, 1, pack), channel_keys("m", 1000), 0.0), x)
