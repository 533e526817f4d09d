"""The figures show the numbers of their CSVs, and their labels stay apart."""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.report import plots, plots_geometry, style
from minipersona.report.placement import Box, place_beside, spread
from minipersona.report.series import Series, all_series
from minipersona.report.style import by
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import judge_study

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="session")
def series(whole: Any) -> dict[str, Series]:
    results = read_study(whole.directory)
    found, missing = all_series(results, judge_study(results))
    assert missing == {}
    return {one.name: one for one in found}


def drawn(one: Series, draw: Callable[..., Any]) -> Any:
    with matplotlib.style.context(["default", style.STYLE]):
        return draw(one.rows)


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
    (axes,) = drawn(series["m1_against_learned"], plots.m1_against_learned).axes
    rows = [row for row in series["m1_against_learned"].rows if row["kind"] != "recipe on the way"]
    assert {(round(row["learned"], 9), round(row["m1"], 9)) for row in rows} == points(axes)


def test_every_recipe_of_the_trade_off_is_named_and_no_label_hides_another(series: dict[str, Series]) -> None:
    (axes,) = drawn(series["m1_against_learned"], plots.m1_against_learned).axes
    rows = [row for row in series["m1_against_learned"].rows if row["kind"] == "recipe"]
    labels = {text.get_text(): text for text in axes.texts}
    assert {f"{row['phase']} {row['recipe']}" for row in rows} <= labels.keys()
    boxes = [Box(*text.get_window_extent().extents) for text in axes.texts]
    assert max(one.overlap(other) for one, other in combinations(boxes, 2)) < 25  # pixels: descenders may touch


def test_every_step_is_plotted_in_its_phases_panel(series: dict[str, Series]) -> None:
    one = series["m1_by_step"]
    figure = drawn(one, plots.m1_by_step)
    baseline = {(row["step"], round(row["m1"], 9)) for row in one.rows if row["phase"] == "1"}
    for axes, group in zip(figure.axes, by(one.rows, "phase").values(), strict=True):
        assert {(row["step"], round(row["m1"], 9)) for row in group} | baseline == points(axes)


def test_a_cell_with_one_checkpoint_is_a_point_and_no_line() -> None:
    row = {"phase": "2A", "recipe": "beta=1", "seed": 42, "step": 375, "m1": 0.94, "m1_low": 0.93, "m1_high": 0.95}
    (axes,) = drawn(Series("m1_by_step", "", "", tuple(row), [{**row, "step": 0}, row]), plots.m1_by_step).axes
    (marked,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert marked.get_xydata().tolist() == [[375, 0.94]] and marked.get_linestyle() == "None"


def test_the_matrices_are_the_csvs_cosines_on_one_scale(series: dict[str, Series]) -> None:
    one = series["cosines"]
    panels = [axes for axes in drawn(one, plots_geometry.cosine_matrices).axes if axes.images]
    models = by(one.rows, "model")
    assert list(models)[:2] == ["base", "baseline"] and len(panels) == len(models) == 3
    for axes, rows in zip(panels, models.values(), strict=True):
        assert axes.images[0].get_array().ravel().tolist() == [row["cosine"] for row in rows]
        off = [row["cosine"] for row in rows if row["persona"] != row["other"]]
        assert sum(off) / len(off) == pytest.approx(rows[0]["m1"], abs=1e-4)
    assert len({axes.images[0].get_clim() for axes in panels}) == 1


def test_the_decomposition_is_relative_to_the_base(series: dict[str, Series]) -> None:
    one = series["decomposition"]
    panels = drawn(one, plots_geometry.decomposition).axes
    assert one.rows[0]["recipe"] == "base" and one.rows[0]["between_of_base"] == 1.0
    for axes, key in zip(panels, ("shared_mean_share", "between_of_base", "within_of_base"), strict=True):
        assert {(round(row[key], 9), i) for i, row in enumerate(one.rows)} == points(axes)


def test_the_mixture_curve_is_the_verdicts_fit(series: dict[str, Series]) -> None:
    one = series["mixture"]
    for axes, rows in zip(drawn(one, plots_geometry.mixture).axes, by(one.rows, "phase").values(), strict=True):
        kinds = by(rows, "kind")
        assert {(round(100 * row["fraction"], 9), round(row["m1"], 9)) for row in kinds["measured"]} <= points(axes)
        curve = [(100 * row["fraction"], row["m1"]) for row in kinds["fit"]]
        assert any(line.get_xydata().tolist() == [list(place) for place in curve] for line in axes.lines)


def test_a_threshold_is_marked_with_its_interval() -> None:
    columns = (
        "phase",
        "kind",
        "recipe",
        "seed",
        "fraction",
        "m1",
        "m1_low",
        "m1_high",
        "fraction_low",
        "fraction_high",
    )
    measured = dict(zip(columns, ("5A", "measured", "75:25", 42, 0.25, 0.94, 0.93, 0.95, None, None), strict=True))
    crossing = dict(zip(columns, ("5A", "threshold", "", None, 0.19, 0.95, None, None, 0.15, None), strict=True))
    (axes,) = drawn(Series("mixture", "", "", columns, [measured, crossing]), plots_geometry.mixture).axes
    assert (19.0, 0.95) in points(axes)
    assert "19.0% [15.0, beyond]" in [text.get_text() for text in axes.texts]


# ---------------------------------------------------------------- placement


@settings(deadline=None)
@given(st.lists(st.floats(-50, 150), min_size=1, max_size=30), st.floats(0.5, 20))
def test_spread_keeps_order_distance_and_bounds(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap, 0, 100)
    ordered = [place for _, place in sorted(zip(wanted, places, strict=True))]
    room = min(gap, 100 / max(len(wanted) - 1, 1))
    assert all(b - a >= room - 1e-6 for a, b in pairwise(ordered))
    assert min(places) >= -1e-6 and max(places) <= 100 + 1e-6


def test_spread_moves_nothing_that_has_room() -> None:
    assert spread([90, 10, 50], 5, 0, 100) == [90, 10, 50]
    assert spread([50, 50], 10, 0, 100) == [45, 55]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(20, 380), st.floats(20, 280)), min_size=1, max_size=20, unique=True))
def test_labels_hide_nothing(places: list[tuple[float, float]]) -> None:
    area, obstacle = Box(0, 0, 400, 300), Box(150, 100, 250, 200)
    boxes = place_beside(places, [(60.0, 10.0)] * len(places), [obstacle], area)
    placed = [box for box in boxes if box is not None]
    assert all(box.outside(area) < 1e-3 and not box.overlap(obstacle) for box in placed)
    assert not any(one.overlap(other) for one, other in combinations(placed, 2))
    assert not any(box.left < x < box.right and box.bottom < y < box.top for box in placed for x, y in places)


def test_control_a_crowd_has_no_room() -> None:
    crowd = [(200 + 0.1 * i, 150.0) for i in range(40)]
    boxes = place_beside(crowd, [(60.0, 10.0)] * 40, [], Box(0, 0, 400, 300))
    assert None in boxes
