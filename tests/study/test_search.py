"""The search: which phases are run, what ends it, and whose directory it is."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_study import CPU, QUIET, run, small_study

from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import read_json, write_json
from minipersona.locks import lock
from minipersona.records import write_record
from minipersona.study import search as search_module
from minipersona.study.cell import Study
from minipersona.study.engine import Engine
from minipersona.study.executors import InProcess
from minipersona.study.jobs import MeasureBase, TrainCell, WriteResponses
from minipersona.study.model_jobs import AskSuite, AskVoice
from minipersona.study.search import asked_for, open_study, search
from minipersona.study.worker import Worker
from minipersona.study_config import STAGES, RecipeSection, StudyConfig
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.findings import VerdictKind
from minipersona.verdict.ledger import read_entries
from minipersona.verdict.verdict import Decision


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return small_study(tmp_path)


# ---------------------------------------------------------------- the search over phases


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases of the cells that were run, in order; the cells leave nothing but their word."""
    phases: list[str] = []

    def carry_out(job: TrainCell, worker: Worker) -> None:
        phases.append(job.title.phase)
        write_json(job.study.cell_directory(job.cell) / "cell.json", {})

    monkeypatch.setattr(TrainCell, "carry_out", carry_out)
    for other in (MeasureBase, WriteResponses, AskVoice):
        monkeypatch.setattr(other, "done", lambda job: True)
    return phases


def run_search(config: StudyConfig, stages: tuple[str, ...], verdicts: dict[str, VerdictKind]) -> Study:
    """A search in which the verdict is the one named for the last phase that has been run."""

    def decide(directory: Path) -> Decision:
        there = {path.parent.name.split("-")[0][0] for path in directory.glob("cells/*/cell.json")}
        return Decision(verdicts.get(max(there), "incomplete"), None)

    study = open_study(config, "cpu", QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "read_study", lambda directory: directory)
        patch.setattr(search_module, "decide", decide)
        search(Engine(study, InProcess(CPU, QUIET), QUIET, study.cells), stages)
    return study


def skipped(study: Study) -> list[str]:
    """The phases of the cells that the ledger says were skipped."""
    return [entry.phase for entry in read_entries(study.directory) if entry.event == "skipped"]


def test_the_search_stops_after_the_phase_with_a_recipe_that_passes(config: StudyConfig, ran: list[str]) -> None:
    study = run_search(replace(config, exhaustive=False), tuple(STAGES), {"2": "positive"})
    assert ran == ["1", "2A", "2B"]
    assert skipped(study) == ["3", "4A", "4B", "5A", "5B", "5C", "5C"]


def test_a_pass_that_is_not_confirmed_ends_the_search_only_where_none_is_to_be(
    config: StudyConfig, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "confirm", lambda engine: None)
    run_search(replace(config, exhaustive=False, confirmations=3), tuple(STAGES), {"2": "unconfirmed"})
    assert len(ran) == 10
    ran.clear()
    shutil.rmtree(config.out)
    run_search(replace(config, exhaustive=False, confirmations=0), tuple(STAGES), {"2": "unconfirmed"})
    assert ran == ["1", "2A", "2B"]


def test_control_without_a_pass_it_goes_on(config: StudyConfig, ran: list[str]) -> None:
    run_search(replace(config, exhaustive=False), tuple(STAGES), {})
    assert ran == ["1", "2A", "2B", "3", "4A", "4B", "5A", "5B", "5C", "5C"]


def test_an_exhaustive_search_goes_on_after_a_pass(config: StudyConfig, ran: list[str]) -> None:
    study = run_search(config, tuple(STAGES), {"1": "positive"})
    assert len(ran) == 10 and not skipped(study)


def test_what_a_stopped_search_skipped_an_exhaustive_one_runs(config: StudyConfig, ran: list[str]) -> None:
    run_search(replace(config, exhaustive=False), tuple(STAGES), {"1": "positive"})
    assert ran == ["1"]
    run_search(config, tuple(STAGES), {"1": "positive"})
    assert len(ran) == 10


def test_chosen_phases_bring_the_baseline_with_them(config: StudyConfig, ran: list[str]) -> None:
    run_search(config, ("3",), {})
    assert ran == ["1", "3"]


def test_a_phase_that_is_named_is_run_after_a_pass_and_the_others_are_skipped(
    config: StudyConfig, ran: list[str]
) -> None:
    study = run_search(replace(config, exhaustive=False), ("1", "3"), {"1": "positive"})
    assert ran == ["1", "3"]
    assert skipped(study) == ["2A", "2B", "4A", "4B", "5A", "5B", "5C", "5C"]


def test_recipes_that_are_not_registered_come_last_and_after_no_pass(config: StudyConfig, ran: list[str]) -> None:
    mine = replace(config, exhaustive=False, recipe=(RecipeSection("6A", "mine", {"lora.rank": 2}),))
    study = run_search(mine, tuple(STAGES), {"5": "positive"})
    assert "6A" not in ran and skipped(study) == ["6A"]
    shutil.rmtree(config.out)
    ran.clear()
    run_search(mine, tuple(STAGES), {"5": "h_null"})
    assert ran[-2:] == ["5C", "6A"]
    shutil.rmtree(config.out)
    ran.clear()
    run_search(mine, ("6",), {"1": "positive"})  # named, it is run whatever passes, beside the baseline
    assert ran == ["1", "6A"]


