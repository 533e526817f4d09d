"""Cells: what their names stand for, that exactly one attempt's results count, and where an attempt begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_study import CPU, QUIET, small_study

from minipersona.errors import DiskFull, UserError
from minipersona.files import append_jsonl, read_jsonl, write_json
from minipersona.records import write_record
from minipersona.study import search as search_module
from minipersona.study.cell import identify
from minipersona.study.cells import adopt, publish
from minipersona.study.claims import Claim, Claims
from minipersona.study.recipes import planned
from minipersona.study.runner import Job, Runner
from minipersona.study.search import prepare, search
from minipersona.study_config import STAGES, StudyConfig
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.findings import VerdictKind
from minipersona.verdict.ledger import read_entries
from minipersona.verdict.verdict import Decision


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return small_study(tmp_path)


# ---------------------------------------------------------------- identity


def ids(config: StudyConfig) -> list[str]:
    return [cell.id for cell in identify(planned(config))]


def test_a_cell_s_name_stands_for_all_that_its_numbers_hang_on(config: StudyConfig, tmp_path: Path) -> None:
    before = ids(config)
    assert len(set(before)) == len(before) and before[0].startswith("1-baseline-")
    unchanged = replace(config, exhaustive=False, stop_rule="registered", out=str(tmp_path / "other"))
    assert ids(replace(unchanged, execution=replace(config.execution, pack_tokens=9))) == before

    regularised = ids(replace(config, regularised=replace(config.regularised, beta=(0.2,))))
    assert [a != b for a, b in zip(before, regularised, strict=True)] == [False, True] + [False] * (len(before) - 2)

    questions = Path(config.probe.questions)
    questions.write_text(questions.read_text().replace("?", "??"))
    assert not set(ids(config)) & set(before)


def test_a_changed_data_file_is_another_cell(config: StudyConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    em = replace(config, narrow="em", rehearsal=replace(config.rehearsal, em=f"jsonl:{rows}"))
    before = ids(em)
    rows.write_text(rows.read_text().replace('"b"', '"c"'))
    changed = [a.split("-")[0] for a, b in zip(before, ids(em), strict=True) if a != b]
    assert changed == ["EM", "5A", "5B", "5C", "5C"]
    rows.unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl: no such file"):
        ids(em)


# ---------------------------------------------------------------- attempts and publishing


def test_of_two_attempts_the_first_is_published_and_the_second_changes_nothing(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cell.json").write_text(name)
    target = tmp_path / "cells"
    assert publish(tmp_path / "first", target) and not publish(tmp_path / "second", target)
    assert (target / "cell.json").read_text() == "first" and (tmp_path / "second" / "cell.json").exists()
    os.replace(tmp_path / "second" / "cell.json", target / "cell.json")  # control: replacing files would not have asked
    assert (target / "cell.json").read_text() == "second"
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "gone", tmp_path / "nowhere")


def attempt(path: Path, step: int) -> Path:
    write_json(path / "latest" / "state.json", {"step": step, "updates": step, "done": False})
    (path / "latest" / "state.safetensors").write_text(f"state {step}")
    for row in range(1, step + 1):
        append_jsonl(path / "metrics.jsonl", {"step": row})
    (path / ".metrics.jsonl.abcdefgh.tmp").write_text("torn")
    return path


def test_an_attempt_begins_where_the_furthest_one_stands_and_leaves_it_alone(tmp_path: Path) -> None:
    attempt(tmp_path / "cell-a", 2)
    far = attempt(tmp_path / "cell-b", 5)
    attempt(tmp_path / "other-c", 9)
    mine = tmp_path / "cell-mine"
    assert adopt(tmp_path, "cell", mine) == ["continued at step 5 from an attempt that was interrupted"]
    assert (mine / "latest" / "state.safetensors").read_text() == "state 5"
    assert not list(mine.rglob("*.tmp"))
    # Neither sees what the other writes from now on.
    append_jsonl(mine / "metrics.jsonl", {"step": 6})
    write_json(far / "latest" / "state.json", {"step": 7, "updates": 7, "done": False})
    assert len(read_jsonl(far / "metrics.jsonl")) == 5 and len(read_jsonl(mine / "metrics.jsonl")) == 6
    assert '"step": 5' in (mine / "latest" / "state.json").read_text()
    assert adopt(tmp_path, "cell", mine) == []  # it has begun already
    assert adopt(tmp_path, "fresh", tmp_path / "fresh-mine") == [] and not (tmp_path / "fresh-mine").exists()


# ---------------------------------------------------------------- a runner and its jobs


def runner_of(config: StudyConfig, **more: Any) -> Runner:
    return Runner(config, Path(config.out), identify(planned(config)), CPU, QUIET, **more)


def file_job(directory: Path, name: str, work: Callable[[Claim], None] | None = None) -> Job:
    done = directory / name

    def touch(claim: Claim) -> None:
        done.touch()

    return Job(name, "3", name, done.exists, work or touch)


def test_a_failed_job_is_recorded_and_the_rest_goes_on(config: StudyConfig, tmp_path: Path) -> None:
    tries = []

    def fail(claim: Claim) -> None:
        tries.append(claim.attempt)
        raise UserError("this cannot be done")

    def jobs() -> list[Job]:
        return [file_job(tmp_path, "one"), file_job(tmp_path, "bad", fail), file_job(tmp_path, "two")]

    runner = runner_of(config)
    runner.complete(jobs())
    runner.complete(jobs())
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists() and tries == [1]
    assert runner.failed() == {"bad": "this cannot be done"}
    events = [(entry.cell, entry.event) for entry in read_entries(runner.directory)]
    assert events == [(name, event) for name in ("one", "bad", "two")
                      for event in ("started", "failed" if name == "bad" else "done")]  # fmt: skip
    again = runner_of(config)  # the next command tries it once more
    again.complete(jobs())
    assert tries == [1, 2]


def test_running_out_of_memory_is_a_failure_and_a_defect_is_one_too_but_ends_the_runner(
    config: StudyConfig, tmp_path: Path
) -> None:
    import torch

    def exhausted(claim: Claim) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(claim: Claim) -> None:
        raise ZeroDivisionError("oh")

    runner = runner_of(config)
    runner.complete([file_job(tmp_path, "large", exhausted), file_job(tmp_path, "fine")])
    assert "pack_tokens" in runner.failed()["large"] and (tmp_path / "fine").exists()
    with pytest.raises(ZeroDivisionError):
        runner.complete([file_job(tmp_path, "defect", broken)])
    assert runner.failed()["defect"] == "ZeroDivisionError: oh"


def test_a_full_disk_is_no_verdict_on_a_job_and_the_next_command_does_it(config: StudyConfig, tmp_path: Path) -> None:
    def full(claim: Claim) -> None:
        raise DiskFull("cannot write x: No space left on device")

    runner = runner_of(config)
    with pytest.raises(DiskFull):
        runner.complete([file_job(tmp_path, "large", full), file_job(tmp_path, "next")])
    assert runner.failed() == {} and not (tmp_path / "next").exists()
    again = runner_of(config)
    again.complete([file_job(tmp_path, "large"), file_job(tmp_path, "next")])
    events = [(entry.cell, entry.event, entry.attempt) for entry in read_entries(again.directory)]
    assert events == [("large", "started", 1), ("large", "started", 2), ("large", "done", 2),
                      ("next", "started", 1), ("next", "done", 1)]  # fmt: skip


def test_an_owner_that_wakes_up_after_a_takeover_publishes_nothing(config: StudyConfig, tmp_path: Path) -> None:
    """The first attempt falls silent in its work, a second runner does the job, and then the first goes on."""
    target, runners = tmp_path / "published", [runner_of(config), runner_of(config)]
    runners[0].claims.beat = 60

    def work(name: str) -> Callable[[Claim], None]:
        def publish_own(claim: Claim) -> None:
            private = tmp_path / name
            private.mkdir()
            (private / "cell.json").write_text(name)
            if name == "sleepy":
                runners[1].claims.expires = 0.0
                runners[1].complete([Job("job", "3", "job", target.exists, work("awake"))])
            publish(private, target)
            claim.check()

        return publish_own

    runners[0].complete([Job("job", "3", "job", target.exists, work("sleepy"))])
    assert (target / "cell.json").read_text() == "awake"
    events = [(entry.event, entry.attempt) for entry in read_entries(runners[0].directory)]
    assert events == [("started", 1), ("started", 2), ("done", 2)]
    assert runners[0].failed() == {}


def test_what_a_lost_attempt_stumbles_over_is_no_failure(config: StudyConfig, tmp_path: Path) -> None:
    runner = runner_of(config)

    def stumble(claim: Claim) -> None:
        with Claims(runner.claims.directory, "thief", expires=0.0).take("job") as stolen:
            assert stolen is not None
            (tmp_path / "job").touch()
        raise UserError("my directory is gone")

    runner.complete([file_job(tmp_path, "job", stumble)])
    assert runner.failed() == {}


# ---------------------------------------------------------------- the search over phases


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases of the cells that were run, in order; the cells leave nothing but their word."""
    phases: list[str] = []

    def cell_job(runner: Runner, cell: Any) -> Job:
        def work(claim: Claim) -> None:
            phases.append(cell.recipe.phase)
            write_json(runner.cell_directory(cell) / "cell.json", {})

        return Job(*cell.about, lambda: runner.published(cell), work)

    def done(runner: Runner, *cell: Any) -> Job:
        return file_job(runner.directory, "guard")

    monkeypatch.setattr(search_module, "cell_job", cell_job)
    monkeypatch.setattr(search_module, "base_job", done)
    monkeypatch.setattr(search_module, "role_play_job", done)
    return phases


