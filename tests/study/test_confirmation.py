"""Passers are run again with fresh seeds: which cells that asks for, that a study runs them once, and after a kill."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import CPU, QUIET, run, small_study, start

from minipersona.errors import UserError
from minipersona.files import read_json, read_jsonl
from minipersona.records import read_record
from minipersona.study import search
from minipersona.study.cell import Study, hash_cells
from minipersona.study.confirmation import confirmation_cells, fresh_seeds
from minipersona.study.engine import Engine
from minipersona.study.executors import InProcess
from minipersona.study.jobs import WriteResponses
from minipersona.study.recipes import planned
from minipersona.study.search import open_study
from minipersona.study_config import StudyConfig
from minipersona.verdict.files import Plan, PlanEntry
from minipersona.verdict.ledger import read_entries
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import StudyResults

TWO = ("1", "2")


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    small = small_study(tmp_path)
    regularised = replace(small.regularised, r3f_lambda=())
    return replace(small, confirmations=2, suites=(), narrow="em", regularised=regularised)


def opened(config: StudyConfig) -> Study:
    return Study(config, Path(config.out), hash_cells(planned(config)))


# ---------------------------------------------------------------- which cells


def test_fresh_seeds_are_the_smallest_above_those_of_the_study(config: StudyConfig) -> None:
    assert list(fresh_seeds(config)) == [43, 44]
    assert list(fresh_seeds(replace(config, seeds=(7, 50, 3), confirmations=3))) == [51, 52, 53]
    assert not fresh_seeds(replace(config, confirmations=0))


def test_a_passer_is_run_again_beside_its_baseline_and_differs_in_its_seed_alone(config: StudyConfig) -> None:
    study = opened(config)
    baseline, passer = study.cells[:2]
    cells = confirmation_cells(study, [passer])
    assert [cell.recipe.name for cell in cells] == [
        "baseline seed=43", "baseline seed=44", "beta=0.1 seed=43", "beta=0.1 seed=44",
    ]  # fmt: skip
    grown = replace(study, cells=(*study.cells, *cells))
    for cell, original in zip(cells, (baseline, baseline, passer, passer), strict=True):
        assert replace(cell.recipe.config, seed=42) == original.recipe.config and cell.recipe.role == "confirmation"
        own = next(one for one in cells[:2] if one.recipe.config.seed == cell.recipe.config.seed)
        assert grown.baseline_of(cell) == own and grown.baseline_of(original) == baseline
    named = [Path(grown.placed_config(cell).probe.baseline).name for cell in cells]
    assert named == ["self", "self", cells[0].id, cells[1].id]
    assert len({cell.hash for cell in grown.cells}) == len(grown.cells)
    assert confirmation_cells(study, []) == [] and confirmation_cells(grown, [passer]) == cells


def test_the_baseline_as_a_passer_is_confirmed_by_itself(config: StudyConfig) -> None:
    study = opened(config)
    cells = confirmation_cells(study, [study.baseline, study.baseline])
    assert [cell.recipe.name for cell in cells] == ["baseline seed=43", "baseline seed=44"]


def test_recipes_on_harmful_rows_are_confirmed_beside_the_unmixed_cell(config: StudyConfig) -> None:
    study = opened(config)
    mixed = next(cell for cell in study.cells if cell.recipe.phase == "5A")
    for study_, phases in ((study, ["1", "EM", "5A"]), (opened(replace(config, narrow="tulu")), ["1", "5A"])):
        mixed = next(cell for cell in study_.cells if cell.recipe.phase == "5A")
        assert [cell.recipe.phase for cell in confirmation_cells(study_, [mixed])] == [p for p in phases for _ in "12"]


def test_with_harmful_rows_held_out_the_unmixed_cell_is_the_baseline_of_phase_5(config: StudyConfig) -> None:
    rehearsal = replace(config.rehearsal, em_heldout="tiny:em[60:70]")
    study = opened(replace(config, rehearsal=rehearsal))
    mixed = next(cell for cell in study.cells if cell.recipe.phase == "5A")
    cells = confirmation_cells(study, [mixed])
    study = replace(study, cells=(*study.cells, *cells))
    unmixed = next(cell for cell in study.cells if cell.recipe.phase == "EM")
    assert study.baseline_of(mixed) == unmixed and study.baseline_of(study.cells[1]) == study.baseline
    assert [study.placed_config(cell).probe.baseline for cell in (unmixed, mixed)] == [
        "self", str(study.cell_directory(unmixed)),
    ]  # fmt: skip
    assert [study.baseline_of(cell).id for cell in cells[4:]] == [cell.id for cell in cells[2:4]]
    on_rows = {cell.recipe.phase: cell.recipe.config.data.heldout for cell in study.cells}
    assert {phase for phase, rows in on_rows.items() if rows == "tiny:em[60:70]"} == {"EM", "5A", "5B", "5C"}
    assert len({cell.hash for cell in study.cells}) == len(study.cells)
    # The control: without such rows everything is judged by the ordinary ones.
    plain = opened(config)
    assert {cell.recipe.config.data.heldout for cell in plain.cells} == {config.data.heldout}
    assert {plain.baseline_of(cell).id for cell in plain.cells} == {plain.baseline.id}


def test_what_is_scaled_down_has_the_seed_of_the_recipe(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(replace(config, seeds=(42, 43)))
    cells = [cell for cell in study.cells if cell.recipe.phase in ("2A", "5A")]
    there = {cell.id for cell in study.cells if cell.recipe.config.seed == 42}
    monkeypatch.setattr(Study, "published", lambda self, cell: cell.id in there)
    assert [study.scaled_for(cell).recipe.name for cell in cells] == ["baseline", "baseline", "unmixed", "unmixed"]
    there |= {cell.id for cell in study.cells}
    assert [study.scaled_for(cell).recipe.name for cell in cells] == [
        "baseline", "baseline seed=43", "unmixed", "unmixed seed=43",
    ]  # fmt: skip


def test_responses_in_persona_are_written_for_each_fresh_seed(config: StudyConfig) -> None:
    study = opened(config)
    written = next(cell for cell in study.cells if cell.recipe.phase == "4B")
    cells = confirmation_cells(study, [written])
    study = replace(study, cells=(*study.cells, *cells))
    files = {WriteResponses(study, cell).file for cell in (written, *cells[2:])}
    assert len(files) == 3 and {study.placed_config(cell).data.responses for cell in cells[2:]} < set(map(str, files))


# ---------------------------------------------------------------- they are run


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The phases whose recipes pass, whatever their numbers. What else results ask for is not measured."""
    phases = ["2A"]

    def passers(recipes: Sequence[RecipeResult], results: StudyResults) -> list[RecipeResult]:
        return [recipe for recipe in recipes if recipe.phase in phases]

    monkeypatch.setattr(search, "awaiting_confirmation", passers)
    monkeypatch.setattr(search, "asked_for", lambda study: [])
    monkeypatch.setattr("minipersona.report.write.draw_all", lambda series: None)
    yield phases


