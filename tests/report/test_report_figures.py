"""The figures show the numbers of their CSVs, and their legends name what they draw."""

from __future__ import annotations

import csv
from dataclasses import asdict, replace
from typing import Any

import pytest

from minipersona.report import figures
from minipersona.report.all_series import all_series
from minipersona.report.curves import MixtureRow, StepRow
from minipersona.report.drawing import STYLE, grouped, phase_title
from minipersona.report.front import front, shown_recipe
from minipersona.report.series import Series
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import judge_study

matplotlib = pytest.importorskip("matplotlib")
BOUNDS = ["0.9699: collapsed from here", "0.9498: passes below"]  # of a base with M1 0.8996
REGIONS = ("PASS", "trade-off")


@pytest.fixture(scope="session")
def series(whole: Any) -> dict[str, Series]:
    results = read_study(whole.directory)
    found, missing = all_series(results, judge_study(results))
    assert missing.keys() == {"transfer", "voice"}  # which nothing was measured for
    return {one.name: one for one in found}


def drawn(one: Series) -> Any:
    with matplotlib.style.context(["default", STYLE]):
        return figures.DRAWINGS[one.name](one)


def legend(axes: Any) -> list[str]:
    """The names in a panel's legend."""
    return [text.get_text() for text in axes.get_legend().get_texts()]


def points(axes: Any) -> set[tuple[float, float]]:
    """Every marked place of a panel."""
    marked = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    return {(round(float(x), 9), round(float(y), 9)) for line in marked for x, y in line.get_xydata()}


