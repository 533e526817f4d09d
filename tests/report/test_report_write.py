"""A study's directory in, its report out: every verdict, unfinished studies, what is missing, the same bytes again."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faults.test_full_disk import no_room
from report.conftest import PERSONAS, PROTOCOL, answers

from minipersona.errors import DiskFull, UserError
from minipersona.records import from_dict, to_dict
from minipersona.report import write, write_report
from minipersona.report.passer_tables import layer_table
from minipersona.run.result import MeasurementProtocol
from minipersona.verdict.calibration import calibrate
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import VERDICTS, Verdict, judge_study

SMALL = [
    ("1", "baseline", {}, 0.9728, 1.0),
    ("2A", "beta=0.1", {"beta": 0.1}, 0.9731, 0.97),
    ("5A", "99:1", {"ratio": "99:1", "broad_fraction": 0.01}, 0.9724, 0.99),
]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a test of the text the time that figures take."""
    monkeypatch.setattr(write, "draw_all", lambda series: None)


def files(directory: Path) -> dict[str, bytes]:
    written = [directory / "report.md", directory / "report.html", *sorted((directory / "figures").iterdir())]
    return {file.name: file.read_bytes() for file in written}


def rows(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    section = markdown.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if "---" not in line]


# ---------------------------------------------------------------- the whole


def test_a_rebuild_gives_the_same_bytes(whole: Any, tmp_path: Path) -> None:
    first = files(whole.directory)
    assert len(first) == 14 and {"cosines.png", "cosines.csv"} <= first.keys()
    again = tmp_path / "moved"
    shutil.copytree(whole.directory, again)
    shutil.rmtree(again / "figures")
    write_report(again)
    assert files(again) == first