def confirmations(config: StudyConfig) -> list[PlanEntry]:
    plan = read_record(Path(config.out) / "plan.json", Plan, "")
    return [entry for entry in plan.cells if entry.role == "confirmation"]


def published(config: StudyConfig) -> dict[str, int]:
    """When each cell was published."""
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(config.out).glob("cells/*/cell.json")}


def test_a_study_confirms_its_passers_once(config: StudyConfig, passing: list[str]) -> None:
    run(config, ("2",))
    directory = Path(config.out)
    planned_, before = confirmations(config), published(config)
    assert [entry.name for entry in planned_][2:] == ["beta=0.1 seed=43", "beta=0.1 seed=44"]
    assert {entry.cell for entry in planned_} < set(before) and len(before) == 2 + 4
    baselines = {entry.seed: directory / "cells" / entry.cell for entry in planned_ if entry.phase == "1"}
    losses = set()
    for entry in planned_:
        result = read_json(directory / "cells" / entry.cell / "result.json")
        losses.add(result["checkpoints"][-1]["eval_loss"])
        own = read_json(baselines[entry.seed] / "result.json")["checkpoints"][-1]["eval_loss"]
        assert result["baseline"]["eval_loss"] == own
    assert len(losses) == 4  # every seed has its own rows and its own adapters

    passing.clear()  # what is there stays: a confirmation that failed is evidence too
    run(config, ("2",))
    assert published(config) == before and confirmations(config) == planned_


def test_without_confirmations_no_result_is_even_read(config: StudyConfig) -> None:
    def engine(config: StudyConfig) -> Engine:
        study = opened(config)
        return Engine(study, InProcess(CPU, QUIET), QUIET, study.cells)

    search.confirm(engine(replace(config, confirmations=0)))
    with pytest.raises(UserError, match="is not a study directory"):  # the control
        search.confirm(engine(config))


@pytest.mark.slow
def test_killed_while_it_confirms_a_study_finds_the_same_cells_again(config: StudyConfig, passing: list[str]) -> None:
    config = replace(config, confirmations=1)
    process, attempts = start(config, ("2",)), Path(config.out) / "cells" / ".attempts"
    deadline = time.monotonic() + 120
    while not list(attempts.glob("2A-*seed-43*/latest/state.json")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    before, planned_ = published(config), confirmations(config)
    assert len(before) == 2 + 1 and len(planned_) == 2
    run(config, ("2",))
    assert confirmations(config) == planned_ and published(config).items() > before.items()
    assert len(published(config)) == 2 + 2
    again = [entry for entry in read_entries(Path(config.out)) if entry.event == "started" and entry.attempt == 2]
    assert [entry.cell for entry in again] == [planned_[1].cell]
    rows = read_jsonl(Path(config.out) / "cells" / planned_[1].cell / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_what_no_recipe_asks_for_any_more_is_not_planned(config: StudyConfig, passing: list[str]) -> None:
    study = opened(config)
    due = confirmation_cells(study, [study.cells[1]])
    search._write_plan(replace(study, cells=(*study.cells, *due)))
    assert len(confirmations(config)) == 4
    open_study(config, "cpu", QUIET)
    assert not confirmations(config)
