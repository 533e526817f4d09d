"""Anchored objectives in training: the gradients, and everything that must not matter to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from anchors import (
    BOTH,
    KINDS,
    KL,
    KL_FACTOR,
    LAYERS,
    PERSONAS,
    RESPONSES,
    anchored,
    contexts_of,
    held_rows,
    kind_of,
    random_contexts,
    section,
    step_batch,
    with_base,
    with_predictions,
)
from conftest import relative_error
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, RunConfig, TrainingSection
from minipersona.corpus.batch import Batch
from minipersona.files import read_jsonl
from minipersona.model.load import load_model
from minipersona.model.lora import adapter_disabled, adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.objective import make_objective
from minipersona.objective.contexts import Anchored, ContextPack, Contexts
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.feature_anchor import FeatureAnchor
from minipersona.objective.feature_and_kl import FeatureAndKL
from minipersona.objective.head import ForwardPass, Objective
from minipersona.training import loop as loop_module
from minipersona.training.distributed import Distributed
from minipersona.training.loop import Hooks, Trainer, backward, steering_taps, train
from minipersona.training.memory import cut

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.2)
SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))
Rows = Callable[[Contexts, int], slice]  # of a context's
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def config(kind: str = "cross_entropy", method: str = "lora", steps: int = 4, **execution: Any) -> RunConfig:
    return RunConfig(
        data=DataSection("-", "-"),
        lora=LORA,
        training=TrainingSection(method=method, steps=steps, batch=7, checkpoints=(), learning_rate=1e-2),  # type: ignore[arg-type]
        objective=section(kind, 0.0 if kind == "cross_entropy" else 0.5),
        execution=ExecutionSection(**{"checkpoint_activations": False, **execution}),
    )


def base_model(directory: Path, dtype: torch.dtype = torch.float64) -> Qwen2:
    return load_model(str(directory), dtype=dtype, device="cpu")


def adapted(directory: Path, size: float = 0.1, dtype: torch.dtype = torch.float64, lora: LoraConfig = LORA) -> Qwen2:
    model = apply_lora(base_model(directory, dtype), lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, size, generator=generator)
    return model


def terms_and_gradients(
    model: Qwen2, batch: Batch, objective: Objective, forward: ForwardPass | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over the packs of a step."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in learned.values():
        p.grad = None
    terms = sum(backward(model, pack, objective, forward or ForwardPass(42, 7)) for pack in batch.packs)
    return torch.as_tensor(terms), {name: p.grad for name, p in learned.items() if p.grad is not None}


def run(
    directory: Path, documents: list[Document], out: Path, settings: RunConfig, dtype: torch.dtype = torch.float32,
    fused: bool = True, hooks: Hooks | None = None, **more: Any,
) -> tuple[dict[str, Tensor], list[dict]]:  # fmt: skip
    model = base_model(directory, dtype)
    model.fused = fused
    contexts = None
    if settings.objective.anchored:
        contexts = contexts_of(kind_of(settings.objective), model, settings.training.steps)
    train(Trainer(model, documents, settings, out, SINGLE_PROCESS, contexts=contexts, **more), hooks)
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, read_jsonl(out / "metrics.jsonl")


# ---------------------------------------------------------------- values and gradients


def naive_anchor(
    kind: str, states: list[list[Tensor]], base: list[list[Tensor]], everywhere: list[list[Tensor]]
) -> Tensor:
    """The equation, context by context. Of each context: its anchored states (D,), or its logits for KL, or both.

    The contexts come question by question where they are compared. `everywhere` is the base's parts of all contexts.
    """
    if kind == BOTH:
        halves = [[[(c[:1]) for c in of] for of in (states, base)], [[c[1:] for c in of] for of in (states, base)]]
        spreads = [
            ((h := torch.stack([c[k] for c in everywhere])) - h.mean(0)).square().sum(-1).mean()
            for k in range(1, len(states[0]))
        ]
        changes = [
            ((h - h0) ** 2).sum() / spread
            for of, of_base in zip(*halves[1], strict=True) for h, h0, spread in zip(of, of_base, spreads, strict=True)
        ]  # fmt: skip
        return torch.stack(changes).mean() + KL_FACTOR * naive_anchor(RESPONSES, *halves[0], everywhere)
    if kind in KL:
        sums = [
            F.kl_div(p.log_softmax(-1), q.log_softmax(-1), reduction="sum", log_target=True)
            for (p,), (q,) in zip(states, base, strict=True)
        ]
        return torch.stack(sums).sum() / sum(len(p) for (p,) in states)
    layers = range(len(states[0]))
    if kind == "feature_anchor":
        values = [
            ((h[k] - h0[k]) ** 2).sum() / (h0[k] ** 2).sum()
            for h, h0 in zip(states, base, strict=True) for k in layers
        ]  # fmt: skip
        return torch.stack(values).mean()
    values = []
    for first in range(0, len(states), PERSONAS):
        for k in layers:
            for i in range(first, first + PERSONAS):
                for j in range(first, first + PERSONAS):
                    now, then = (F.cosine_similarity(x[i][k], x[j][k], dim=0) for x in (states, base))
                    values.append(100 * (now - then) ** 2)
    return torch.stack(values).mean()


@EACH_KIND
def test_every_adapters_gradient_equals_naive_autograd(
    hf_model: Callable[..., Path], documents: list[Document], kind: str
) -> None:
    """fp64, B randomised: one prompt at a time, through all blocks and all rows, on the plain path."""
    dropless = replace(LORA, dropout=0.0)
    model, plain = adapted(hf_model(), lora=dropless), adapted(hf_model(), lora=dropless)
    plain.fused = False
    objective = anchored(kind, 0.7, base_model(hf_model()))
    batch = step_batch(objective, documents[:12])
    terms, found = terms_and_gradients(model, batch, objective)

    def parts(c: int, rows: Rows) -> list[Tensor]:
        seen: dict[int, Tensor] = {}
        taps = {layer: lambda h, layer=layer: seen.setdefault(layer, h) for layer in LAYERS}
        logits = plain.lm_head(plain(objective.contexts.pack([c]), taps=taps))
        found = [logits[rows(objective.contexts, c)]] if kind in KL else []
        end = held_rows(objective.contexts, c).start if kind == BOTH else -1  # of the prompt
        return found + [seen[layer][end] for layer in LAYERS if kind not in KL or kind == BOTH]

    def naive(weight: float, rows: Rows = held_rows) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        contexts = [c for group in objective.contexts.groups(7) for c in group]
        with torch.no_grad(), adapter_disabled(plain):
            base = [parts(c, rows) for c in contexts]
            everywhere = [parts(c, rows) for c in range(len(objective.contexts.ids))]
        anchor = naive_anchor(kind, [parts(c, rows) for c in contexts], base, everywhere)
        packs = [pack for pack in batch.packs if not isinstance(pack, ContextPack)]
        summed = [
            F.cross_entropy(plain.lm_head(plain(p))[p.supervised], p.targets[p.supervised], reduction="sum")
            for p in packs
        ]
        loss = torch.stack(summed).sum() / batch.supervised + weight * anchor
        learned = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        return loss, anchor, dict(zip(learned, torch.autograd.grad(loss, learned.values()), strict=True))

    loss, anchor, expected = naive(0.7)
    assert found.keys() == expected.keys() and len(found) == 42
    assert relative_error(terms[0] / batch.supervised, loss) < 1e-10
    assert relative_error(terms[2] / batch.supervised, anchor) < 1e-10 and anchor.detach() > 1e-3
    assert max(relative_error(found[n] / batch.supervised, expected[n]) for n in expected) < 1e-10
    # The controls: another weight of the anchor is seen in the same bound. So are other rows than those that predict a
    # response: all rows, those of the prompt, and the same number one later.
    others = [naive(0.71)]
    if kind in (RESPONSES, BOTH):

        def shifted(contexts: Contexts, c: int) -> slice:
            rows = held_rows(contexts, c)
            return slice(rows.start + 1, rows.stop + 1)

        all_rows, of_prompts = lambda *_: slice(None), lambda *given: slice(held_rows(*given).start)
        others += [naive(0.7, rows) for rows in (all_rows, of_prompts, shifted)]
    for _, _, other in others:
        assert max(relative_error(found[n] / batch.supervised, g) for n, g in other.items()) > 1e-4


@EACH_KIND
def test_every_weights_gradient_equals_transformers(
    hf_model: Callable[..., Path], documents: list[Document], kind: str
) -> None:
    """Full parameters: the anchor's part of the loss alone, from transformers' hidden states and logits."""
    from transformers import AutoModelForCausalLM

    ours = base_model(hf_model(), torch.float32).requires_grad_(True)
    frozen = base_model(hf_model(seed=1), torch.float32)
    objective = anchored(kind, 0.5, frozen, frozen.lm_head.weight)
    batch = step_batch(objective, documents[:12])
    batch = replace(batch, packs=[pack for pack in batch.packs if isinstance(pack, ContextPack)])
    _, found = terms_and_gradients(ours, batch, objective)

    def gradients(weight: float) -> dict[str, Tensor]:
        theirs, base = (
            AutoModelForCausalLM.from_pretrained(hf_model(seed=seed), dtype=torch.float32) for seed in (0, 1)
        )

        def parts(model: Any, c: int) -> list[Tensor]:
            out = model(torch.from_numpy(objective.contexts.ids[c].astype("int64"))[None], output_hidden_states=True)
            rows = held_rows(objective.contexts, c)
            end = rows.start if kind == BOTH else -1
            states = [out.hidden_states[layer + 1][0, end] for layer in LAYERS]
            return [out.logits[0, rows], *(states if kind == BOTH else [])] if kind in KL else states

        contexts = [c for group in objective.contexts.groups(7) for c in group]
        with torch.no_grad():
            held = [parts(base, c) for c in contexts]
            everywhere = [parts(base, c) for c in range(len(objective.contexts.ids))]
        loss = weight * naive_anchor(kind, [parts(theirs, c) for c in contexts], held, everywhere)
        loss.backward()
        return {n: p.grad * batch.supervised for n, p in theirs.named_parameters() if p.grad is not None}

    expected = gradients(0.5)
    assert {n for n, g in found.items() if g.any()} == expected.keys() & found.keys() == expected.keys()
    assert any("layers.2" in name for name in expected) == (kind in KL)  # the others stop after block 1
    negligible = 1e-6 * max(float(g.norm()) for g in expected.values())  # key biases: softmax does not see them
    compared = [name for name, gradient in expected.items() if float(gradient.norm()) > negligible]
    assert len(compared) > 20
    assert max(relative_error(found[name], expected[name]) for name in compared) < 2e-5
    other = gradients(0.501)
    assert max(relative_error(found[name], other[name]) for name in compared) > 1e-4  # the control


@EACH_KIND
def test_an_anchor_of_weight_zero_is_plain_sft_to_the_bit(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = run(hf_model(), documents, tmp_path / "plain", config())[0]
    held = run(hf_model(), documents, tmp_path / "held", config(kind))[0]
    monkeypatch.setattr(loop_module, "make_objective", lambda *given: replace(make_objective(*given), weight=0.0))  # type: ignore[type-var]
    zero, rows = run(hf_model(), documents, tmp_path / "zero", config(kind))
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert any(not torch.equal(plain[name], held[name]) for name in plain)  # the control
    assert rows[-1]["anchor"] > 0 and rows[-1]["loss"] == rows[-1]["cross_entropy"]


@EACH_KIND
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-20), (torch.float32, 1e-6)])
def test_at_the_start_the_anchor_is_zero(
    hf_model: Callable[..., Path], documents: list[Document], kind: str, dtype: torch.dtype, bound: float
) -> None:
    """B = 0; to rounding, which a one-sided KL has in first order."""
    objective = anchored(kind, 5.0, base_model(hf_model(), dtype))
    batch = step_batch(objective, documents[:8])
    model = adapted(hf_model(), size=0.0, dtype=dtype)
    terms, found = terms_and_gradients(model, batch, objective)
    plain_terms, plain = terms_and_gradients(model, batch, replace(objective, weight=0.0))
    assert abs(terms[2]) < (1e-12 if kind in KL and dtype == torch.float64 else bound) * batch.supervised
    assert relative_error(terms[0], plain_terms[0]) < 1e-5
    assert max(relative_error(found[name], plain[name]) for name in plain if plain[name].any()) < 1e-4
    assert terms_and_gradients(adapted(hf_model(), dtype=dtype), batch, objective)[0][2] > 1e-3  # the control


# ---------------------------------------------------------------- what it asks of the network


@EACH_KIND
def test_contexts_are_neither_dropped_nor_steered(
    hf_model: Callable[..., Path], documents: list[Document], kind: str
) -> None:
    dropped, dropless = adapted(hf_model()), adapted(hf_model(), lora=replace(LORA, dropout=0.0))
    objective = anchored(kind, 0.5, base_model(hf_model()))
    batch = step_batch(objective, documents[:8])
    steered = ForwardPass(42, 7, steering_taps({1: torch.linspace(-1, 1, 48)}, dropped))
    anchors = [
        terms_and_gradients(model, batch, objective, forward)[0]
        for model, forward in ((dropped, None), (dropless, None), (dropped, steered))
    ]
    assert torch.equal(anchors[0][2], anchors[1][2]) and torch.equal(anchors[0][2], anchors[2][2])
    assert all(relative_error(anchors[0][1], other[1]) > 1e-4 for other in anchors[1:])  # the control: rows are
    assert all(adapter.enabled for adapter in adapters(dropped).values())


@EACH_KIND
def test_the_anchor_holds_the_model_near_its_base(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str
) -> None:
    settings = config(kind, steps=12)
    ends = {
        weight: run(
            hf_model(), documents, tmp_path / str(weight),
            replace(settings, objective=replace(settings.objective, weight=weight)),
        )[1][-1]
        for weight in (1e-9, 20.0)
    }  # fmt: skip
    assert 0 < ends[20.0]["anchor"] < 0.7 * ends[1e-9]["anchor"]


@EACH_KIND
@pytest.mark.parametrize("method", ["lora", "full"])
def test_contexts_are_outside_every_count_but_their_own(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str, method: str
) -> None:
    _, plain = run(hf_model(), documents, tmp_path / "plain", config("cross_entropy", method))
    _, held = run(hf_model(), documents, tmp_path / "held", config(kind, method))
    contexts = random_contexts(kind)
    for a, b in zip(plain, held, strict=True):
        assert all(a[name] == b[name] for name in ("supervised_tokens", "tokens", "lr"))
        taken = [c for group in contexts.groups(b["step"]) for c in group]
        assert b["context_tokens"] == sum(len(contexts.ids[c]) for c in taken) and "context_tokens" not in a
        assert b["loss"] == pytest.approx(b["cross_entropy"] + 0.5 * b["anchor"], rel=1e-6)
    assert held[0]["cross_entropy"] == plain[0]["cross_entropy"]
    assert max(abs(row["anchor"]) for row in held[:2]) < 1e-6 < 1e-5 < held[-1]["anchor"]  # the first update has rate 0


# ---------------------------------------------------------------- what must not matter


@EACH_KIND
def test_micro_batches_do_not_matter_over_whole_steps(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str
) -> None:
    """One pack a step, several, and one a document (or a question)."""
    ends = [
        run(hf_model(), documents, tmp_path / str(tokens), config(kind, pack_tokens=tokens), torch.float64)[0]
        for tokens in (10_000, 30, 1)
    ]
    for name, expected in ends[0].items():
        assert relative_error(ends[1][name], expected) < 1e-10
        assert relative_error(ends[2][name], expected) < 1e-10


@EACH_KIND
def test_ranks_add_up_to_one(hf_model: Callable[..., Path], documents: list[Document], kind: str) -> None:
    """Every rank's share of terms and gradients, summed. A rank may have no context."""
    model, objective = adapted(hf_model()), anchored(kind, 0.5, base_model(hf_model()))
    terms, whole = terms_and_gradients(model, step_batch(objective, documents[:12]), objective)
    for size in (2, 4):
        shares = [
            terms_and_gradients(model, step_batch(objective, documents[:12], 7, 10_000, rank, size), objective)
            for rank in range(size)
        ]
        assert relative_error(torch.stack([share[0] for share in shares]).sum(0), terms) < 1e-10
        for name, expected in whole.items():
            assert relative_error(torch.stack([share[1][name] for share in shares]).sum(0), expected) < 1e-10
    # The control: a context that two ranks count.
    assert relative_error(shares[0][0][2] + terms[2], terms[2]) > 1e-3