def test_the_csvs_hold_what_the_results_say(whole: Any) -> None:
    results = read_study(whole.directory)
    finals = {(cell.phase, cell.name): cell.final for cell in results.cells if cell.result is not None}
    with open(whole.directory / "figures" / "m1_against_learned.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] in ("recipe", "baseline")]
    assert {(row["phase"], row["recipe"]) for row in rows} == finals.keys()
    for row in rows:
        final = finals[row["phase"], row["recipe"]]
        assert float(row["m1"]) == final.m1 and float(row["learned"]) == final.learned
        assert (float(row["m1_low"]), float(row["m1_high"])) == final.m1_ci95


def test_every_number_of_the_trade_off_is_plotted(series: dict[str, Series]) -> None:
    left, right = drawn(series["m1_against_learned"]).axes
    rows = [row for row in series["m1_against_learned"].rows if row.kind != "recipe on the way"]
    assert {(round(row.learned, 9), round(row.m1, 9)) for row in rows} == points(left)
    under = [(row.learned_personas, row.m1) for row in rows if row.learned_personas is not None]
    assert {(round(x, 9), round(y, 9)) for x, y in under} == points(right) != points(left)


def test_the_legend_of_the_trade_off_names_every_phase_and_line(series: dict[str, Series]) -> None:
    one = series["m1_against_learned"]
    _, axes = drawn(one).axes
    phases = {phase_title(row.phase) for row in one.rows if row.kind in ("baseline", "recipe")}
    lines = {"baseline along training", "baseline's update, scaled"} | {*BOUNDS}
    assert len(phases) == 9 and set(legend(axes)) == phases | lines
    unmixed = [row for row in one.rows if row.phase not in ("5A", "5B") and row.kind != "scaled baseline"]
    _, axes = drawn(replace(one, rows=unmixed)).axes
    assert not {phase_title("5A"), phase_title("5B"), "baseline's update, scaled"} & set(legend(axes))  # the control


def test_the_points_that_the_verdict_names_are_labelled(whole: Any) -> None:
    results = read_study(whole.directory)
    for named in ("5C collapse", "1 baseline step 50", "2A beta=0.1"):
        one = front(results, [shown_recipe(results, named)])
        axes, _ = drawn(one).axes
        labels = {text.get_text(): tuple(text.xy) for text in axes.texts if text.get_text() not in REGIONS}
        assert labels.keys() == {"untrained base", "baseline", named}
        assert labels == {row.label: (row.learned, row.m1) for row in one.rows if row.label}
        (row,) = (row for row in one.rows if row.label == named)
        recipe = f"{row.phase} {row.recipe}"
        assert named == (recipe if row.kind == "recipe" else f"{recipe} step {row.dose}")


def test_every_step_is_plotted_in_its_phases_panel(series: dict[str, Series]) -> None:
    one = series["m1_by_step"]
    baseline = {(row.step, round(row.m1, 9)) for row in one.rows if row.phase == "1"}
    for axes, group in zip(drawn(one).axes, grouped(one.rows, lambda row: row.phase).values(), strict=True):
        assert {(row.step, round(row.m1, 9)) for row in group} | baseline == points(axes)


def test_a_panels_legend_names_its_recipes_from_the_highest_last_m1_to_the_lowest(series: dict[str, Series]) -> None:
    one = series["m1_by_step"]
    last = {(row.phase, row.recipe): row.m1 for row in one.rows}
    for number, (axes, phase) in enumerate(zip(drawn(one).axes, dict.fromkeys(r.phase for r in one.rows), strict=True)):
        assert axes.get_title(loc="left") == phase_title(phase)
        recipes = {recipe: m1 for (own, recipe), m1 in last.items() if own == phase} | {
            "baseline": last["1", "baseline"]
        }
        bounds = [] if number else BOUNDS
        assert legend(axes) == bounds + sorted(recipes, key=lambda recipe: -recipes[recipe])


def test_a_cell_with_one_checkpoint_is_a_point_without_a_line() -> None:
    row = StepRow("2A", "_beta=1", 42, 375, 0.94, 0.93, 0.95)
    (axes,) = drawn(Series("m1_by_step", "", "", [replace(row, step=0), row])).axes
    (marked,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert marked.get_xydata().tolist() == [[375, 0.94]] and marked.get_linestyle() == "None"
    assert " _beta=1" in legend(axes)  # matplotlib leaves a label out that begins with an underscore


def test_the_matrices_are_the_csvs_cosines_on_one_scale(series: dict[str, Series]) -> None:
    one = series["cosines"]
    panels = [axes for axes in drawn(one).axes if axes.images]
    models = grouped(one.rows, lambda row: row.model)
    assert list(models)[:2] == ["base", "baseline"] and len(panels) == len(models) == 3
    for axes, rows in zip(panels, models.values(), strict=True):
        assert axes.images[0].get_array().ravel().tolist() == [row.cosine for row in rows]
        off = [row.cosine for row in rows if row.persona != row.other]
        assert sum(off) / len(off) == pytest.approx(rows[0].m1, abs=1e-4)
    assert len({axes.images[0].get_clim() for axes in panels}) == 1


def test_the_decomposition_is_relative_to_the_base(series: dict[str, Series]) -> None:
    one = series["decomposition"]
    assert one.rows[0].recipe == "base" and one.rows[0].between_of_base == 1.0
    for axes, key in zip(drawn(one).axes, ("shared_mean_share", "between_of_base", "within_of_base"), strict=True):
        assert {(round(asdict(row)[key], 9), i) for i, row in enumerate(one.rows)} == points(axes)


def test_the_mixtures_of_one_seed_are_points_without_a_curve(series: dict[str, Series]) -> None:
    one = series["mixture"]
    assert {row.kind for row in one.rows} == {"measured"}
    for axes, rows in zip(drawn(one).axes, grouped(one.rows, lambda row: row.phase).values(), strict=True):
        assert {(round(100 * row.fraction, 9), round(row.m1, 9)) for row in rows} <= points(axes)


def test_a_fitted_mixture_curve_is_drawn() -> None:
    measured = [MixtureRow("5A", "measured", "75:25", seed, 0.25, 0.94, 0.93, 0.95) for seed in (42, 43)]
    fit = [MixtureRow("5A", "fit", None, None, 0.05 * k, 0.98 - 0.008 * k) for k in range(6)]
    (axes,) = drawn(Series("mixture", "", "", [*measured, *fit])).axes
    curve = [[100 * row.fraction, row.m1] for row in fit]
    assert any(line.get_xydata().tolist() == curve for line in axes.lines)


def test_a_threshold_is_marked_with_its_interval() -> None:
    measured = MixtureRow("5A", "measured", "75:25", 42, 0.25, 0.94, 0.93, 0.95)
    crossing = MixtureRow("5A", "threshold", None, None, 0.19, 0.95, fraction_low=0.15)
    (axes,) = drawn(Series("mixture", "", "", [measured, crossing])).axes
    assert (19.0, 0.95) in points(axes)
    assert "crosses 0.95 at 19.0% [15.0, beyond]" in legend(axes)