def test_a_full_disk_leaves_the_earlier_report(new_study: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever of its files the room ends."""
    monkeypatch.setattr(write, "draw_all", lambda series: {one.name: bytes(5_000) for one in series})
    study = new_study(recipes=SMALL, with_vectors=False).write()
    write_report(study)
    first, stopped = files(study), set()
    for room in sorted({len(content) - 1 for content in first.values()}):
        with no_room(room), pytest.raises(DiskFull) as caught:
            write_report(study)
        assert re.search(r"cannot write .*; [\d,]+ bytes are needed and [\d,]+ MiB are free", str(caught.value))
        assert files(study) == first
        stopped.add(Path(str(caught.value).split(":")[0]).suffix)
    assert stopped == {".csv", ".png", ".md", ".html"}
    write_report(study)
    assert files(study) == first and not list(study.rglob(".*.tmp"))


def test_the_verdict_comes_first_and_every_recipe_is_there(whole: Any) -> None:
    text = (whole.directory / "report.md").read_text()
    verdict = judge_study(read_study(whole.directory))
    assert text.index("## Verdict") < text.index("## What was measured") < text.index("## All recipes")
    assert verdict.sentence in text
    table = rows(text, "All recipes")
    assert table[1][0] == "untrained base" and table[1][9:11] == ["PASS", "FAIL"]
    assert table[2][:2] == ["baseline, step 375", "1"]
    others = {(row[1], row[0]) for row in table[3:]}
    assert {(phase, name) for phase, name, *_ in whole.recipes if phase != "1"} <= others
    assert {("1", f"baseline, step {step}") for step in (10, 25, 50, 100, 200)} <= others


def test_a_row_says_what_the_results_say(whole: Any) -> None:
    results = read_study(whole.directory)
    table = {(row[1], row[0]): row for row in rows((whole.directory / "report.md").read_text(), "All recipes")[1:]}
    for cell in results.cells:
        if cell.status == "done" and cell.phase not in ("1", "5C"):
            row, final = table[cell.phase, cell.name], cell.final
            assert row[3] == f"{final.m1:.4f}" and row[6] == f"{final.learned:.2f}"
            assert row[7] == f"{final.learned_personas:.2f}"
            assert row[9] == ("PASS" if final.registered_pass else "FAIL")
            assert ("collapsed" in row[12].split(", ")) is final.collapsed
    assert table["2B", "lambda=0.001"][12] == "collapsed, ineffective"
    assert table["3", "r=16 lr=0.0001"][14] == "failed: OutOfMemoryError: no memory"
    assert table["5B", "1:1"][14].startswith("missing")


def test_the_suites_have_the_base_first(whole: Any) -> None:
    text = (whole.directory / "report.md").read_text()
    behaviour, instructions = rows(text, "Emergent and hidden misalignment"), rows(text, "Instruction following")
    assert [row[0] for row in behaviour[1:]] == ["untrained base"] * 2 + ["5C collapse"] * 2
    assert [row[0] for row in instructions[1:]] == ["untrained base", "1 baseline", "5A 75:25"]
    assert behaviour[3][5:7] == ["4", "0.50%"] and instructions[3][2] == "61.0%"


def test_the_page_holds_its_figures_and_asks_for_nothing(whole: Any) -> None:
    page = (whole.directory / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_more_recipes_than_cells_are_explained(whole: Any) -> None:
    """A checkpoint of phase 1 is a recipe; 28 cells are planned, one failed and one is missing."""
    facts = dict(rows((whole.directory / "report.md").read_text(), "Verdict"))
    assert facts["Cells"] == "26 done, 1 failed, 1 missing"
    assert (
        facts["Recipes judged"]
        == "31: the baseline at each of its 6 checkpoints and 25 other recipes at their last step"
    )
    assert "1 of 28 planned cells are not done" in (whole.directory / "report.md").read_text()


@pytest.mark.parametrize("scored, said", [(0, "none of 3,200"), (300, "1,200 of 3,200"), (796, "")])
def test_answers_that_the_judge_did_not_score_are_one_sentence(
    new_study: Callable[..., Any], undrawn: None, scored: int, said: str
) -> None:
    suite = answers(0)
    counts = {"scored": scored, "coherent": scored}
    suites = {key: suite | {"sets": {name: row | counts for name, row in suite["sets"].items()}}
              for key in ("base", "2A beta=0.1")}  # fmt: skip
    write_report(new_study(recipes=SMALL, with_vectors=False, behaviour=suites).write())
    text = (new_study().directory / "report.md").read_text()
    section = text.split("## Emergent and hidden misalignment")[1].split("\n## ")[0]
    assert "Judge: kind local." in section
    assert ("| untrained base |" in section) is (scored > 0)
    assert re.findall(r"The judge scored (.*) answers of 2 models", section) == [said][: bool(said)]


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize("kind", VERDICTS)
def test_every_verdict_renders(new_study: Callable[..., Any], undrawn: None, kind: str) -> None:
    study = new_study(recipes=SMALL, with_vectors=False)
    verdict = replace(judge_study(read_study(study.write())), verdict=kind, sentence=f"A sentence about {kind}.")
    study.verdict = to_dict(verdict)
    write_report(study.write())
    text = (study.directory / "report.md").read_text()
    assert f"A sentence about {kind}." in text
    assert ("tested space" in text) is (kind == "h_null")


def test_a_verdict_that_is_missing_or_older_than_the_study_is_judged_now(
    new_study: Callable[..., Any], undrawn: None
) -> None:
    study = new_study(recipes=SMALL, sudden=True, with_vectors=False)
    write_report(study.write())
    text, verdict = study.directory / "report.md", study.directory / "verdict.json"
    assert "**Inconclusive**" in text.read_text()
    current = json.loads(verdict.read_text())
    verdict.write_text(json.dumps(current | {"sentence": "Kept."}))
    write_report(study.directory)
    assert "Kept." in text.read_text()  # control: a verdict on just these results is not made again
    for cell in study.directory.glob("cells/2A-*/result.json"):
        result = json.loads(cell.read_text())
        changed = {"m1": 0.94, "m1_ci95": [0.939, 0.941], "m1_without": dict.fromkeys(PERSONAS, 0.94)}
        result["checkpoints"][-1].update(changed, eval_loss=1.06, persona_loss=1.06, between_variance=200.0)
        cell.write_text(json.dumps(result))
    write_report(study.directory)
    assert "**Unconfirmed: a recipe passes" in text.read_text() and "Kept." not in text.read_text()
    assert json.loads(verdict.read_text())["verdict"] == "unconfirmed"
    verdict.write_text(json.dumps({"verdict": "who knows", "sentence": "x"}))
    write_report(study.directory)
    assert json.loads(verdict.read_text())["verdict"] == "unconfirmed"


@pytest.mark.parametrize("missing", [{"2A beta=0.1"}, {"1 baseline"}, {f"{phase} {name}" for phase, name, *_ in SMALL}])
def test_an_unfinished_study_renders(new_study: Callable[..., Any], missing: set[str]) -> None:
    study = new_study(recipes=SMALL, missing=missing, sudden=True, with_vectors=False, with_frontier=False)
    write_report(study.write())
    text = (study.directory / "report.md").read_text()
    assert "**Incomplete**" in text
    section = text.split("## What was not run, and why")[1]
    assert all(name in section for name in missing)


def test_a_search_that_ended_says_which_phases_were_skipped(new_study: Callable[..., Any], undrawn: None) -> None:
    recipes = [("1", "baseline", {}, 0.9411, 1.0), *SMALL[1:]]
    study = new_study(recipes=recipes, missing={"2A beta=0.1", "5A 99:1"}, with_vectors=False)
    study.settings["exhaustive"] = False
    write_report(study.write())
    text = (study.directory / "report.md").read_text()
    assert "**No collapse: there is nothing to rescue**" in text
    assert "Skipped, because an earlier phase ended the search: 2A KL to the base; 5A raw text mixed in." in text


def test_a_passer_says_which_phases_were_skipped(new_study: Callable[..., Any], undrawn: None) -> None:
    """A baseline that has not collapsed would not do: there is nothing to rescue then."""
    recipes = [SMALL[0], ("2A", "beta=0.1", {"beta": 0.1}, 0.9411, 0.97), SMALL[2]]
    study = new_study(recipes=recipes, missing={"5A 99:1"}, sudden=True, with_vectors=False)
    study.settings |= {"exhaustive": False, "stop_rule": "registered"}
    write_report(study.write())
    text = (study.directory / "report.md").read_text()
    assert "**Positive: a recipe passes**" in text
    assert "Skipped, because an earlier phase ended the search: 5A raw text mixed in." in text


# ---------------------------------------------------------------- what is not there


def test_without_vectors_the_cosines_are_left_out_with_a_line(new_study: Callable[..., Any]) -> None:
    study = new_study(recipes=SMALL)
    write_report(study.write())
    assert (study.directory / "figures" / "cosines.png").is_file()
    for file in study.directory.glob("cells/*/vectors/*"):
        file.unlink()
    write_report(study.directory)
    text = (study.directory / "report.md").read_text()
    assert re.search(r"The figure cosines is left out: there is no .*step-000000\.safetensors", text)
    assert not list((study.directory / "figures").glob("cosines.*"))  # nothing stale stays behind
    assert (study.directory / "figures" / "m1_by_step.png").is_file()


def test_without_matplotlib_the_report_says_what_to_install(
    new_study: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    study = new_study(recipes=SMALL, with_vectors=False)
    write_report(study.write())
    assert "minipersona[report]" in capsys.readouterr().err
    text = (study.directory / "report.md").read_text()
    assert "pip install 'minipersona[report]'" in text and "![" not in text
    names = {file.name for file in (study.directory / "figures").iterdir()}
    assert "m1_by_step.csv" in names and not [name for name in names if name.endswith(".png")]


def test_a_directory_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study\.toml"):
        write_report(tmp_path)


# ---------------------------------------------------------------- hostile content


def test_a_calibration_that_is_not_due_says_so_once(new_study: Callable[..., Any], undrawn: None) -> None:
    study = new_study(recipes=SMALL, with_vectors=False).write()
    not_due = calibrate(from_dict(MeasurementProtocol, {**PROTOCOL, "model": "tiny"}), {}, "")
    (study / "calibration.json").write_text(json.dumps(to_dict(not_due)))
    write_report(study)
    text = (study / "report.md").read_text()
    assert len(re.findall("not due", text, re.IGNORECASE)) == 1 and "Not due: " in text


def test_hostile_names_errors_and_notes_stay_text(new_study: Callable[..., Any]) -> None:
    hostile = "$x$ | <script>alert(1)</script> ```\n\ud800"
    study = new_study(
        recipes=[*SMALL, ("4A", hostile, {hostile: hostile}, 0.93, 0.9), ("4B", "r", {}, 0.93, 0.9)],
        notes={f"4A {hostile}": [hostile]},
        failed={"4B r": f"{hostile}\n````\n# not a heading"},
        with_vectors=False,
    )
    write_report(study.write())
    page, text = (study.directory / "report.html").read_text(), (study.directory / "report.md").read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(?<!\\)<script>", re.sub(r"(`{4,})text\n.*?\n\1\n", "", text, flags=re.DOTALL))
    assert "`````text\n" in text
    (study.directory / "figures" / "m1_by_step.png").stat()


def test_seeds_show_their_spread(new_study: Callable[..., Any], undrawn: None) -> None:
    """What seed 43 learned is a share of what its own baseline learned, 0.95 / 1.01."""
    two = [("2A", "beta=0.1 seed=43", {"beta": 0.1}, 0.9741, 0.95), ("1", "baseline seed=43", {}, 0.9730, 1.01)]
    study = new_study(recipes=[*SMALL, *two], with_vectors=False)
    write_report(study.write())
    table = rows((study.directory / "report.md").read_text(), "Spread over seeds")
    half = 12.7062 * 0.0005  # Student's 97.5% point at one degree of freedom, times the standard error
    interval = f"[{0.9736 - half:.4f}, {0.9736 + half:.4f}]"
    (row,) = (row for row in table if row[0] == "2A beta=0.1")
    assert row[1:5] == ["42, 43", "0.9736", interval, "0.955"] and row[-2:] == ["-", "-"]


def test_the_calibration_has_its_table(new_study: Callable[..., Any], undrawn: None) -> None:
    study = new_study(recipes=SMALL, with_vectors=False)
    study.write()
    write_report(study.directory)
    text = (study.directory / "report.md").read_text()
    assert "Passed: it agrees." in text
    assert rows(text, "Calibration")[1] == ["20", "0.8996", "0.9000", "-0.0004", "PASS"]


def test_every_layer_of_the_recipe_that_a_verdict_names_has_a_row(new_study: Callable[..., Any]) -> None:
    study = new_study(recipes=SMALL, with_vectors=False)
    study.write()
    models = [
        {"m1": {"10": value, "9": value - 0.1}, "between_variance": 2.0, "within_variance": 1.0}
        for value in (0.9, 0.95, 0.91)
    ]
    names = {key: key for key in ("personas", "personas_digest", "questions", "questions_digest")}
    own = {**names, **dict(zip(("base", "baseline", "recipe"), models, strict=True))}
    transfer = {"baseline": "b", "cell": f"{1:012x}", "step": 375, "layer": 10, "sets": {"study": own}, "missing": {}}
    (study.directory / "cells" / study.cell_id(1) / "transfer.json").write_text(json.dumps(transfer))
    results = read_study(study.directory)

    def table(recipe: Any) -> Any:
        return layer_table(cast(Verdict, SimpleNamespace(recipe=recipe, beyond=None)), results)

    found = table(SimpleNamespace(hashes=(f"{1:012x}",), cell="2A beta=0.1"))
    assert [[cell.text for cell in row] for row in found.rows] == [
        ["9", "0.8000", "0.8500", "0.8100"], ["10", "0.9000", "0.9500", "0.9100"],
    ]  # fmt: skip
    assert table(None) is None and table(SimpleNamespace(hashes=(f"{2:012x}",), cell="5A 99:1")) is None
