"""What a study with confirmations and recipes beyond the registered ones adds: the front's marks, tables, voice."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from report.test_report_write import rows
from synthetic_study import NAMES, SyntheticStudy

from minipersona.behaviour.voice import Voice
from minipersona.records import write_record
from minipersona.report import figures, write, write_report
from minipersona.report.all_series import all_series
from minipersona.report.blocks import Table
from minipersona.report.drawing import STYLE, WINE
from minipersona.report.front import front
from minipersona.report.geometry import voice
from minipersona.report.passer_tables import passer_table, persona_table, separation_table, transfer_table
from minipersona.report.series import Missing, Series
from minipersona.report.tables import CHOSEN, recipe_table, scaling_table
from minipersona.verdict.files import ModelOnSet, SetTransfer, Transfer
from minipersona.verdict.results import StudyResults, read_study
from minipersona.verdict.verdict import Verdict, judge_study


def model(m1: float) -> ModelOnSet:
    return ModelOnSet({"3": m1, "5": m1 - 0.1}, 1 - m1, 1.0)


def spoken(value: float, responses: str = "r") -> Voice:
    """By question a share of `value` that differs, so that its interval is not a point."""
    by_question = tuple(value * (1 + 0.2 * (q % 3 - 1)) for q in range(21))
    return Voice(value=value, ci95=(value, value), by_persona=dict.fromkeys(NAMES, value),
                 by_response=dict.fromkeys(NAMES, by_question), tokens=100, responses=responses)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4A is confirmed in the registered search, 6A beyond it; 3 is a trade-off, 2B inert, 5C leaks."""
    made = SyntheticStudy(tmp_path_factory.mktemp("study"), exhaustive=True)
    baseline = made.baseline()
    made.cell("2B", "lambda=0.1", labels=("inert",))
    made.cell("3", "r=4", 0.94, 0.7, less=0.02)
    made.cell("3", "r=32", 0.982, 1.04, role="reference")
    registered = made.cell("4A", "prompts", 0.943, 0.93, less=0.02, persona_loss=1.12)
    made.cell("5A", "75:25")
    made.cell("5C", "collapse", 0.93, 0.95, labels=("leaks",))
    made.cell("5C", "random vector", 0.975, 0.98, role="control")
    beyond = made.cell("6A", "anchor", 0.925, 0.97, role="beyond", less=0.04)
    made.confirm("4A", "prompts")
    made.confirm("6A", "anchor")
    made.frontier([(k / 10, 0.90 + 0.008 * k, 1 - (1 - k / 10) ** 2) for k in range(11)])
    made.calibration(False, None, "not due: another model")
    for share, place in ((1.0, made.directory / "base"), (0.25, baseline), (0.8, beyond)):
        place.mkdir(exist_ok=True)
        write_record(place / "voice.json", spoken(0.08 * share))
    sets = {name: SetTransfer(name, "p", name, "q", model(0.9), model(0.98), model(m1))
            for name, m1 in (("study", 0.925), ("shipped", 0.95))}  # fmt: skip
    write_record(beyond / "transfer.json", Transfer("b", beyond.name[-12:], 375, 3, sets, {}))
    assert registered.is_dir()
    made.read()
    write_report(made.directory)
    return made.directory


@pytest.fixture(scope="module")
def results(study: Path) -> StudyResults:
    return read_study(study)


@pytest.fixture(scope="module")
def verdict(results: StudyResults) -> Verdict:
    return judge_study(results)


@pytest.fixture(scope="module")
def series(results: StudyResults, verdict: Verdict) -> dict[str, Series]:
    return {one.name: one for one in all_series(results, verdict)[0]}


def texts(table: Table | None) -> dict[str, list[dict[str, str]]]:
    """The lines of a table by their first cell, each by its columns; a column's second namesake is marked."""
    assert table is not None
    names = [name + "'" * table.columns[:i].count(name) for i, name in enumerate(table.columns)]
    found: dict[str, list[dict[str, str]]] = {}
    for row in table.rows:
        found.setdefault(row[0].text, []).append(dict(zip(names, (cell.text for cell in row), strict=True)))
    return found


# ---------------------------------------------------------------- the front


def test_the_report_leads_with_the_front_and_says_each_verdict_by_itself(study: Path, verdict: Verdict) -> None:
    text = (study / "report.md").read_text()
    assert verdict.beyond is not None and verdict.verdict == verdict.beyond.verdict == "positive"
    registered = verdict.sentence.removesuffix(f" {verdict.beyond.sentence}")
    assert registered != verdict.sentence and text.count(verdict.beyond.sentence) == 1
    places = [text.index(said) for said in ("m1_against_learned.png", registered, verdict.beyond.sentence, "Cells")]
    assert places == sorted(places)
    assert "**Beyond the registered recipes. Positive: a recipe passes**" in text


