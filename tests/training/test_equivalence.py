"""What must not matter: packing, chunks, micro-batches, recomputation. Dropout is on unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, RunConfig, TrainingSection
from minipersona.corpus.batch import make_packs, pack_documents
from minipersona.model.dropout import token_keys
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2, Tap
from minipersona.objective import head
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass, Objective
from minipersona.objective.kl_to_base import KLToBase
from minipersona.objective.r3f import R3F
from minipersona.training import loop as loop_module
from minipersona.training.distributed import Distributed
from minipersona.training.loop import Hooks, Trainer, backward, steering_taps, train

CONFIG = RunConfig(
    data=DataSection("-", "-"),
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
    training=TrainingSection(steps=3, batch=16, checkpoints=(), learning_rate=1e-2),
    execution=ExecutionSection(checkpoint_activations=False),
)
BOUNDS = pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": CrossEntropy(),
    "kl_to_base": KLToBase(0.3, "symmetric"),
    "r3f": R3F(0.3, "normal", 1e-2),
}
EACH_OBJECTIVE = pytest.mark.parametrize("kind", OBJECTIVES)
SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))


def adapted(directory: Path, dtype: torch.dtype) -> Qwen2:
    model = apply_lora(load_model(str(directory), dtype=dtype, device="cpu"), CONFIG.lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.1, generator=generator)
    return model


def gradients(model: Qwen2) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


def step_gradients(
    directory: Path, documents: Sequence[Document], dtype: torch.dtype, pack_tokens: int, kind: str = "cross_entropy"
) -> list[Tensor]:
    """Summed terms and gradients of one steered step over the documents, cut into packs."""
    model = adapted(directory, dtype)
    run = ForwardPass(42, 7, steering_taps({1: torch.linspace(-1, 1, 48)}, model))
    packs = make_packs(documents, range(len(documents)), pack_tokens)
    terms = [backward(model, pack, OBJECTIVES[kind], run) for pack in packs]
    return [torch.stack(terms).sum(0), *gradients(model)]


@EACH_OBJECTIVE
@BOUNDS
def test_packed_equals_one_document_at_a_time(
    hf_model: Callable[..., Path], documents: list[Document], dtype: torch.dtype, bound: float, kind: str
) -> None:
    together = step_gradients(hf_model(), documents[:16], dtype, 10_000, kind)
    alone = step_gradients(hf_model(), documents[:16], dtype, 1, kind)
    quarters = step_gradients(hf_model(), documents[:16], dtype, 60, kind)
    assert len(together) == 1 + 42
    for a, b, c in zip(together, alone, quarters, strict=True):
        assert relative_error(a, b) < bound
        assert relative_error(c, b) < bound


def test_control_dropout_that_hangs_on_the_pack_fails(
    hf_model: Callable[..., Path], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If masks followed the place in the pack and not the document, packing would change the result."""
    by_place = lambda seed, step, pack: token_keys(seed, step, replace(pack, documents=pack.documents * 0))  # noqa: E731
    together = step_gradients(hf_model(), documents[:16], torch.float64, 10_000)
    monkeypatch.setattr(head, "token_keys", by_place)
    assert relative_error(step_gradients(hf_model(), documents[:16], torch.float64, 10_000)[1], together[1]) > 1e-3


