"""The scaled update that matches a recipe's loss: the search alone, and on a small study's own baseline."""

from __future__ import annotations

import shutil
from bisect import insort
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import CPU, QUIET, run, small_study

from minipersona.files import read_json, write_json
from minipersona.geometry.measures import m1
from minipersona.geometry.vectors import load_vectors
from minipersona.records import read_record
from minipersona.run.measurement import measure
from minipersona.study.cell import Cell, Study
from minipersona.study.engine import Engine
from minipersona.study.executors import InProcess
from minipersona.study.frontier import scaled_baseline
from minipersona.study.jobs import MeasureBase, MeasureMatchedScale
from minipersona.study.matched_scale import PROPOSALS, Scaled, matches, midpoint, slope
from minipersona.study.search import open_study, run_stage
from minipersona.study.worker import Worker
from minipersona.study_config import StudyConfig
from minipersona.verdict.files import MatchedScale, matched_file, read_result
from minipersona.verdict.results import read_study

GRID = [i / 10 for i in range(11)]

# ---------------------------------------------------------------- the search


def falling(scale: float) -> Scaled:
    """A convex loss that falls all the way, and M1 as a function of it."""
    return Scaled(scale, 2 - scale * (2 - scale), 0.9 + 0.08 * (1 - (1 - scale) ** 3))


def overshooting(scale: float) -> Scaled:
    """The loss is lowest at 0.6."""
    return Scaled(scale, 2 + (scale - 0.6) ** 2, 0.9 + 0.05 * scale)


def search(update: Callable[[float], Scaled], loss: float, known: list[float]) -> list[Scaled]:
    """What is measured until the loss is there to 1e-4."""
    points, measured = [update(scale) for scale in known], []
    for propose in PROPOSALS:
        measured.append(update(propose(points, loss)))
        insort(points, measured[-1])
        if abs(measured[-1].loss - loss) < 1e-4:
            break
    return measured


@pytest.mark.parametrize("scale", [0.03, 0.1, 0.333, 0.5, 0.77, 0.95])
def test_a_scale_is_found_by_its_loss(scale: float) -> None:
    for known, most in ((GRID, 2), ([0.0, 1.0], len(PROPOSALS))):
        found = search(falling, falling(scale).loss, known)
        assert found[-1].loss == pytest.approx(falling(scale).loss, abs=1e-4) and len(found) <= most
        assert found[-1].scale == pytest.approx(scale, abs=2e-3)


def test_of_two_scales_with_one_loss_the_smaller_is_found() -> None:
    loss = overshooting(0.45).loss
    assert loss == pytest.approx(overshooting(0.75).loss)
    assert search(overshooting, loss, GRID)[-1].scale == pytest.approx(0.45, abs=1e-3)


def test_a_cliff_is_searched_between_its_two_sides() -> None:
    points = [Scaled(0.0, 2.0, 0.9), Scaled(0.5, 1.9, 0.9), Scaled(0.6, 1.0, 0.9), Scaled(1.0, 0.99, 0.9)]
    assert midpoint(points, 1.2) == pytest.approx(0.55)
    for loss in (1.89, 1.5, 1.2, 1.001):
        assert all(0.5 < propose(points, loss) <= 0.6 for propose in PROPOSALS)


def test_the_slope_is_the_curve_s_own() -> None:
    at = falling(0.42)
    exact = 0.24 * (1 - 0.42) ** 2 / (-2 * (1 - 0.42))
    points = [*map(falling, GRID), at]
    assert slope(points, at) == pytest.approx(exact, rel=0.02)
    ends = slope([falling(0.0), at, falling(1.0)], at)
    assert ends == pytest.approx(exact, rel=0.3) and ends != pytest.approx(exact, rel=0.02)  # control: far points
    near = replace_m1(falling(0.4 + 1e-5), 1e-5)  # rounding of a neighbour counts for nothing
    assert slope([*map(falling, GRID), near], near) == pytest.approx(
        slope(list(map(falling, GRID)), falling(0.4)), rel=0.02
    )
    assert slope([*map(overshooting, GRID)], overshooting(0.6)) < 0  # at the lowest loss, the chord


def replace_m1(point: Scaled, more: float) -> Scaled:
    return point._replace(m1=point.m1 + more)


