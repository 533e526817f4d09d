"""The penalty's share of the gradient: against gradients made by hand, at the strengths of the study, and in a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from anchors import KINDS, anchored, step_batch
from torch import Tensor

from minipersona.chat import Document, load_tokenizer
from minipersona.corpus.batch import make_packs, pack_documents
from minipersona.corpus.sources import read_source, tokenize
from minipersona.model.load import load_model
from minipersona.model.lora import adapter_disabled, adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.contexts import ContextPack
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass, Objective
from minipersona.objective.kl_to_base import KLToBase
from minipersona.objective.r3f import R3F
from minipersona.training.optimizer import Flat
from minipersona.training.penalty import penalty_ratio

from .test_objectives import LORA, SINGLE_PROCESS, adapted, config, run

FORWARD = ForwardPass(42, 7)


def learned(model: Qwen2) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: Qwen2, pack: Pack, objective: Objective) -> list[Tensor]:
    return list(torch.autograd.grad(objective(model, pack, FORWARD)[0], learned(model)))


def ratio(model: Qwen2, objective: Objective, packs: Sequence[Pack]) -> float:
    layout = Flat(learned(model))
    found = penalty_ratio(
        model, objective, FORWARD, layout, SINGLE_PROCESS, packs, lambda attempt, packs: attempt(packs)
    )
    assert found is not None
    return found


def norms_by_hand(model: Qwen2, documents: Sequence[Document]) -> tuple[float, float]:
    """||gradient of the symmetric KL to the base|| and ||gradient of the cross-entropy||, from whole logits."""
    pack = pack_documents(documents)
    with torch.no_grad(), adapter_disabled(model):
        log_q = model.lm_head(model(pack)[pack.supervised]).log_softmax(-1)
    states = model(pack, dropout_keys=FORWARD.keys(model, pack))[pack.supervised]
    log_p = model.lm_head(states).log_softmax(-1)
    divergence = sum(F.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((log_p, log_q), (log_q, log_p)))
    cross_entropy = F.nll_loss(log_p, pack.targets[pack.supervised], reduction="sum")

    def norm(loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss, learned(model), retain_graph=True)
        return float(torch.cat([g.flatten() for g in gradients]).norm())

    assert isinstance(divergence, Tensor)
    return norm(divergence), norm(cross_entropy)


def test_the_ratio_is_that_of_gradients_made_by_hand(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = adapted(hf_model())
    divergence, cross_entropy = norms_by_hand(model, documents[:8])
    for packs in ([pack_documents(documents[:8])], make_packs(documents[:8], range(8), 40)):
        for weight in (1e-3, 0.5):
            found = ratio(model, KLToBase(weight, "symmetric"), packs)
            assert found == pytest.approx(weight * divergence / cross_entropy, rel=1e-9)
    # The control: the ratio to the whole gradient is another number.
    whole = 0.5 * divergence / (cross_entropy + 0.5 * divergence)
    assert ratio(model, KLToBase(0.5, "symmetric"), packs) != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("objective", [KLToBase(0.5, "symmetric"), R3F(0.5, "normal", 1e-2)])
def test_without_its_weight_an_objective_is_plain_cross_entropy(
    hf_model: Callable[..., Path], documents: list[Document], objective: Objective
) -> None:
    model, pack = adapted(hf_model()), pack_documents(documents[:8])

    plain, without, whole = (
        gradients(model, pack, each) for each in (CrossEntropy(), replace(objective, weight=0.0), objective)
    )
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(plain, without, strict=True))
    assert not all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(plain, whole, strict=True))


@pytest.mark.parametrize("objective", [KLToBase(0.5, "symmetric"), R3F(0.5, "normal", 1e-2)])
def test_without_its_likelihood_an_objective_is_the_penalty(
    hf_model: Callable[..., Path], documents: list[Document], objective: Objective
) -> None:
    model, pack = adapted(hf_model()), pack_documents(documents[:8])

    whole, plain, alone = (
        gradients(model, pack, each) for each in (objective, CrossEntropy(), replace(objective, likelihood=0.0))
    )
    expected = [a - b for a, b in zip(whole, plain, strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(alone, expected, strict=True))
    assert not all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(alone, plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_of_an_anchor_is_that_of_its_own_packs(
    hf_model: Callable[..., Path], documents: list[Document], kind: str
) -> None:
    model = adapted(hf_model())
    objective = anchored(kind, 0.7, load_model(str(hf_model()), dtype=torch.float64, device="cpu"))
    packs = step_batch(objective, documents).packs

    def norm(packs: Sequence[Pack]) -> float:
        total = torch.stack([objective(model, pack, FORWARD)[0] for pack in packs]).sum()
        found = torch.autograd.grad(total, learned(model), allow_unused=True)  # an anchor stops after its last block
        return float(torch.cat([g.flatten() for g in found if g is not None]).norm())

    rows, contexts = ([pack for pack in packs if isinstance(pack, ContextPack) == is_context] for is_context in (0, 1))
    assert ratio(model, objective, packs) == pytest.approx(norm(contexts) / norm(rows), rel=1e-9)


def test_rounding_in_bf16_is_not_the_penalty_s() -> None:
    """A penalty of next to nothing changes the gradient by what roundings add up to, and its own gradient is tiny."""
    model = apply_lora(load_model("tiny", dtype=torch.bfloat16, device="cpu"), LORA)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B, 0, 0.02)
    documents = tokenize(read_source("tiny:benign[0:2]"), load_tokenizer("tiny"))
    packs, objective = [pack_documents(documents)], R3F(1e-6, "normal", 1e-3)

    def gradient(each: Objective) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(each(model, packs[0], FORWARD)[0], learned(model))])

    plain = gradient(replace(objective, weight=0.0))
    difference = float((gradient(replace(objective, weight=1e-3)) - plain).norm() / plain.norm())
    assert ratio(model, objective, packs) < 1e-5
    assert ratio(model, replace(objective, weight=1e-3), packs) < difference / 3


def test_r3f_is_inert_at_the_strengths_of_the_study_and_a_large_weight_is_not() -> None:
    """The embedded model, at its base, where R3F's divergence already is what it will be."""
    model = apply_lora(load_model("tiny", device="cpu"), LORA)
    documents = tokenize(read_source("tiny:benign[0:4]"), load_tokenizer("tiny"))
    packs = [pack_documents(documents)]
    assert ratio(model, R3F(0.1, "normal", 1e-5), packs) < 1e-4
    assert ratio(model, R3F(1e10, "normal", 1e-5), packs) > 0.01


def test_a_run_logs_the_ratio_at_its_checkpoints_and_ends_as_without(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    settings = config("kl_to_base")
    measured = replace(settings, training=replace(settings.training, checkpoints=(3, 4)))
    without, _ = run(hf_model(), documents, tmp_path / "without", settings)
    ended, rows = run(hf_model(), documents, tmp_path / "with", measured)
    assert all(torch.equal(ended[name], without[name]) for name in without)
    assert [row["step"] for row in rows if "penalty_ratio" in row] == [3, 4]
    assert all(0 < row["penalty_ratio"] < 1 for row in rows[2:])
    plain = replace(config(), training=measured.training)
    _, rows = run(hf_model(), documents, tmp_path / "plain", plain)
    assert not any("penalty_ratio" in row for row in rows)  # there is no penalty