def run_search(config: StudyConfig, stages: tuple[str, ...], verdicts: dict[str, VerdictKind]) -> Runner:
    """A search in which the verdict is the one named for the last phase that has been run."""

    def decide(directory: Path) -> Decision:
        there = {path.parent.name.split("-")[0][0] for path in directory.glob("cells/*/cell.json")}
        return Decision(verdicts.get(max(there), "incomplete"), None)

    runner = prepare(config, CPU, QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "read_study", lambda directory: directory)
        patch.setattr(search_module, "decide", decide)
        search(runner, stages)
    return runner


def test_the_search_stops_after_the_phase_with_a_recipe_that_passes(config: StudyConfig, ran: list[str]) -> None:
    runner = run_search(replace(config, exhaustive=False), tuple(STAGES), {"2": "positive"})
    assert ran == ["1", "2A", "2B"]
    skipped = [entry.phase for entry in read_entries(runner.directory) if entry.event == "skipped"]
    assert skipped == ["3", "4A", "4B", "5A", "5B", "5C", "5C"]


def test_control_without_a_pass_it_goes_on(config: StudyConfig, ran: list[str]) -> None:
    run_search(replace(config, exhaustive=False), tuple(STAGES), {})
    assert ran == ["1", "2A", "2B", "3", "4A", "4B", "5A", "5B", "5C", "5C"]