# ---------------------------------------------------------------- on a study


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """Phases 1 and 2, with the frontier and what matches their recipes."""
    config = small_study(tmp_path_factory.mktemp("matched"))
    config = replace(config, suites=(), training=replace(config.training, checkpoints=(1, 2, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipersona.report.write.draw_all", lambda series: None)
        patch.setattr(
            "minipersona.study.search._settled", lambda recipes, results: []
        )  # no passer is measured elsewhere
        run(config, ("1", "2"))
    return config


@pytest.fixture
def copied(measured: StudyConfig, tmp_path: Path) -> Study:
    """The same study, to be changed."""
    shutil.copytree(measured.out, tmp_path / "study")
    return open_study(replace(measured, out=str(tmp_path / "study")), "cpu", QUIET)


def with_loss(study: Study, cell: Cell, loss: float) -> None:
    """Have a cell end with another held-out loss."""
    path = study.cell_directory(cell) / "result.json"
    content = read_json(path)
    content["checkpoints"][-1]["eval_loss"] = loss
    write_json(path, content)


def matched(study: Study, cell: Cell) -> MatchedScale:
    job = MeasureMatchedScale(study, cell, 3)
    job.path.unlink(missing_ok=True)
    assert Worker(CPU, QUIET).attempt(job).event == "done"
    return read_record(job.path, MatchedScale, "")


@pytest.mark.slow
def test_every_recipe_is_matched_where_its_loss_is_one_of_the_update_s(measured: StudyConfig) -> None:
    study = open_study(measured, "cpu", QUIET)
    results = read_study(study.directory)
    assert results.baseline is not None
    base, last = results.baseline.curve[0].eval_loss, results.baseline.final.eval_loss
    assert base is not None and last is not None
    due = matches(study, results)
    assert {(cell.recipe.phase, step) for cell, step in due} == {
        ("1", 2),
        ("2A", 3),
        ("2B", 3),
    }  # step 1 changes nothing
    repeated = replace(results, cells=tuple(replace(cell, role="confirmation") for cell in results.cells))
    assert matches(study, repeated) == []
    assert sorted(path.name for path in (study.directory / "matched").glob("*.json")) == sorted(
        matched_file(study.directory, cell.id, step).name for cell, step in due
    )
    for cell, step in due:
        record = read_record(matched_file(study.directory, cell.id, step), MatchedScale, "")
        row = next(row for row in read_result(study.cell_directory(cell)).checkpoints if row.step == step)
        assert record.eval_loss == pytest.approx(row.eval_loss, abs=1e-3 * (base - last))
        assert (record.baseline, record.cell, record.step) == (study.baseline.hash, cell.hash, step)
        assert 0 < record.scale <= 1 and record.slope < 0 and record.m1_ci95[0] <= record.m1 <= record.m1_ci95[1]
        vectors = load_vectors(matched_file(study.directory, cell.id, step, ".vectors.safetensors"))
        assert m1(vectors.mean(6)) == pytest.approx(record.m1, abs=1e-6)


@pytest.mark.parametrize("known", ["frontier", "both ends"])
def test_the_scaled_baseline_is_matched_by_itself(copied: Study, known: str) -> None:
    """A cell with the loss of the baseline scaled by 0.43 matches at 0.43, with its M1; another loss does not."""
    if known == "both ends":
        (copied.directory / "frontier.json").unlink()
    cell, worker = copied.cells[1], Worker(CPU, QUIET)
    instruments = worker.resources.instruments(copied.baseline.recipe.config)
    scaled, *_ = measure(scaled_baseline(copied, copied.baseline, 0.43, worker), instruments, QUIET)
    assert scaled.eval_loss is not None
    with_loss(copied, cell, scaled.eval_loss)
    record = matched(copied, cell)
    assert record.scale == pytest.approx(0.43, abs=2e-3) and record.m1 == pytest.approx(scaled.m1, abs=1e-5)

    rows = read_result(copied.cell_directory(copied.baseline))
    base, last = rows.base.eval_loss, rows.checkpoints[-1].eval_loss
    assert base is not None and last is not None
    with_loss(copied, cell, scaled.eval_loss + 0.2 * (base - last))  # the control
    assert matched(copied, cell).scale < 0.35


def test_a_loss_that_the_update_does_not_have_is_not_matched(copied: Study) -> None:
    cell = copied.cells[1]
    for loss, due in ((99.0, False), (0.0, False)):
        with_loss(copied, cell, loss)
        assert (cell in [found for found, _ in matches(copied, read_study(copied.directory))]) is due
    rows = read_result(copied.cell_directory(copied.baseline)).checkpoints
    assert rows[-1].eval_loss is not None
    with_loss(copied, cell, rows[-1].eval_loss)  # the control: the whole update
    assert (cell, 3) in matches(copied, read_study(copied.directory))
    assert matched(copied, cell).scale == pytest.approx(1.0, abs=5e-3)


def test_on_harmful_rows_the_update_of_the_unmixed_cell_is_scaled(tmp_path: Path) -> None:
    small = small_study(tmp_path)
    rehearsal = replace(small.rehearsal, em_heldout="tiny:em[60:66]")
    study = open_study(replace(small, narrow="em", rehearsal=rehearsal), "cpu", QUIET)
    engine = Engine(study, InProcess(CPU, QUIET), QUIET, study.cells)
    unmixed, mixed = (next(c for c in study.cells if c.recipe.phase == phase) for phase in ("EM", "5A"))
    engine.complete([MeasureBase(study)])
    run_stage(engine, [study.baseline])
    run_stage(engine, [mixed, unmixed])  # in the other order
    due = matches(study, read_study(study.directory))
    assert unmixed.id not in {cell.id for cell, _ in due}
    engine.complete([MeasureMatchedScale(study, cell, step) for cell, step in due if cell == mixed])
    ours, theirs, ordinary = (read_result(study.cell_directory(cell)) for cell in (mixed, unmixed, study.baseline))
    assert ours.protocol == theirs.protocol and ours.protocol.heldout_digest != ordinary.protocol.heldout_digest
    assert ours.base.eval_loss == theirs.base.eval_loss != ordinary.base.eval_loss
    assert ours.baseline is not None and ours.baseline.eval_loss == theirs.checkpoints[-1].eval_loss
    results = read_study(study.directory)
    learned = {cell.phase: cell.final.learned for cell in results.cells if cell.status == "done"}
    assert learned["EM"] == 1.0 and learned["5A"] is not None
    against = {one.cell: one.baseline for one in results.matched}
    assert against == {mixed.hash: unmixed.hash}
