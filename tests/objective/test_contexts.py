"""Which contexts a step takes, how they are cut into packs, and the anchors of given states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from anchors import (
    KINDS,
    LAYERS,
    PER_STEP,
    PERSONAS,
    QUESTIONS,
    RESPONSES,
    held_rows,
    random_contexts,
    step_batch,
    with_base,
)
from conftest import relative_error

from minipersona.chat import Document
from minipersona.corpus.batch import RowOrder
from minipersona.model.load import load_model
from minipersona.model.pack import IGNORE
from minipersona.objective.contexts import ContextPack, base_states, last_states, predicting_states
from minipersona.objective.feature_anchor import moved, scales
from minipersona.objective.gram_anchor import cosines
from minipersona.objective.kl_on_prompts import KLOnPrompts
from minipersona.training.memory import cut

# ---------------------------------------------------------------- which, and in which packs


def test_contexts_are_a_function_of_seed_and_step() -> None:
    contexts = random_contexts("feature_anchor")
    later = random_contexts("feature_anchor").groups(5)  # without the steps before
    assert [contexts.groups(step) for step in range(1, 6)][-1] == later
    assert later != contexts.groups(4) and later != random_contexts("feature_anchor", seed=43).groups(5)
    # An epoch takes each context once, and in another order than the rows of the same seed.
    drawn = [c for step in range(1, 9) for (c,) in contexts.groups(step)]
    assert sorted(drawn[:24]) == list(range(24)) == sorted(drawn[24:48])
    assert drawn[:PER_STEP] != RowOrder(24, PER_STEP, 42).step(1)


def test_the_gram_anchor_takes_whole_questions() -> None:
    groups = random_contexts("gram_anchor").groups(3)
    assert len(groups) == PER_STEP // PERSONAS
    for group in groups:
        assert [c // QUESTIONS for c in group] == list(range(PERSONAS))  # every persona, in order
        assert len({c % QUESTIONS for c in group}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_and_packs_share_a_steps_contexts(documents: list[Document], kind: str, size: int) -> None:
    contexts = random_contexts(kind)
    objective = KLOnPrompts(1.0, contexts)
    expected = sorted(c for group in contexts.groups(7) for c in group)
    for pack_tokens in (1, 20, 10_000):
        batches = [step_batch(objective, documents, 7, pack_tokens, rank, size) for rank in range(size)]
        packs = [pack for batch in batches for pack in batch.packs if isinstance(pack, ContextPack)]
        assert sorted(torch.cat([pack.documents for pack in packs]).tolist()) == expected
        tokens = held = sum(len(contexts.ids[c]) for c in expected)
        if contexts.responses:
            held = sum(int(contexts.responses[c].sum()) for c in expected)
            assert PER_STEP < held < tokens
        else:
            assert all(not len(pack.supervised) and bool((pack.targets == 0).all()) for pack in packs)  # all count
        supervised = sum(int(d.supervised.sum()) for d in documents)
        for batch in batches:  # the rows' counts are the rows'
            assert (batch.supervised, batch.context_tokens) == (supervised, tokens)
            assert batch.tokens == sum(map(len, documents))
        for pack in packs:
            assert float(pack.per_context) == supervised / len(expected)
            assert float(pack.per_token) == supervised / held
            starts = pack.boundaries.tolist()
            for c, a, b in zip(pack.documents.tolist(), starts, starts[1:], strict=False):
                assert np.array_equal(pack.ids[a:b].numpy(), contexts.ids[c])
                if contexts.responses:
                    rows = pack.supervised[(pack.supervised >= a) & (pack.supervised < b)]
                    assert torch.equal(pack.targets[rows], pack.ids[rows + 1])
                    assert np.array_equal(pack.targets[a:b] != IGNORE, [*contexts.responses[c][1:], False])
                    assert np.array_equal(rows - a, np.arange(b - a)[held_rows(contexts, c)])


def test_a_step_that_is_skipped_has_no_contexts(documents: list[Document]) -> None:
    silent = [replace(d, supervised=d.supervised & False) for d in documents]
    objective = KLOnPrompts(1.0, random_contexts("kl_on_prompts"))
    assert step_batch(objective, silent).packs == [] and step_batch(objective, documents).context_tokens


def test_cutting_a_pack_for_memory_separates_no_personas_of_a_question(documents: list[Document]) -> None:
    for kind, pieces in (("gram_anchor", 2), ("feature_anchor", PER_STEP)):
        pack = step_batch(KLOnPrompts(1.0, random_contexts(kind)), documents).packs[-1]
        parts = cut(pack, 1)
        assert len(parts) == pieces and {type(part) for part in parts} == {ContextPack}
        assert torch.equal(torch.cat([part.documents for part in parts]), pack.documents)
        assert torch.equal(torch.cat([part.ids for part in parts]), pack.ids)
        assert all(torch.equal(part.per_context, pack.per_context) for part in parts)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the base's states


def test_states_are_those_of_each_prompt_alone(hf_model: Callable[..., Path]) -> None:
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    contexts = random_contexts("feature_anchor")
    few = with_base(contexts, model, (2, 0), steps=1).base
    states = with_base(contexts, model, (2, 0), steps=9).base
    taken = contexts.taken(1)
    assert len(taken) == PER_STEP and list(states) == [2, 0]
    for layer, rows in states.items():
        alone = torch.stack([model(contexts.pack([c]), stop_after=layer)[-1] for c in range(len(contexts.ids))])
        assert relative_error(rows, alone) < 1e-12
        assert relative_error(rows.roll(1, 0), alone) > 1e-2  # the control
        # What no step takes is not computed.
        left = torch.ones(len(rows), dtype=torch.bool).index_fill(0, torch.tensor(taken), False)
        assert torch.equal(few[layer].isnan().all(1), left) and relative_error(few[layer][~left], rows[~left]) < 1e-12


@pytest.mark.parametrize("kind", ["kl_on_prompts", RESPONSES])
def test_what_the_base_predicts_from_is_that_of_each_context_alone(hf_model: Callable[..., Path], kind: str) -> None:
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    contexts, rng = random_contexts(kind), np.random.default_rng(0)
    found = predicting_states(model, contexts, 3, pack_tokens=60)
    drawn = rng.permutation(taken := contexts.taken(3))[:7].tolist()
    pack = contexts.pack(drawn)
    alone = [model(contexts.pack([c]))[held_rows(contexts, c)] for c in drawn]
    rows = contexts.held(pack)
    assert relative_error(found.at(pack, rows), torch.cat(alone)) < 1e-12
    assert relative_error(found.at(contexts.pack(drawn[::-1]), rows), torch.cat(alone)) > 1e-2  # the control
    assert len(found.states) == sum(len(contexts.ids[c][held_rows(contexts, c)]) for c in taken)  # and no others


def test_progress_counts_the_contexts_that_are_done(hf_model: Callable[..., Path]) -> None:
    model, contexts, told = load_model(str(hf_model()), device="cpu"), random_contexts("feature_anchor"), []
    states = base_states(model.requires_grad_(True), contexts, (0,), 1, pack_tokens=20, progress=told.append)
    assert not states[0].requires_grad  # they are a constant, whatever learns
    assert told == sorted(told) and told[0] >= 1 and len(told) > 2 and told[-1] == len(contexts.taken(1)) == PER_STEP


def test_no_block_after_the_last_anchored_one_is_computed(
    hf_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(hf_model()), device="cpu")
    monkeypatch.setattr(model.blocks[2], "_compute", None)  # whoever computes it fails
    contexts = random_contexts("feature_anchor")
    assert last_states(model, contexts.pack([0, 1]), LAYERS)[1].shape == (2, 48)
    with pytest.raises(TypeError):
        base_states(model, contexts, (2,), 1, 100)


# ---------------------------------------------------------------- equations


def test_the_slopes_are_those_of_the_equations() -> None:
    """What the docstrings of the two files state, against autograd."""
    generator = torch.Generator().manual_seed(0)
    h, base = (torch.randn(3 * PERSONAS, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    h.requires_grad_()
    contexts = replace(random_contexts("feature_anchor"), base={1: base}, scale=scales({1: base}, "state"))
    (slope,) = torch.autograd.grad(moved({1: h}, contexts, torch.arange(len(h))).mean(), h)
    assert relative_error(slope, 2 * (h - base) / (len(h) * base.square().sum(-1, keepdim=True))) < 1e-12
    a = 100 * (cosines(h, PERSONAS) - cosines(base, PERSONAS)).square().mean((1, 2)).mean()
    (slope,) = torch.autograd.grad(a, h)
    norm = h.norm(dim=-1, keepdim=True)
    u, gram, gram0 = (h / norm).view(3, PERSONAS, -1), cosines(h, PERSONAS), cosines(base, PERSONAS)
    change = gram - gram0  # (Q, P, P)
    written = torch.einsum("qij,qijd->qid", change, u[:, None] - gram[..., None] * u[:, :, None])
    written = 400 / (3 * PERSONAS**2) * written.reshape(len(h), -1) / norm
    assert relative_error(slope, written) < 1e-12 and relative_error(slope, 2 * written) > 0.1


def test_a_change_relative_to_the_spread_does_not_depend_on_what_all_states_share() -> None:
    base = torch.randn(PERSONAS * QUESTIONS, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base[[3, 5]] = torch.nan  # contexts that no step takes
    which = torch.tensor([0, 4, 7])

    def found(kind: Literal["state", "spread"], shared: float) -> torch.Tensor:
        states = {0: base + shared, 1: 2 * base + shared}
        contexts = replace(random_contexts("feature_anchor"), base=states, scale=scales(states, kind))
        return moved({layer: h[which] + 0.1 for layer, h in states.items()}, contexts, which)

    taken = base[~base.isnan().any(-1)]
    spread = (taken - taken.mean(0)).square().sum(-1).mean()
    expected = 24 * 0.01 / spread * (1 + 1 / 4) / 2  # mean of the two layers
    assert relative_error(found("spread", 0.0), expected.expand(3)) < 1e-12
    assert relative_error(found("spread", 50.0), found("spread", 0.0)) < 1e-10
    assert relative_error(found("state", 50.0), found("state", 0.0)) > 0.9  # the control


def test_cosines_are_between_the_personas_of_one_question() -> None:
    h = torch.randn(2 * PERSONAS, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cosines(h, PERSONAS)
    for q in range(2):
        for i in range(PERSONAS):
            for j in range(PERSONAS):
                a, b = h[q * PERSONAS + i], h[q * PERSONAS + j]
                assert float(found[q, i, j]) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-12)
    turned = h @ torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    assert relative_error(cosines(3 * turned, PERSONAS), found) < 1e-12  # rotated and scaled together