def test_every_kind_of_point_has_its_mark(series: dict[str, Series]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    one = series["m1_against_learned"]
    kinds = {row.recipe: row.kind for row in one.rows if row.seed == 42}
    assert (kinds["r=32"], kinds["random vector"], kinds["anchor"]) == ("reference", "control", "recipe")
    assert {row.recipe for row in one.rows if row.confirmed} == {"prompts", "anchor"}
    assert {row.recipe for row in one.rows if row.label} == {"base", "baseline", "prompts", "anchor"}
    with matplotlib.style.context(["default", STYLE]):
        for axes in figures.DRAWINGS[one.name](one).axes:
            by_name = {line.get_label(): line for line in axes.lines}
            across = dict(zip(axes.figure.axes, ("learned", "learned_personas"), strict=True))[axes]

            def places(kind: str, across: str = across) -> list[list[float]]:
                return [[getattr(row, across), row.m1] for row in one.rows if row.kind == kind]

            assert by_name["reference"].get_xydata().tolist() == places("reference")
            assert by_name["control"].get_xydata().tolist() == places("control")
            assert len(by_name["fresh seed of a passer"].get_xydata()) == 9
            ringed = by_name["confirmed by fresh seeds"].get_xydata()[:, 1].tolist()
            assert ringed == [0.943, 0.925]
            assert by_name["6A  anchor"].get_markerfacecolor() == WINE
            assert by_name["4A  persona system prompts"].get_markerfacecolor() != WINE  # the control


# ---------------------------------------------------------------- tables


def test_the_main_table_says_what_each_recipe_counts_as(results: StudyResults, verdict: Verdict) -> None:
    table = texts(recipe_table(results, verdict))
    standing = {name: row[0]["standing"] for name, row in table.items()}
    assert standing["lambda=0.1"] == "collapsed, inert" and standing["collapse"] == "leaks"
    assert standing["r=4"] == "trade-off" and standing["r=32"] == "collapsed, reference"
    assert standing["random vector"] == "collapsed, control" and standing["anchor"] == "beyond"
    assert standing["prompts seed=101"] == "fresh seed" and standing["prompts"] == ""
    assert {name for name, row in table.items() if row[0]["confirmed"] == "yes"} == {"prompts", "anchor"}


def test_scales_that_training_personas_chose_are_rows_and_points(tmp_path: Path) -> None:
    made = SyntheticStudy(tmp_path)
    made.baseline()
    made.cell("6A", "anchor", 0.925, 0.97, role="beyond")
    results = made.read()
    assert scaling_table(results) is None and "one scale" not in texts(recipe_table(results, judge_study(results)))
    made.scaling((0.945, 0.7), (0.94, 0.95))
    results = made.read()
    table = texts(recipe_table(results, judge_study(results)))
    (one,), (per_block,) = table["one scale"], table["a scale a block"]
    assert (one["phase"], one["knobs"], one["M1"], one["learned"]) == ("6D", "scale 0.5", "0.9450", "0.70")
    assert (one["substantive"], one["standing"], one["confirmed"]) == ("FAIL", "trade-off, beyond", "-")
    assert "no substantive pass: learned is 0.70, less than 0.9" in one["notes"]
    assert (per_block["knobs"], per_block["substantive"]) == ("mean scale 0.625", "PASS")
    assert (per_block["standing"], per_block["notes"]) == ("beyond", CHOSEN)
    scales = texts(scaling_table(results))
    assert [row[0]["scale, or those of the blocks"] for row in scales.values()] == ["0.50", "0.25 1.00"]
    assert scales["6D a scale a block"][0]["separation"] == "0.600"
    points = [row for row in front(results, []).rows if row.phase == "6D"]
    assert [(row.kind, row.recipe, row.dose, row.m1, row.learned) for row in points] == [
        ("recipe", "one scale", 0.5, 0.945, pytest.approx(0.7)),
        ("recipe", "a scale a block", 0.625, 0.94, pytest.approx(0.95)),
    ]
    assert [row.substantive for row in points] == [False, True] and not any(row.confirmed for row in points)


def test_a_passer_has_its_numbers_and_each_of_its_fresh_seeds(results: StudyResults) -> None:
    table = texts(passer_table(results))
    assert list(table)[:2] == ["4A prompts", "6A anchor"]  # then those of the registered rule alone
    assert table["1 baseline step 10"][0]["substantive"] == "FAIL"
    (row,) = table["4A prompts"]
    assert (row["separation"], row["under personas"], row["discriminability"]) == ("0.57", "0.88", "0.57")
    assert row["fresh seeds"] == "101: 0.9400, 0.95; 102: 0.9400, 0.95; 103: 0.9400, 0.95"
    assert row["95%, questions"] == "[0.9420, 0.9440]" and row["95%, personas"].startswith("[0.9430")


def test_every_persona_of_a_passer_has_its_numbers_before_and_after(results: StudyResults, verdict: Verdict) -> None:
    table = texts(persona_table(results, verdict))
    assert [row["persona"] for row in table["6A anchor"]] == list(NAMES)
    for recipe, rows_ in table.items():
        for row in rows_:
            change = verdict.personas[recipe][row["persona"]]
            low, high = change.recipe_ci95
            assert row["base"] == f"{change.base:.4f}" and row["95% interval'"] == f"[{low:.4f}, {high:.4f}]"
            assert float(row["change"]) == pytest.approx(float(row["after"]) - float(row["base"]), abs=1.1e-4)


def test_the_figure_of_personas_shows_each_before_and_after(series: dict[str, Series], verdict: Verdict) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.style.context(["default", STYLE]):
        panels = figures.DRAWINGS["personas"](series["personas"]).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["4A prompts", "6A anchor"]
    for axes, recipe in zip(panels, ("4A prompts", "6A anchor"), strict=True):
        drawn = {line.get_label(): sorted(line.get_xdata()) for line in axes.lines}
        changes = verdict.personas[recipe].values()
        assert drawn["base"] == sorted(change.base for change in changes)
        assert drawn[recipe] == sorted(change.recipe for change in changes)
        assert drawn["baseline"] == [0.98] * len(NAMES)


def test_separation_and_transfer_have_their_tables(results: StudyResults) -> None:
    separation = texts(separation_table(results))
    assert separation["1 baseline"][0]["layer 3"] == "0.20" and separation["6A anchor"][0]["layer 3"] == "0.75"
    own, shipped = texts(transfer_table(results))["6A anchor"]
    assert (own["personas"], own["separation"], own["spread"]) == ("study", "0.75", "0.75")
    assert (shipped["separation"], shipped["lowest separation"], shipped["at layer"]) == ("0.50", "0.50", "3")


def test_doing_less_shows_the_scale_that_was_measured(study: Path, verdict: Verdict) -> None:
    table = {row[0]: row for row in rows((study / "report.md").read_text(), "Doing less")[1:]}
    (tested,) = (row for row in verdict.frontier if row.cell == "6A anchor")
    assert table["6A anchor"][3:6] == ["0.50", "0.9650", "-0.0400"] and table["6A anchor"][8] == "better"
    assert tested.better is True and table["6A anchor"][7] == f"{tested.p:.2g}"


# ---------------------------------------------------------------- transfer and voice


def test_the_figure_of_transfer_has_a_panel_a_set_and_voice_a_bar_a_model(series: dict[str, Series]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.style.context(["default", STYLE]):
        panels = figures.DRAWINGS["transfer"](series["transfer"]).axes
        (bars,) = figures.DRAWINGS["voice"](series["voice"]).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["personas: study", "personas: shipped"]
    drawn = {line.get_label(): [*line.get_ydata()] for line in panels[1].lines}
    rows_ = [row for row in series["transfer"].rows if row.personas == "shipped"]
    assert drawn["6A anchor"] == [row.separation for row in rows_]
    assert drawn["baseline"] == [row.separation_baseline for row in rows_]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([1, 0.25, 0.8])


def test_voice_is_a_share_of_the_base_with_a_paired_interval(study: Path, series: dict[str, Series]) -> None:
    with open(study / "figures" / "voice.csv", newline="") as file:
        found = {row["model"]: row for row in csv.DictReader(file)}
    assert found.keys() == {"base", "1 baseline", "6A anchor"}
    assert float(found["1 baseline"]["share"]) == pytest.approx(0.25)
    for row in series["voice"].rows:  # every question says the same share, so that resampling them changes nothing
        assert (row.share_low, row.share_high) == pytest.approx((row.share, row.share))


def test_voice_on_other_responses_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SyntheticStudy(tmp_path)
    baseline = made.baseline()
    (tmp_path / "base").mkdir()
    write_record(tmp_path / "base" / "voice.json", spoken(0.08))
    write_record(baseline / "voice.json", spoken(0.02, responses="others"))
    with pytest.raises(Missing, match="other responses"):
        voice(made.read())
    monkeypatch.setattr(write, "draw_all", lambda series: None)
    write_report(tmp_path)
    assert "The figure voice is left out: voice was measured on other responses" in (tmp_path / "report.md").read_text()


def test_a_refuted_pass_is_not_called_confirmed(tmp_path: Path) -> None:
    made = SyntheticStudy(tmp_path)
    made.baseline()
    made.cell("4A", "prompts", 0.943, 0.93)
    made.confirm("4A", "prompts", (0.944, 0.95), (0.955, 0.95), (0.944, 0.95))
    results = made.read()
    (row,) = texts(passer_table(results))["4A prompts"]
    assert row["confirmed"] == "no" and "102: 0.9550, 0.95" in row["fresh seeds"]