@EACH_KIND
def test_a_step_repeated_in_smaller_packs_for_memory_is_the_same(
    hf_model: Callable[..., Path], documents: list[Document], kind: str
) -> None:
    model, objective = adapted(hf_model()), anchored(kind, 0.5, base_model(hf_model()))
    batch = step_batch(objective, documents[:12])
    terms, whole = terms_and_gradients(model, batch, objective)
    pieces = replace(batch, packs=[piece for pack in batch.packs for piece in cut(pack, 30)])
    again, found = terms_and_gradients(model, pieces, objective)
    assert len(pieces.packs) > len(batch.packs) + 2 and relative_error(again, terms) < 1e-10
    assert max(relative_error(found[name], whole[name]) for name in whole) < 1e-10


@EACH_KIND
@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointing_changes_no_bit(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str, method: str
) -> None:
    ends = [
        run(hf_model(), documents, tmp_path / str(on), config(kind, method, checkpoint_activations=on))
        for on in (False, True)
    ]
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    numbers = [[(row["loss"], row["anchor"], row["grad_norm"]) for row in rows] for _, rows in ends]
    assert numbers[0] == numbers[1] and numbers[0][-1][1] > 0


@EACH_KIND
def test_the_plain_path_does_not_matter(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str
) -> None:
    """execution.fused = false, over whole steps in fp64 (`test_equivalence.py` says why in that)."""
    plain, fused = (
        run(hf_model(), documents, tmp_path / str(on), config(kind), torch.float64, fused=on)[0] for on in (False, True)
    )
    assert max(relative_error(plain[name], fused[name]) for name in plain) < 1e-10


