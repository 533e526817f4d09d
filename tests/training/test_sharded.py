"""Full parameters sharded over two ranks (FSDP2 over gloo) equal one rank's, also across a kill and a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file, save_file
from torch import nn

from minipersona.config import DataSection, RunConfig, TrainingSection
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.model.tensor_file import open_safetensors
from minipersona.training import checkpoint, sharding
from minipersona.training.checkpoint import load_state
from minipersona.training.distributed import Distributed
from minipersona.training.optimizer import AdamW, Flat

from .rank_workers import DOCUMENTS, forked_ranks

CPU = torch.device("cpu")

WORKER = (
    """
import os, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import save_file
from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, ProbeSection, RunConfig, TrainingSection
from minipersona.model.load import load_model
from minipersona.model.pack import make_pack
from minipersona.model.save import whole
from minipersona.training import sharding
from minipersona.training.sharding import Shards
from minipersona.training.loop import Hooks, Trainer, train
from minipersona.training.parameters import distance_from_base, save_checkpoint
from minipersona.training.distributed import end_rank, join_process_group, leave_process_group

torch.set_num_threads(1)
model_dir, out, batch, dtype, case = sys.argv[1:]
"""
    + DOCUMENTS
    + """config = RunConfig(
    data=DataSection("-", "-"),
    training=TrainingSection(method="full", steps=4, batch=int(batch), checkpoints=(2,), learning_rate=1e-3),
    probe=ProbeSection(layers=(1,)),
    execution=ExecutionSection(pack_tokens=60, save_minutes=0),
)
distributed = join_process_group("cpu")
if case == "untaught":  # most rows, and so most steps of one row, teach nothing
    documents = [d if i % 3 == 0 else replace(d, supervised=d.supervised & False) for i, d in enumerate(documents)]
if case == "averaged":
    real = sharding.shard
    def shard(model, distributed, stop):
        real(model, distributed, stop)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(float(distributed.size))  # as FSDP2 does unless told otherwise
    import minipersona.training.parameters as parameters
    parameters.shard = shard
if case == "rounded":
    from torch.distributed import fsdp
    real_shard = fsdp.fully_shard
    def fully_shard(module, **given):  # with a block's matrices its norms
        real_shard(module, **{k: v for k, v in given.items() if k != "ignored_params" or "mp_policy" not in given})
    fsdp.fully_shard = fully_shard
model = load_model(model_dir, dtype=getattr(torch, dtype), device="cpu")

def logged(row):
    if case == "killed" and row["step"] == 3:
        os._exit(1)

def checkpoint(step):
    save_checkpoint(model, config, Path(out) / f"step-{step}", [], (), distributed)
    with torch.no_grad():
        stream = model(make_pack([documents[0].ids]), stop_after=1)
    if distributed.size > 1:
        try:
            model(make_pack([documents[0].ids]), stop_after=0)
        except AssertionError as error:
            assert "gathered" in str(error)
        else:
            raise AssertionError("a pass ended where a group would stay gathered")
    gathered = [p for p in model.model.layers.parameters() if p.ndim > 1 and not sharding.is_dtensor(p)]
    assert distributed.size == 1 or not gathered, "a pass that ended early has left something gathered"
    distance = distance_from_base(model, config, distributed)
    if distributed.first:
        (Path(out) / "distance").write_text(repr(distance))
        save_file({"stream": stream}, f"{out}/stream.safetensors")

train(Trainer(model, documents, config, Path(out), distributed), Hooks(logged=logged, checkpoint=checkpoint))
learned = {n: p for n, p in model.named_parameters()}
ends = {n: whole(p).clone() for n, p in learned.items()}
gradients = {n: whole(p.grad).clone() for n, p in learned.items() if p.grad is not None}
if distributed.size > 1 and case != "rounded":  # the optimizer is called for a block at a time, not for every weight
    calls = list(Shards(list(learned.values()), distributed).update_groups())
    assert len(calls) <= model.config.num_hidden_layers + 3 < len(learned), len(calls)  # vectors, embedding, head
several = distributed.size > 1
kept = sum(sharding.share_of(p.detach(), distributed).numel() if several else p.numel() for p in learned.values())
if distributed.first:
    save_file(ends, f"{out}/end.safetensors")
    save_file(gradients, f"{out}/gradients.safetensors")
(Path(out) / f"kept-{distributed.rank}").write_text(str(kept))
leave_process_group()
end_rank()
"""
)


def run(model: Path, out: Path, ranks: int, batch: int = 16, dtype: str = "float64", case: str = "whole") -> None:
    """Train as so many ranks."""
    out.mkdir(exist_ok=True)
    ends = forked_ranks(WORKER, out, [str(model), str(out), str(batch), dtype, case], ranks)
    if case == "killed":
        assert all(end.code for end in ends)
        return
    assert not any(end.code for end in ends), ends
    elements = sum(tensor.numel() for tensor in load_file(out / "end.safetensors").values())
    assert sum(int(file.read_text()) for file in out.glob("kept-*")) == elements  # nothing is kept twice


@pytest.fixture(scope="module")
def undisturbed(hf_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The directory of a run by so many ranks."""
    made: dict[int, Path] = {}

    def make(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"ranks-{ranks}")
            run(hf_model(), made[ranks], ranks)
        return made[ranks]

    return make


