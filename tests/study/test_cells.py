"""Cells: what their names stand for, that a cell is published once, and where an attempt begins."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_study import CPU, QUIET, small_study

from minipersona.errors import UserError
from minipersona.files import append_jsonl, data_dir, read_json, write_json
from minipersona.study import jobs, model_jobs
from minipersona.study.cell import Study, _repository_contents, hash_cells
from minipersona.study.jobs import TrainCell, cell_record, publish, training_seconds
from minipersona.study.recipes import planned
from minipersona.study.search import writing
from minipersona.study.worker import Worker
from minipersona.study_config import RecipeSection, StudyConfig
from minipersona.training.checkpoint import Position


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return small_study(tmp_path)


# ---------------------------------------------------------------- identity


def ids(config: StudyConfig) -> list[str]:
    return [cell.id for cell in hash_cells(planned(config))]


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


def test_a_changed_file_that_a_recipe_names_is_another_cell(config: StudyConfig, tmp_path: Path) -> None:
    files = {
        "data.responses": ("mine.jsonl", "{}"),
        "steering.vector": ("vector.safetensors", "file:{}"),
        "steering.vector ": ("vectors.safetensors", "file:{}#villain - assistant"),
        "objective.anchor_personas": ("personas.json", "{}"),
        "objective.anchor_questions": ("asked.txt", "{}"),
    }
    for number, (key, (file, value)) in enumerate(files.items()):
        path = tmp_path / f"named-{file}"
        path.write_text('{"eval_personas": {"a": "You are he."}}' if key.endswith("personas") else "Is it he?\nWho?\n")
        settings = {key.strip(): value.format(path)}
        if key.startswith("objective"):
            settings |= {"objective.kind": "feature_anchor", "objective.weight": 1.0}
        mine = replace(config, recipe=(RecipeSection("6A", f"mine {number}", settings),))
        before = ids(mine)
        path.write_text(
            path.read_text().replace("a", "b").replace("Who", "Why").replace("evbl_personbs", "eval_personas")
        )
        assert [a != b for a, b in zip(before, ids(mine), strict=True)] == [False] * (len(before) - 1) + [True]
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name}: .*o such file"):
            ids(mine)


def test_a_local_tokenizer_s_contents_count(config: StudyConfig, tmp_path: Path) -> None:
    for name in ("before", "after"):
        shutil.copytree(data_dir() / "tiny", tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "*.jsonl"))
    with open(tmp_path / "after" / "tokenizer.json", "a") as file:
        file.write("\n")
    moved = tmp_path / "tokenizer"
    found = []
    for name in ("before", "after"):
        shutil.copytree(tmp_path / name, moved, dirs_exist_ok=True)
        _repository_contents.cache_clear()
        found.append(ids(replace(config, model=replace(config.model, tokenizer=str(moved)))))
    assert not set(found[0]) & set(found[1])


def test_responses_of_the_user_s_are_not_written(config: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").touch()
    mine = RecipeSection("6A", "mine", {"data.responses": str(tmp_path / "mine.jsonl")})
    config = replace(config, recipe=(mine,))
    study = Study(config, Path(config.out), hash_cells(planned(config)))
    assert [job.cell.recipe.phase for job in writing(study, study.cells)] == ["4B"]
    assert study.placed_config(study.cells[-1]).data.responses == str(tmp_path / "mine.jsonl")


def test_another_seed_is_another_cell(config: StudyConfig) -> None:
    before = ids(config)
    assert not set(ids(replace(config, seeds=(43,)))) & set(before)
    both = hash_cells(planned(replace(config, seeds=(42, 43))))
    assert [cell.id for cell in both if cell.recipe.config.seed == 42] == before
    assert len({cell.hash for cell in both}) == len(both) == 2 * len(before)
    # The seed alone does it, and not the name or the baseline that differ with it.
    recipe = planned(config)[1]
    reseeded = replace(recipe, config=replace(recipe.config, seed=43))
    first, second = (hash_cells([planned(config)[0], one])[1] for one in (recipe, reseeded))
    assert first.hash != second.hash


def test_recipes_share_what_the_base_writes_where_it_writes_to_the_same_prompts(config: StudyConfig) -> None:
    def declared(name: str, **settings: object) -> RecipeSection:
        data = {f"data.{key}": value for key, value in settings.items()}
        return RecipeSection("6E", name, {"data.responses": "study:role_play", **data})

    mine = (
        declared("prompts", system_prompts="training_personas"),
        declared("rows", train="tiny:benign[60:120]"),
        declared("anew", responses="study:rewritten"),
    )
    config = replace(config, recipe=mine)
    study = Study(config, Path(config.out), hash_cells(planned(config)))
    cells = [cell for cell in study.cells if cell.recipe.config.data.responses]
    assert [cell.recipe.name for cell in cells] == ["responses", "prompts", "rows", "anew"]
    files = [str(jobs.WriteResponses(study, cell).file) for cell in cells]
    assert files == [study.placed_config(cell).data.responses for cell in cells]
    assert files[0] == files[1] and len(set(files)) == len(files) - 1
    reseeded = replace(cells[0].recipe.config, seed=43)
    assert str(study.responses_file(reseeded)) not in files


# ---------------------------------------------------------------- attempts and publishing


def test_of_two_attempts_the_first_is_published_and_the_second_changes_nothing(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cell.json").write_text(name)
    target = tmp_path / "cells"
    publish(tmp_path / "first", target)
    with pytest.raises(UserError, match=r"cells: Directory not empty"):
        publish(tmp_path / "second", target)
    assert (target / "cell.json").read_text() == "first" and (tmp_path / "second" / "cell.json").exists()
    os.replace(tmp_path / "second" / "cell.json", target / "cell.json")  # control: replacing files would not have asked
    assert (target / "cell.json").read_text() == "second"
    with pytest.raises(UserError, match="No such file"):
        publish(tmp_path / "gone", tmp_path / "nowhere")


def test_a_cell_is_made_in_a_directory_of_its_own_and_begins_where_an_earlier_attempt_stopped(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(config, Path(config.out), hash_cells(planned(config)))
    cell = study.cells[1]
    private, published = study.attempts / cell.id, study.cell_directory(cell)
    began = []

    def carried_out(placed: Any, directory: Path, *more: Any, base: Path) -> None:
        began.append(sorted(path.name for path in directory.rglob("*") if path.is_file()))
        assert directory == private and not published.exists() and base == study.base
        assert placed.out == str(published) and placed.probe.baseline == str(study.cell_directory(study.baseline))
        write_json(directory / "latest" / "state.json", {"step": 3, "updates": 3, "done": True})

    monkeypatch.setattr(jobs, "carry_out", carried_out)
    monkeypatch.setattr(jobs, "evaluate_run", lambda directory, device, console: Position())  # any record will do
    write_json(private / "latest" / "state.json", {"step": 2, "updates": 2, "done": False})
    append_jsonl(private / "metrics.jsonl", {"step": 1, "tokens": 30, "tokens_per_second": 3.0})
    append_jsonl(private / "metrics.jsonl", {"step": 2, "tokens": 30, "tokens_per_second": 3.0, "skipped": "why"})
    job = TrainCell(study, cell)
    assert Worker(CPU, QUIET).attempt(job).event == "done" and job.done()
    assert began == [["metrics.jsonl", "state.json"]] and not private.exists() and not list(study.attempts.iterdir())
    record = read_json(published / "cell.json")
    assert record["notes"] == [
        "continued at step 2 from an attempt that was interrupted",
        "1 steps were skipped; metrics.jsonl says why",
    ]
    assert record["seconds"] >= training_seconds(published) == 20.0 and record["gpu_seconds"] is None
    assert cell_record(cell, published, 0, 5.0, on_gpu=True).gpu_seconds == 5.0
    assert Worker(CPU, QUIET).attempt(job).event == "done" and len(began) == 1  # it is not done again
    (published / "cell.json").unlink()
    lost = Worker(CPU, QUIET).attempt(job)
    assert lost.event == "failed" and lost.error == f"{published}: has no cell.json; delete it and continue the study"


@pytest.mark.parametrize(
    "ratios, mean, labels",
    [((), None, ()), ((0.001, 0.017), 0.009, ("inert",)), ((0.001, 0.021), 0.011, ()), ((0.0,), 0.0, ("inert",))],
)
def test_a_penalty_without_a_gradient_is_labelled(
    config: StudyConfig, tmp_path: Path, ratios: tuple[float, ...], mean: float | None, labels: tuple[str, ...]
) -> None:
    cell = hash_cells(planned(config))[1]
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 1})  # most steps leave no checkpoint
    for step, ratio in enumerate(ratios, 2):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "penalty_ratio": ratio})
    record = cell_record(cell, tmp_path, 0, 5.0, on_gpu=False)
    assert record.penalty_ratio == (mean if mean is None else pytest.approx(mean)) and record.labels == labels


def test_jobs_travel_to_other_processes(config: StudyConfig) -> None:
    study = Study(config, Path(config.out), hash_cells(planned(config)))
    ours, theirs = multiprocessing.Pipe()
    for job in (
        TrainCell(study, study.cells[1]),
        jobs.MeasureBase(study),
        jobs.WriteResponses(study, study.cells[1]),
        jobs.MeasureFrontier(study),
        jobs.MeasureScaling(study),
        model_jobs.AskSuite(study, "behaviour", study.cells[1], 3),
        model_jobs.AskVoice(study, study.cells[1], 3),
        jobs.MeasureMatchedScale(study, study.cells[1], 3),
        jobs.MeasureTransfer(study, study.cells[1], 3),
    ):
        ours.send(job)
        there = theirs.recv()
        assert there == job and there.id == job.id and str(there) == str(job) and not there.done()


def test_a_cell_that_is_steered_along_measured_personas_says_so(config: StudyConfig, tmp_path: Path) -> None:
    cells = hash_cells(planned(replace(config, controls=True)))
    labels = {cell.recipe.name: cell_record(cell, tmp_path, 0, 1.0, on_gpu=False).labels for cell in cells}
    assert labels["villain - assistant"] == labels["collapse"] == ("leaks",)
    assert labels["random"] == labels["baseline"] == ()