class Killed(Exception):
    """What the caller of the loop raises in place of a kill."""


@EACH_KIND
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_and_resumed_equals_uninterrupted(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str, method: str
) -> None:
    settings = config(kind, method, steps=7, save_minutes=0.0)
    expected, rows = run(hf_model(), documents, tmp_path / "whole", settings)

    def kill(row: dict) -> None:
        if row["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run(hf_model(), documents, tmp_path / "cut", settings, hooks=Hooks(logged=kill))
    assert not (tmp_path / "cut" / "latest" / "state.json").read_text().count('"done": true')
    resumed, again = run(hf_model(), documents, tmp_path / "cut", settings)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert [row["anchor"] for row in rows] == [row["anchor"] for row in again] and rows[-1]["anchor"] > 0


@pytest.mark.parametrize("checkpoint", [False, True])
def test_states_are_those_of_the_prompts_alone_at_every_block(
    hf_model: Callable[..., Path], documents: list[Document], checkpoint: bool
) -> None:
    """The feature anchor of `feature_and_kl`, whose passes have responses behind the prompts, is `feature_anchor`'s.

    From the last block only the rows that predict a response leave.
    """
    model, base = adapted(hf_model()), base_model(hf_model())
    contexts = with_base(with_predictions(random_contexts(BOTH), base), base, layers=(0, 2))
    alone = [ids[~response] for ids, response in zip(contexts.ids, contexts.responses, strict=True)]
    prompts = replace(contexts, ids=alone, responses=())
    forward = ForwardPass(42, 7, checkpoint_activations=checkpoint)
    anchors = []
    for objective in (
        FeatureAndKL(1.0, contexts, kl_factor=0.0), FeatureAnchor(1.0, prompts),
        FeatureAnchor(1.0, replace(prompts, base={0: contexts.base[0]}, scale={0: contexts.scale[0]})),
    ):  # fmt: skip
        anchors.append(terms_and_gradients(model, step_batch(objective, documents[:8]), objective, forward)[0][2])
    assert relative_error(anchors[0], anchors[1]) < 1e-10 and anchors[1] > 1e-3
    assert relative_error(anchors[2], anchors[1]) > 1e-2  # the control: without the last block


@EACH_KIND
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_objective_is_what_its_config_says(
    hf_model: Callable[..., Path], tmp_path: Path, kind: str, method: str
) -> None:
    model = base_model(hf_model())
    found = make_objective(model, config(kind, method), tmp_path, False, random_contexts(kind))
    assert type(found) is type(anchored(kind, 0.5, model)) and found.weight == 0.5
    assert getattr(found, "kl_factor", None) == (KL_FACTOR if kind == BOTH else None)
    head = getattr(found, "head", None)  # the base's, where all weights learn
    assert (head is not None) == (kind in KL and method == "full") and head is not model.lm_head.weight
    assert head is None or torch.equal(head, model.lm_head.weight)


def test_the_objective_of_a_row_is_cross_entropy(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = adapted(hf_model())
    for kind in KINDS:
        objective: Anchored = anchored(kind, 0.5, base_model(hf_model()))
        batch = step_batch(objective, documents[:8])
        rows = replace(batch, packs=batch.packs[:1])
        plain = terms_and_gradients(model, rows, CrossEntropy())
        found = terms_and_gradients(model, rows, objective)
        assert torch.equal(found[0], torch.cat([plain[0], torch.zeros(1, dtype=torch.float64)]))
        assert all(torch.equal(found[1][name], plain[1][name]) for name in plain[1])


@EACH_KIND
def test_in_half_precision_the_base_is_kept_as_it_is_computed(
    hf_model: Callable[..., Path], documents: list[Document], kind: str
) -> None:
    """bf16 stream, fp32 adapters: the base's states are bf16, their distances fp32 or better."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        objective = anchored(kind, 0.5, base_model(hf_model(), dtype))
        assert all(h.dtype == dtype for h in objective.contexts.base.values())
        model = adapted(hf_model(), dtype=dtype)
        found[dtype], gradients = terms_and_gradients(model, step_batch(objective, documents[:8]), objective)
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert 1e-6 < relative_error(found[torch.bfloat16][2], found[torch.float32][2]) < 0.1
