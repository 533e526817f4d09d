"""What each objective makes of the network: which passes, under which dropout and steering, with which gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, ObjectiveSection, RunConfig, TrainingSection
from minipersona.corpus.batch import pack_documents
from minipersona.errors import UserError
from minipersona.files import read_json, read_jsonl
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.objective import check_objective, make_objective
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass, Objective
from minipersona.objective.kl_to_base import KLToBase
from minipersona.objective.r3f import R3F, embedding_noise
from minipersona.training.distributed import Distributed
from minipersona.training.heldout import heldout_loss
from minipersona.training.loop import Hooks, Trainer, backward, steering_taps, train

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.2)
SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))
STEERING = {1: torch.linspace(-1, 1, 48)}


def config(kind: str = "cross_entropy", method: str = "lora", **objective: object) -> RunConfig:
    weight = {} if kind == "cross_entropy" else {"weight": 0.5}
    return RunConfig(
        data=DataSection("-", "-"),
        lora=LORA,
        training=TrainingSection(method=method, steps=4, batch=6, checkpoints=(), learning_rate=1e-2),  # type: ignore[arg-type]
        objective=ObjectiveSection(kind, **weight, **objective),  # type: ignore[arg-type]
        execution=ExecutionSection(checkpoint_activations=False),
    )


def adapted(directory: Path, size: float = 0.1, dtype: torch.dtype = torch.float64) -> Qwen2:
    model = apply_lora(load_model(str(directory), dtype=dtype, device="cpu"), LORA)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, size, generator=generator)
    return model


def terms_and_gradients(
    model: Qwen2, documents: list[Document], objective: Objective, run: ForwardPass | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in learned.values():
        p.grad = None
    terms = backward(model, pack_documents(documents), objective, run or ForwardPass(42, 7))
    return terms, {name: p.grad for name, p in learned.items() if p.grad is not None}


def checked_objective(model: Qwen2, documents: list[Document], settings: RunConfig, out: Path) -> Objective:
    check_objective(model, documents, settings, out)
    return make_objective(model, settings, out, compiled=False)


def run(
    directory: Path, documents: list[Document], out: Path, settings: RunConfig, **more: object
) -> tuple[dict[str, Tensor], list[dict]]:
    model = load_model(str(directory), device="cpu")
    train(Trainer(model, documents, settings, out, SINGLE_PROCESS, **more))  # type: ignore[arg-type]
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, read_jsonl(out / "metrics.jsonl")


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["kl_to_base", "r3f"])
def test_every_weights_gradient_equals_naive_autograd(
    hf_model: Callable[..., Path], documents: list[Document], kind: str, tied: bool
) -> None:
    """Full parameters, one document at a time in transformers, the divergence by torch's kl_div over whole logits."""
    from transformers import AutoModelForCausalLM

    def reference(weight: float) -> dict[str, Tensor]:
        theirs = AutoModelForCausalLM.from_pretrained(hf_model(tied), dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(hf_model(tied, seed=1), dtype=torch.float32)
        loss = torch.zeros(())
        for row, document in enumerate(documents[:4]):
            ids = torch.from_numpy(document.ids.astype("int64"))[None]
            rows = torch.from_numpy(document.supervised[1:]).nonzero()[:, 0]
            embedded = theirs.get_input_embeddings()(ids)
            logits = theirs(inputs_embeds=embedded).logits[0, rows]
            if kind == "r3f":
                pack = pack_documents([document], [row])
                noise = embedding_noise(ForwardPass(42, 7).keys(ours, pack), "uniform", 0.05, 48)
                other = theirs(inputs_embeds=embedded + noise).logits[0, rows]
            else:
                other = base(ids).logits[0, rows].detach()
            p, q = logits.log_softmax(-1), other.log_softmax(-1)
            loss = loss + F.cross_entropy(logits, ids[0, rows + 1], reduction="sum")
            for a, b in ((p, q), (q, p)):
                loss = loss + weight * F.kl_div(a, b, reduction="sum", log_target=True)
        loss.backward()
        return {name: p.grad for name, p in theirs.named_parameters()}

    ours = load_model(str(hf_model(tied)), dtype=torch.float32, device="cpu").requires_grad_(True)
    frozen = load_model(str(hf_model(tied, seed=1)), dtype=torch.float32, device="cpu")
    objective = R3F(0.5, "uniform", 0.05) if kind == "r3f" else KLToBase(0.5, "symmetric", frozen)
    _, found = terms_and_gradients(ours, documents[:4], objective)
    expected = reference(0.5)
    assert found.keys() == expected.keys()
    negligible = 1e-6 * max(float(g.norm()) for g in expected.values())  # key biases: softmax does not see them
    compared = [name for name, gradient in expected.items() if float(gradient.norm()) > negligible]
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(compared) and len(compared) > 30
    assert max(relative_error(found[name], expected[name]) for name in compared) < 2e-5
    # The control: another weight of the divergence is seen in the same bound.
    other = reference(0.501)
    assert max(relative_error(found[name], other[name]) for name in compared) > 1e-4


# ---------------------------------------------------------------- KL to the base


def test_at_the_start_the_base_holds_nothing_back(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    """B = 0: no divergence, and the gradient of plain SFT, dropout or not; to rounding, since adapters that add nothing
    still make the products longer, and the CPU's library may then sum in another order."""
    model = adapted(hf_model(), size=0.0, dtype=torch.float32)
    plain = terms_and_gradients(model, documents[:8], CrossEntropy())
    held = terms_and_gradients(model, documents[:8], KLToBase(5.0, "symmetric"))
    assert abs(held[0][2]) < 1e-9 and abs(held[0][0] / plain[0][0] - 1) < 1e-6
    assert max(relative_error(held[1][name], plain[1][name]) for name in plain[1] if plain[1][name].any()) < 1e-5
    # The control: once B is not zero, there is something.
    assert terms_and_gradients(adapted(hf_model()), documents[:8], KLToBase(5.0, "symmetric"))[0][2] > 1e-3


def test_the_base_is_neither_steered_nor_dropped_nor_adapted(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    """A separate model in its place gives the same; the adapted one in its place (the control) does not."""
    model = adapted(hf_model())
    steered = ForwardPass(42, 7, steering_taps(STEERING, model))
    untouched = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    ours = terms_and_gradients(model, documents[:8], KLToBase(0.5, "forward"), steered)
    expected = terms_and_gradients(model, documents[:8], KLToBase(0.5, "forward", untouched), steered)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(ours[1][name], expected[1][name]) for name in expected[1])
    wrong = terms_and_gradients(model, documents[:8], KLToBase(0.5, "forward", copy.deepcopy(model)), steered)
    assert relative_error(wrong[0][2], expected[0][2]) > 1e-2
    assert all(adapter.enabled for adapter in adapters(model).values())


def test_a_frozen_copy_is_the_base_where_all_weights_learn(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    settings = config("kl_to_base", "full")
    model = load_model(str(hf_model()), device="cpu")
    before = {name: p.clone() for name, p in model.named_parameters()}
    objective = checked_objective(model, documents, settings, tmp_path)
    assert isinstance(objective, KLToBase) and objective.frozen is not None
    train(Trainer(model, documents, settings, tmp_path, SINGLE_PROCESS))
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, p in objective.frozen.named_parameters():
        assert torch.equal(p, before[name]) and not p.requires_grad and p.grad is None
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert max(rows[0]["kl"], rows[1]["kl"]) < 1e-10 < 1e-8 < rows[2]["kl"]  # the first update has rate 0
    assert all(row["loss"] == pytest.approx(row["cross_entropy"] + 0.5 * row["kl"], rel=1e-6) for row in rows)


def test_the_divergence_holds_the_model_near_its_base(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    settings = config("kl_to_base")
    settings = replace(settings, training=replace(settings.training, steps=12))
    divergences = [
        run(hf_model(), documents, tmp_path / str(w), replace(settings, objective=ObjectiveSection("kl_to_base", w)))[
            1
        ][-1]["kl"]
        for w in (1e-9, 5.0)
    ]
    assert 0 < divergences[1] < 0.7 * divergences[0]


# ---------------------------------------------------------------- R3F


def test_both_branches_share_their_dropout(
    hf_model: Callable[..., Path], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control gives the branches masks of their own, and the divergence is the masks' and not the noise's."""
    model = adapted(hf_model())
    objective = R3F(0.5, "normal", 1e-5)
    shared = float(terms_and_gradients(model, documents[:8], objective)[0][2])
    states = ForwardPass.states

    def independent(self: ForwardPass, model: Qwen2, pack: object, keys: Tensor, *more: object) -> Tensor:
        half = len(keys) // 2
        return states(self, model, pack, torch.cat([keys[:half], keys[half:] ^ 0x5BD1E995]), *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ForwardPass, "states", independent)
    assert float(terms_and_gradients(model, documents[:8], objective)[0][2]) > 1e5 * shared > 0


def test_noise_changes_with_the_step_and_vanishes_with_epsilon(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    model, objective = adapted(hf_model()), R3F(0.5, "normal", 1e-2)
    first, second = (
        terms_and_gradients(model, documents[:8], objective, ForwardPass(42, step))[0][2] for step in (1, 2)
    )
    assert relative_error(first, second) > 1e-3
    plain = terms_and_gradients(model, documents[:8], CrossEntropy())
    tiny = terms_and_gradients(model, documents[:8], R3F(0.5, "normal", 1e-8))
    assert relative_error(tiny[0][0], plain[0][0]) < 1e-12
    assert max(relative_error(tiny[1][name], plain[1][name]) for name in plain[1]) < 1e-6


def test_a_run_writes_its_check_and_goes_on_with_its_epsilon(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    _, rows = run(hf_model(), documents, tmp_path, config("r3f"))
    check = read_json(tmp_path / "objective_check.json")
    assert check.keys() == {"epsilon", "cosine", "kl", "kl_fp32", "effective", "supervised_per_row"}
    assert check["epsilon"] == 1e-5 and check["effective"] and check["cosine"] > 0.99
    assert 0 < rows[0]["kl"] < 1e-4 and rows[0]["loss"] == pytest.approx(rows[0]["cross_entropy"], rel=1e-4)
    model = load_model(str(hf_model()), device="cpu")
    objective = checked_objective(model, documents, config("r3f", epsilon=0.5), tmp_path)
    assert isinstance(objective, R3F) and objective.epsilon == 1e-5  # what the run began with
    other = checked_objective(model, documents, config("r3f", epsilon=0.5), tmp_path / "new")
    assert isinstance(other, R3F) and other.epsilon == 0.5


def test_per_row_lambda_counts_as_often_as_a_row_has_supervised_tokens(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    model = load_model(str(hf_model()), device="cpu")
    mean = sum(int(document.supervised.sum()) for document in documents) / len(documents)
    plain, per_row = (
        checked_objective(model, documents, config("r3f", per_row=flag), tmp_path) for flag in (False, True)
    )
    assert isinstance(plain, R3F) and isinstance(per_row, R3F)
    assert mean > 2 and per_row.weight == pytest.approx(mean * plain.weight) and per_row.epsilon == plain.epsilon


def test_a_base_that_is_not_finite_is_an_error(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    model = load_model(str(hf_model()), device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite on the first step's rows"):
        train(Trainer(model, documents, config("r3f"), tmp_path, SINGLE_PROCESS))
    assert not (tmp_path / "objective_check.json").exists()


def test_two_copies_of_a_token_count_twice_in_a_packs_budget(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = Qwen2.forward

    def recording(self: Qwen2, pack, **more) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(pack.tokens)
        return forward(self, pack, **more)

    monkeypatch.setattr(Qwen2, "forward", recording)
    settings = config("r3f")
    run(hf_model(), documents, tmp_path, replace(settings, execution=replace(settings.execution, pack_tokens=60)))
    assert seen and max(seen) <= 60


# ---------------------------------------------------------------- steering


@pytest.mark.parametrize("kind", ["cross_entropy", "kl_to_base", "r3f"])
def test_a_coefficient_of_zero_changes_no_bit(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str
) -> None:
    vectors: Mapping[str, dict[int, Tensor]] = {
        "none": {}, "zero": {1: 0.0 * STEERING[1]}, "steered": {1: 0.3 * STEERING[1]},
    }  # fmt: skip
    ends = {
        name: run(hf_model(), documents, tmp_path / name, config(kind), steering=vector)[0]
        for name, vector in vectors.items()
    }
    assert all(torch.equal(ends["none"][name], ends["zero"][name]) for name in ends["none"])
    assert any(relative_error(ends["steered"][name], ends["none"][name]) > 1e-3 for name in ends["none"])


def test_steering_is_an_addition_at_its_block(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = adapted(hf_model())
    pack = pack_documents(documents[:4])
    taps = steering_taps(STEERING, model)
    for layer in (0, 1, 2):
        moved = model(pack, taps=taps, stop_after=layer) - model(pack, stop_after=layer)
        if layer == 1:
            assert relative_error(moved, STEERING[1].double().expand_as(moved)) < 1e-12
        assert bool(moved.any()) == (layer >= 1)


def test_held_out_rows_are_not_steered(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    model = load_model(str(hf_model()), device="cpu")
    measured: dict[int, tuple[float, dict[str, Tensor]]] = {}

    def checkpoint(step: int) -> None:
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        measured[step] = heldout_loss(model, documents[40:], 1000), weights

    settings = config()
    settings = replace(settings, training=replace(settings.training, checkpoints=(2, 4)))
    trainer = Trainer(model, documents[:40], settings, tmp_path, SINGLE_PROCESS, steering=STEERING)
    train(trainer, Hooks(checkpoint=checkpoint))
    for loss, weights in measured.values():
        fresh = adapted(hf_model(), dtype=torch.float32)
        fresh.load_state_dict(weights, strict=False)
        assert heldout_loss(fresh, documents[40:], 1000) == loss
    # The control: a steered pass over these rows has another loss.
    pack = pack_documents(documents[40:])
    states = model(pack, taps=steering_taps(STEERING, model))[pack.supervised]
    steered = F.cross_entropy(model.lm_head(states), pack.targets[pack.supervised]).item()
    assert abs(steered - measured[4][0]) > 1e-2
