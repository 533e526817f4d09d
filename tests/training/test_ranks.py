"""Two processes equal one: gloo, unequal packs, dropout and R3F's noise on, and a rank without work.

torchrun starts the two of plain cross-entropy, and a server that has torch imported forks the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file

from minipersona.files import read_jsonl

from .rank_workers import DOCUMENTS, forked_ranks, torchrun

WORKER = (
    """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import save_file
from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, ObjectiveSection, RunConfig, TrainingSection
from minipersona.model.load import load_model
from minipersona.objective.contexts import Contexts, base_states
from minipersona.objective.feature_anchor import scales
from minipersona.training import loop
from minipersona.training.loop import Trainer, train
from minipersona.training.distributed import join_process_group, leave_process_group

torch.set_num_threads(1)
model_dir, out, batch, dtype, broken, kind = sys.argv[1:]
"""
    + DOCUMENTS
    + """config = RunConfig(
    data=DataSection("-", "-"),
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
    training=TrainingSection(steps=3, batch=int(batch), checkpoints=(2,), learning_rate=1e-2),
    objective=ObjectiveSection(kind, 0.5 * (kind != "cross_entropy"), epsilon=1e-2 * (kind == "r3f")),
    execution=ExecutionSection(pack_tokens=60),
)
distributed = join_process_group("cpu")
if broken == "broken":
    real = loop.make_batch
    # Every rank takes every document.
    loop.make_batch = lambda documents, rows, tokens, rank, size, sharded: real(documents, rows, tokens, 0, 1)
model = load_model(model_dir, dtype=getattr(torch, dtype), device="cpu")
contexts = None
if config.objective.anchored:  # 4 personas at 6 questions, 9 prompts or 2 questions a step
    ids = [document.ids[:9] for document in documents[:24]]
    contexts = Contexts(ids, 4, 9, 42, by_question=kind == "gram_anchor")
    states = base_states(model, contexts, (0, 1), 3, 60)
    contexts = replace(contexts, base=states, scale=scales(states, "state"))
train(Trainer(model, documents, config, Path(out), distributed, contexts=contexts))
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
save_file({n: p.detach() for n, p in trained.items()}, f"{out}/end-{distributed.rank}.safetensors")
if distributed.first:
    save_file({n: p.grad for n, p in trained.items()}, f"{out}/gradients.safetensors")  # of the last step
leave_process_group()
"""
)


def run(
    model: Path, out: Path, ranks: int, batch: int, dtype: str, broken: str = "", kind: str = "cross_entropy"
) -> dict[str, torch.Tensor]:
    out.mkdir()
    arguments = [str(model), str(out), str(batch), dtype, broken or "whole", kind]
    if (ranks, batch, broken, kind) != (2, 16, "", "cross_entropy"):
        ends = forked_ranks(WORKER, out, arguments, ranks)
        assert not any(end.code for end in ends), ends
    else:
        script = out / "worker.py"
        script.write_text(WORKER)
        assert torchrun([str(script), *arguments], fault=script).code == 0
    trained = [load_file(out / f"end-{rank}.safetensors") for rank in range(ranks)]
    for end in trained[1:]:
        assert all(torch.equal(end[name], trained[0][name]) for name in end)  # ranks stay in step
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3  # and one of them writes
    return trained[0]


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    "kind, dtype, bound",
    [
        ("cross_entropy", "float64", 1e-10),
        pytest.param("cross_entropy", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("r3f", "float64", 1e-10, marks=pytest.mark.slow),
        ("feature_anchor", "float64", 1e-10),
        pytest.param("gram_anchor", "float64", 1e-10, marks=pytest.mark.slow),
        pytest.param("kl_on_prompts", "float64", 1e-10, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(
    hf_model: Callable[..., Path], tmp_path: Path, kind: str, dtype: str, bound: float
) -> None:
    one = run(hf_model(), tmp_path / "one", 1, 16, dtype, kind=kind)
    two = run(hf_model(), tmp_path / "two", 2, 16, dtype, kind=kind)
    gradients = [load_file(tmp_path / name / "gradients.safetensors") for name in ("one", "two")]
    slack = 1 if dtype == "float64" else 10  # Adam divides by sqrt(v), so rounding in small gradients grows
    assert worst(two, one) < slack * bound
    assert worst(gradients[1], gradients[0]) < slack * bound
    records = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for a, b in zip(*records, strict=True):
        for name in ("loss", "cross_entropy", "grad_norm", *(["kl"] if kind == "r3f" else [])):
            assert abs(a[name] / b[name] - 1) < bound, name
    if kind == "r3f":  # at the checkpoint, over the packs of both ranks
        assert [row["step"] for row in records[0] if "penalty_ratio" in row] == [2]
        assert abs(records[1][1]["penalty_ratio"] / records[0][1]["penalty_ratio"] - 1) < 1e-6
    if "anchor" in a:  # which is rounding before the first update that changes anything
        assert abs(a["anchor"] / b["anchor"] - 1) < bound and a["anchor"] > 1e-5


def test_a_rank_without_documents_waits_and_agrees(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    one = run(hf_model(), tmp_path / "one", 1, 1, "float64")
    two = run(hf_model(), tmp_path / "two", 2, 1, "float64")
    assert worst(two, one) < 1e-8


def test_control_documents_counted_twice_fail(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    one = run(hf_model(), tmp_path / "one", 1, 16, "float64")
    two = run(hf_model(), tmp_path / "two", 2, 16, "float64", "broken")
    assert worst(two, one) > 1e-3