@pytest.mark.parametrize("suites", [(), ("instructions",), ("behaviour",)])
def test_only_suites_that_are_switched_on_are_asked(
    config: StudyConfig, suites: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pass of phase 1 and a cell with a quarter of raw text, which make both suites due."""
    study = open_study(replace(config, suites=suites), "cpu", QUIET)
    raw_text = next(cell for cell in study.cells if cell.recipe.phase == "5A")
    for cell in (study.baseline, raw_text):
        write_json(study.cell_directory(cell) / "cell.json", {})
    result = SimpleNamespace(hash=study.baseline.hash)
    passer = SimpleNamespace(passes=lambda rule: True, merit=(1.0, 0.0), cells=(result,), step=3, confirmation=None)
    monkeypatch.setattr(search_module, "read_study", lambda directory: directory)
    monkeypatch.setattr(search_module, "recipe_results", lambda results: [passer])
    monkeypatch.setattr(search_module, "matches", lambda study, results: [])
    monkeypatch.setattr(search_module, "_settled", lambda recipes, results: [])
    assert {job.suite for job in asked_for(study) if isinstance(job, AskSuite)} == set(suites)


def test_the_voice_of_a_baseline_is_that_of_its_last_step_though_an_earlier_one_passes(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(replace(config, suites=()), "cpu", QUIET)
    other = study.cells[1]
    for cell in (study.baseline, other):
        write_json(study.cell_directory(cell) / "cell.json", {})
    passed = {study.baseline.hash: 1, other.hash: 1}
    monkeypatch.setattr(search_module, "read_study", lambda directory: directory)
    monkeypatch.setattr(search_module, "recipe_results", lambda results: [])
    monkeypatch.setattr(search_module, "matches", lambda study, results: [])
    monkeypatch.setattr(search_module, "_compared", lambda study, recipes, results: passed)
    monkeypatch.setattr(AskVoice, "done", lambda job: job.cell is None)
    asked = {job.cell and job.cell.recipe.name: job.at for job in asked_for(study) if isinstance(job, AskVoice)}
    assert asked == {None: 0, "baseline": 3, other.recipe.name: 1}


def test_a_suite_that_there_is_not_is_refused(config: StudyConfig) -> None:
    with pytest.raises(UserError, match="suites: 'behavior' is neither of behaviour and instructions"):
        replace(config, suites=("behavior",))


def test_a_failed_calibration_ends_the_search_before_anything_is_trained(config: StudyConfig, ran: list[str]) -> None:
    directory = Path(config.out)
    write_record(directory / "calibration.json", Calibration(True, False, "off", {}, "hash"))
    run_search(replace(config, exhaustive=False), tuple(STAGES), {})
    assert ran == []
    run_search(config, ("1",), {})
    assert ran == ["1"]


# ---------------------------------------------------------------- the directory


def test_the_directory_of_another_study_is_refused(config: StudyConfig) -> None:
    open_study(config, "cpu", QUIET)
    other_judge = replace(config.behaviour, judge="file", judge_model="me")
    changed = replace(config, stop_rule="registered", exhaustive=False, behaviour=other_judge)
    open_study(changed, "cpu", QUIET)  # none of these asks for other cells
    with pytest.raises(UserError, match=r"belongs to another study \(low_rank.rank: \(2,\) -> \(3,\)\)"):
        open_study(replace(config, low_rank=replace(config.low_rank, rank=(3,))), "cpu", QUIET)
    shutil.rmtree(config.out)
    open_study(replace(config, low_rank=replace(config.low_rank, rank=(3,))), "cpu", QUIET)


def test_of_two_drivers_on_one_directory_the_second_is_refused_in_one_line(config: StudyConfig) -> None:
    directory = Path(config.out)
    with lock(directory):
        with pytest.raises(UserError, match=rf"^{directory} is in use by pid {os.getpid()} on .*") as refused:
            run(config, ("1",))
        assert "\n" not in str(refused.value) and [path.name for path in directory.iterdir()] == [".lock"]


def test_cells_of_another_version_are_said_to_be_made_again(config: StudyConfig) -> None:
    said = io.StringIO()
    study = open_study(config, "cpu", QUIET)
    study.cell_directory(study.cells[1]).mkdir(parents=True)
    questions = Path(config.probe.questions)
    questions.write_text(questions.read_text().replace("?", "??"))
    changed = open_study(config, "cpu", Console(stream=said))
    assert said.getvalue().startswith("1 of the cells there are of other code, data or settings than now")
    planned = [row["cell"] for row in read_json(study.directory / "plan.json")["cells"]]
    assert planned == [cell.id for cell in changed.cells] and not {cell.id for cell in study.cells} & set(planned)