def worst(a: Path, b: Path, name: str) -> float:
    mine, theirs = load_file(a / name), load_file(b / name)
    assert mine.keys() == theirs.keys()
    return max(relative_error(mine[key], theirs[key]) for key in theirs)


def agree(two: Path, one: Path, bound: float, slack: float) -> None:
    assert worst(two, one, "gradients.safetensors") < slack * bound
    assert worst(two, one, "end.safetensors") < slack * bound
    assert worst(two / "step-2", one / "step-2", "model.safetensors") < slack * bound
    assert worst(two, one, "stream.safetensors") < slack * bound
    distances = [float((out / "distance").read_text()) for out in (one, two)]
    assert distances[0] > 0 and abs(distances[1] / distances[0] - 1) < slack * bound
    for a, b in zip(*(read_jsonl(out / "metrics.jsonl") for out in (two, one)), strict=True):
        assert all(abs(a[name] / b[name] - 1) < bound for name in ("loss", "grad_norm"))


def test_steps_that_teach_nothing_are_skipped(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        run(hf_model(), tmp_path / name, ranks, batch=1, case="untaught")
    rows = read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert 0 < sum("skipped" in row for row in rows) < len(rows) == 4
    assert worst(tmp_path / "two", tmp_path / "one", "end.safetensors") < 1e-10


def test_shards_equal_the_whole(undisturbed: Callable[[int], Path]) -> None:
    agree(undisturbed(2), undisturbed(1), 1e-10, 1)


@pytest.mark.slow
def test_shards_equal_the_whole_in_fp32_with_a_tied_head(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    for ranks, name in ((1, "one"), (2, "two")):
        run(hf_model(tied=True), tmp_path / name, ranks, dtype="float32")
    # Adam divides by sqrt(v), so rounding in small gradients grows.
    agree(tmp_path / "two", tmp_path / "one", 1e-5, 10)


def test_control_averaged_gradients_are_not_the_sum(
    hf_model: Callable[..., Path], tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    run(hf_model(), tmp_path / "averaged", 2, case="averaged")
    first = [read_jsonl(out / "metrics.jsonl")[0]["grad_norm"] for out in (tmp_path / "averaged", undisturbed(1))]
    assert first[0] / first[1] < 0.9  # clipping would hide it in the weights


def test_no_group_reaches_over_the_block_after_which_a_pass_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [nn.Linear(9, 1) for _ in range(10)]  # 10 elements each
    monkeypatch.setattr(sharding, "GROUP", 40)
    for stop, sizes in ((9, [4, 4, 2]), (7, [4, 4, 2]), (4, [4, 1, 4, 1]), (0, [1, 4, 4, 1])):
        made = sharding.groups(blocks, stop)
        assert [len(group) for group in made] == sizes
        assert [block for group in made for block in group] == blocks
    monkeypatch.setattr(sharding, "GROUP", 4)
    assert [len(group) for group in sharding.groups(blocks, 3)] == [1] * 10


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_are_dealt_as_torch_chunk_deals_them(rows: int, ranks: int) -> None:
    """FSDP2's deal, with shares that are smaller or empty at the end."""
    dealt = [torch.arange(rows)[sharding.own_rows(rows, Distributed(r, ranks, CPU))].tolist() for r in range(ranks)]
    expected = [chunk.tolist() for chunk in torch.arange(rows).chunk(ranks)]
    assert dealt == expected + [[]] * (ranks - len(expected))


@pytest.mark.parametrize(
    "method, ranks, sharded", [("full", 2, True), ("full", 1, False), ("lora", 2, False), ("lora", 1, False)]
)
def test_weights_are_sharded_where_all_of_them_learn_on_several_ranks(method: Any, ranks: int, sharded: bool) -> None:
    config = RunConfig(data=DataSection("-", "-"), training=TrainingSection(method=method))
    assert sharding.is_sharded(config, Distributed(0, ranks, CPU)) is sharded


def test_a_rank_without_documents_goes_through_the_model_all_the_same(
    hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    run(hf_model(), tmp_path / "one", 1, batch=1)
    run(hf_model(), tmp_path / "two", 2, batch=1)
    assert worst(tmp_path / "two", tmp_path / "one", "end.safetensors") < 1e-8


def test_in_bf16_nothing_is_rounded_that_one_rank_would_not_round(
    hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    # Steps of one row, so that one of the ranks computes what a single one does, and the other adds zeros.
    for name, ranks, case in (("one", 1, "whole"), ("two", 2, "whole"), ("rounded", 2, "rounded")):
        run(hf_model(), tmp_path / name, ranks, batch=1, dtype="bfloat16", case=case)
    losses = {name: [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")}
    assert losses["one"] == losses["two"]
    assert worst(tmp_path / "two", tmp_path / "one", "end.safetensors") < 1e-6
    assert (
        worst(tmp_path / "rounded", tmp_path / "one", "end.safetensors") > 1e-3
    )  # control: with norms gathered as bf16


@pytest.mark.parametrize(
    "before, after", [(2, 2), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_killed_and_continued_by_any_number_of_ranks(
    hf_model: Callable[..., Path], tmp_path: Path, undisturbed: Callable[[int], Path], before: int, after: int
) -> None:
    run(hf_model(), tmp_path, before, case="killed")
    state = sorted(file.name for file in (tmp_path / "latest").glob("*.safetensors"))
    shards = [f"state-000002.{rank}-of-{before}.safetensors" for rank in range(1, before + 1)]
    assert state == (["state.safetensors"] if before == 1 else shards)
    run(hf_model(), tmp_path, after)
    ends = [load_file(out / "end.safetensors") for out in (tmp_path, undisturbed(after))]
    if before == after:
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    else:  # sums over another number of ranks round differently
        assert worst(tmp_path, undisturbed(after), "end.safetensors") < 1e-8
    assert not list((tmp_path / "latest").glob("*.safetensors"))  # dropped once the run was done


# ---------------------------------------------------------------- parts that do not make a whole

WORDS = {"step": 2, "updates": 2, "done": False}


def parts(directory: Path, save: int = 7) -> tuple[Path, Path, Callable[[], torch.Tensor]]:
    """A checkpoint of two ranks, and what restores it: the weight (4, 2) that it holds."""
    latest = directory / "latest"
    latest.mkdir(parents=True)
    (latest / "state.json").write_text(json.dumps({**WORDS, "files": 2, "save": save}))
    files = [latest / f"state-000002.{part}-of-2.safetensors" for part in (1, 2)]
    for part, file in enumerate(files, 1):
        tensors = {f"{kind}.w": torch.full((2, 2), float(part)) for kind in ("weight", "first", "second")}
        words = {**WORDS, "part": part, "files": 2, "save": save}
        save_file({"rng.cpu": torch.get_rng_state(), **tensors}, file, {"state": json.dumps(words)})

    def restore() -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(4, 2))
        optimizer = AdamW(Flat([weight]), 0.9, 0.999, 1e-8, 0.0)
        assert load_state(directory, {"w": weight}, optimizer).step == 2
        return weight.detach()

    return *files, restore


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (3, 2, 0), (0, 4, 1)])
def test_any_rows_are_read_from_the_files_that_hold_them(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    whole = torch.arange(10.0).view(5, 2)
    for part, rows in enumerate(whole.split(sizes)):
        save_file({"w": rows.contiguous()}, tmp_path / f"{part}.safetensors")
    with ExitStack() as stack:
        handles = [stack.enter_context(open_safetensors(file)) for file in sorted(tmp_path.iterdir())]
        for start in range(6):
            for stop in range(start, 6):  # a rank beyond the rows stores none
                assert torch.equal(checkpoint._rows(handles, "w", slice(start, stop)), whole[start:stop])


def test_parts_make_the_whole(tmp_path: Path) -> None:
    assert parts(tmp_path)[2]()[:, 0].tolist() == [1, 1, 2, 2]


def test_a_part_that_is_missing_swapped_doubled_or_another_checkpoints_is_an_error(tmp_path: Path) -> None:
    def damaged(name: str, damage: Callable[[Path, Path], object], said: str) -> None:
        one, two, restore = parts(tmp_path / name)
        damage(one, two)
        with pytest.raises(
            UserError, match=rf"latest/{said}.*; put the right file there, or delete .*/latest to start"
        ):
            restore()

    another = parts(tmp_path / "another", save=8)[1]
    missing, none = (
        r"state-000002\.2-of-2\.safetensors: this part of the checkpoint is missing",
        "is not the part of the",
    )
    damaged("missing", lambda one, two: two.unlink(), missing)
    damaged("swapped", lambda one, two: (one.rename(one.parent / "x"), two.rename(one), (one.parent / "x").rename(two)),
            rf"state-000002\.1-of-2\.safetensors: {none}")  # fmt: skip
    damaged("doubled", lambda one, two: shutil.copy(one, two), rf"state-000002\.2-of-2\.safetensors: {none}")
    damaged("other", lambda one, two: shutil.copy(another, two), rf"state-000002\.2-of-2\.safetensors: {none}")
    damaged("unnamed", lambda one, two: (one.parent / "state.json").unlink(), r"state\.json: is missing")


@pytest.mark.parametrize("changed", [{"files": -2}, {"files": "2"}, {"files": True}, {"files": 99_999}, {"step": -1},
                                     {"save": None}])  # fmt: skip
def test_words_that_name_no_checkpoint_are_an_error(tmp_path: Path, changed: dict[str, object]) -> None:
    one, _, restore = parts(tmp_path)
    (one.parent / "state.json").write_text(json.dumps({**WORDS, "files": 2, "save": 7, **changed}))
    with pytest.raises(UserError, match=r"state\.json: is not a run's state; delete"):
        restore()