def test_control_documents_that_see_each_other_fail(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = adapted(hf_model(), torch.float64)
    pack = pack_documents(documents[:4])
    merged = replace(pack, boundaries=pack.boundaries[[0, -1]], longest=pack.tokens)
    assert relative_error(model(merged), model(pack)) > 1e-3


@BOUNDS
def test_micro_batches_do_not_matter_over_whole_steps(
    hf_model: Callable[..., Path], documents: list[Document], dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    """1 x 16, about 4 x 4 and 16 x 1: the same weights after three updates."""
    ends = []
    for pack_tokens in (10_000, 60, 1):
        model = load_model(str(hf_model()), dtype=dtype, device="cpu")
        config = replace(CONFIG, execution=replace(CONFIG.execution, pack_tokens=pack_tokens))
        train(Trainer(model, documents, config, tmp_path / str(pack_tokens), SINGLE_PROCESS))
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in ends[0].items():
        slack = 1 if dtype == torch.float64 else 10  # Adam divides by sqrt(v), so rounding in small gradients grows
        assert relative_error(ends[1][name], expected) < slack * bound
        assert relative_error(ends[2][name], expected) < slack * bound


@EACH_OBJECTIVE
def test_the_plain_path_does_not_matter_over_whole_steps(
    hf_model: Callable[..., Path],
    documents: list[Document],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """execution.fused = false: the same weights after three updates.

    In fp64: at the first step A's gradients are zero but for rounding, and Adam makes that a full update. Single
    passes are compared in fp32 too, with B randomised (`tests/model/test_plain_path.py`).
    """
    monkeypatch.setattr(loop_module, "make_objective", lambda *_: OBJECTIVES[kind])

    def end(fused: bool, seed: int = 42) -> list[Tensor]:
        model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
        model.fused = fused
        train(Trainer(model, documents, replace(CONFIG, seed=seed), tmp_path / f"{fused}-{seed}", SINGLE_PROCESS))
        return [p.detach() for p in model.parameters() if p.requires_grad]

    plain, fused = end(False), end(True)
    assert max(map(relative_error, plain, fused)) < 1e-10
    assert max(map(relative_error, end(False, seed=43), fused)) > 1e-2  # the control


def test_control_a_mean_of_means_fails(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    """Averaging the packs' mean losses is another objective where packs differ in supervised tokens."""
    model = adapted(hf_model(), torch.float64)
    packs = make_packs(documents, range(16), 60)
    sums = torch.stack([backward(model, pack, CrossEntropy(), ForwardPass(42, 7))[0] for pack in packs])
    counts = torch.tensor([pack.supervised.numel() for pack in packs])
    assert abs(float((sums / counts).mean() / (sums.sum() / counts.sum())) - 1) > 1e-4


def run_step(
    model: Qwen2, documents: Sequence[Document], kind: str, checkpoint: bool, taps: dict[int, Tap]
) -> list[Tensor]:
    for p in model.parameters():
        p.grad = None
    run = ForwardPass(42, 5, taps, checkpoint_activations=checkpoint)
    return [backward(model, pack_documents(documents), OBJECTIVES[kind], run), *gradients(model)]


@EACH_OBJECTIVE
@pytest.mark.parametrize("full", [False, True])
def test_checkpointing_changes_no_bit(
    hf_model: Callable[..., Path], documents: list[Document], full: bool, kind: str
) -> None:
    """With dropout, steering and R3F's noise; for adapters and for all weights."""
    model = (
        load_model(str(hf_model()), device="cpu").requires_grad_(True) if full else adapted(hf_model(), torch.float32)
    )
    vector = torch.linspace(-1, 1, 48)
    taps: dict[int, Tap] = {1: lambda h: h + 5.0 * vector, 0: lambda h: h * 1.01}
    plain = run_step(model, documents[:8], kind, False, taps)
    again = run_step(model, documents[:8], kind, True, taps)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    # The control: a tap that is gone in one of the two is seen.
    other = run_step(model, documents[:8], kind, True, {})
    assert not torch.equal(other[0], plain[0])


def test_checkpointing_changes_no_bit_of_a_run(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    losses = []
    for checkpoint in (False, True):
        config = replace(CONFIG, execution=replace(CONFIG.execution, checkpoint_activations=checkpoint))
        rows: list[dict] = []
        model = load_model(str(hf_model()), device="cpu")
        train(Trainer(model, documents, config, tmp_path / str(checkpoint), SINGLE_PROCESS), Hooks(logged=rows.append))
        losses.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert losses[0] == losses[1]