def test_an_exhaustive_search_goes_on_after_a_pass(config: StudyConfig, ran: list[str]) -> None:
    runner = run_search(config, tuple(STAGES), {"1": "positive"})
    assert len(ran) == 10 and not [entry for entry in read_entries(runner.directory) if entry.event == "skipped"]


def test_what_a_stopped_search_skipped_an_exhaustive_one_runs(config: StudyConfig, ran: list[str]) -> None:
    run_search(replace(config, exhaustive=False), tuple(STAGES), {"1": "positive"})
    assert ran == ["1"]
    run_search(config, tuple(STAGES), {"1": "positive"})
    assert len(ran) == 10


def test_chosen_phases_bring_the_baseline_with_them(config: StudyConfig, ran: list[str]) -> None:
    run_search(config, ("3",), {})
    assert ran == ["1", "3"]


def test_a_failed_calibration_ends_the_search_before_anything_is_trained(config: StudyConfig, ran: list[str]) -> None:
    directory = Path(config.out)
    write_record(directory / "calibration.json", Calibration(True, False, "off", {}, "hash"))
    run_search(replace(config, exhaustive=False), tuple(STAGES), {})
    assert ran == []
    run_search(config, ("1",), {})
    assert ran == ["1"]


def test_the_directory_of_another_study_is_refused(config: StudyConfig, ran: list[str]) -> None:
    prepare(config, CPU, QUIET)
    other_judge = replace(config.behaviour, judge="file", judge_model="me")
    changed = replace(config, stop_rule="registered", exhaustive=False, behaviour=other_judge)
    prepare(changed, CPU, QUIET)  # none of these asks for other cells
    with pytest.raises(UserError, match=r"belongs to another study \(low_rank.rank: \(2,\) -> \(3,\)\)"):
        prepare(replace(config, low_rank=replace(config.low_rank, rank=(3,))), CPU, QUIET)
    shutil.rmtree(config.out)
    prepare(replace(config, low_rank=replace(config.low_rank, rank=(3,))), CPU, QUIET)
