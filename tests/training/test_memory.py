"""Where memory runs out in the midst of a backward pass, the run ends where it would have ended with enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, ObjectiveSection, RunConfig, TrainingSection
from minipersona.corpus.batch import pack_documents
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.model.load import load_model
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.training import loop
from minipersona.training.distributed import Distributed
from minipersona.training.heldout import heldout_loss
from minipersona.training.loop import Trainer, train
from minipersona.training.memory import Budget, cut

SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))


class _Exhausted(torch.autograd.Function):
    """The identity, whose backward pass finds no memory."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, slope: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def config(kind: str = "cross_entropy") -> RunConfig:
    return RunConfig(
        data=DataSection("-", "-"),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
        training=TrainingSection(steps=5, batch=12, checkpoints=(5,), learning_rate=1e-2),
        objective=ObjectiveSection(kind, 0.5, epsilon=1e-2) if kind == "r3f" else ObjectiveSection(),  # type: ignore[arg-type]
        execution=ExecutionSection(pack_tokens=400, checkpoint_activations=False),
    )


def run(
    directory: Path, documents: list[Document], out: Path, settings: RunConfig, room: int | None = None
) -> dict[str, torch.Tensor]:
    """Train with memory for `room` tokens a pass: a larger one fails half-way down the blocks, with the upper blocks'
    gradients added."""
    model = load_model(str(directory), dtype=torch.float64, device="cpu")
    real = Qwen2.forward

    def forward(self: Qwen2, pack: Pack, **more: object) -> torch.Tensor:
        if room is not None and pack.tokens > room and torch.is_grad_enabled():
            more["taps"] = {**more["taps"], 0: _Exhausted.apply}  # type: ignore[dict-item]
        return real(self, pack, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2, "forward", forward)
        train(Trainer(model, documents, settings, out, SINGLE_PROCESS))
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(relative_error(a[name], b[name]) for name in b)


@pytest.mark.parametrize("kind, room", [("cross_entropy", 90), ("cross_entropy", 25), ("r3f", 120)])
def test_smaller_packs_give_the_same_result(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, kind: str, room: int
) -> None:
    whole = run(hf_model(), documents, tmp_path / "whole", config(kind))
    short = run(hf_model(), documents, tmp_path / "short", config(kind), room)
    assert worst(short, whole) < 1e-8  # AdamW divides by sqrt(v), so that rounding grows
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "short")]
    for a, b in zip(*rows, strict=True):
        assert abs(a["loss"] / b["loss"] - 1) < 1e-10 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-9
    assert not any("out_of_memory" in row for row in rows[0])
    retried = [row["step"] for row in rows[1] if "out_of_memory" in row]
    assert retried[0] == 1 and len(retried) <= 2  # remembered: the packs of later steps are small from the start


def test_control_gradients_of_a_failed_attempt_counted_too_end_elsewhere(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(hf_model(), documents, tmp_path / "whole", config())
    real, seen = loop.accumulate, set()

    def forgetful(model, objective, forward, layout, packs, **more) -> torch.Tensor:
        again = forward.step in seen
        seen.add(forward.step)
        return real(model, objective, forward, _Kept() if again else layout, packs, **more)

    class _Kept:
        def zero(self) -> None:
            pass

    monkeypatch.setattr(loop, "accumulate", forgetful)
    assert worst(run(hf_model(), documents, tmp_path / "short", config(), 90), whole) > 1e-3


def test_a_row_that_does_not_fit_alone_is_an_error_with_its_mends(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    longest = max(map(len, documents))
    with pytest.raises(UserError, match=r"out of memory on single rows, of up to \d+ tokens; set execution.checkpoint"):
        run(hf_model(), documents, tmp_path / "short", config(), longest - 1)


def test_heldout_loss_is_measured_in_smaller_packs(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    expected = heldout_loss(model, documents, 400)
    real, refused = Qwen2.forward, []

    def forward(self: Qwen2, pack: Pack, **more: object) -> torch.Tensor:
        if pack.tokens > 100:
            refused.append(pack.tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pack, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2, "forward", forward)
        assert abs(heldout_loss(model, documents, 400) / expected - 1) < 1e-12
    assert refused


# ---------------------------------------------------------------- cutting packs


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 120))
@settings(max_examples=80, deadline=None)
def test_pieces_of_a_pack_are_the_packs_of_its_documents(lengths: list[int], most: int) -> None:
    rng = np.random.default_rng(sum(lengths))
    documents = [
        Document(rng.integers(0, 99, n).astype(np.int32), (rng.random(n) > 0.5) & (np.arange(n) > 0), False)
        for n in lengths
    ]
    rows = list(range(100, 100 + len(lengths)))
    pieces = cut(pack_documents(documents, rows), most)
    assert [row for piece in pieces for row in piece.documents.tolist()] == rows
    for piece in pieces:
        names = piece.documents.tolist()
        made = pack_documents([documents[name - 100] for name in names], names)
        assert piece.tokens <= most or len(names) == 1
        assert piece.longest == made.longest
        for field in ("ids", "positions", "targets", "supervised", "boundaries", "documents"):
            mine, theirs = getattr(piece, field), getattr(made, field)
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype, field


def test_the_budget_halves_until_it_fits_and_stays_there() -> None:
    documents = [Document(np.arange(10, dtype=np.int32), np.arange(10) > 0, False)] * 8
    budget = Budget(1000)

    def attempt(packs: Sequence[Pack]) -> list[int]:
        if max(pack.tokens for pack in packs) > 25:
            raise torch.OutOfMemoryError
        return [pack.tokens for pack in packs]

    assert budget.fit(attempt, [pack_documents(documents)]) == [20] * 4
    assert (budget.tokens, budget.halvings) == (20, 2)
