"""H1 to H5 and phase 5's questions: each verdict from hand-made cells, and the number that turns it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_study import SyntheticStudy, behaviour

from minipersona.verdict.findings import Finding, RecipePoint
from minipersona.verdict.verdict import judge_study

Row = tuple[int, float, float]


def hypothesis(study: SyntheticStudy, name: Any) -> Finding:
    return judge_study(study.read()).hypotheses[name]


@pytest.mark.parametrize(
    "rows, verdict",
    [
        ([(10, 0.91, 0.1), (25, 0.94, 0.2), (375, 0.98, 1.0)], "supported"),
        ([(10, 0.91, 0.1), (25, 0.951, 0.2), (375, 0.98, 1.0)], "refuted"),  # lost by step 25
        ([(10, 0.91, 0.1), (25, 0.94, 0.2), (100, 0.99, 0.8), (375, 0.98, 1.0)], "refuted"),  # falls again
        ([(10, 0.91, 0.1), (25, 0.94, 0.2), (100, 0.9815, 0.8), (375, 0.98, 1.0)], "supported"),  # within the intervals
        ([(10, 0.895, 0.1), (25, 0.94, 0.2), (375, 0.98, 1.0)], "refuted"),  # falls below the base first
        ([(10, 0.90, 0.1), (375, 0.901, 1.0)], "refuted"),  # no collapse
        ([(100, 0.96, 0.5), (375, 0.98, 1.0)], "undecided"),  # nothing measured early
        ([(2, 0.91, 0.1), (3, 0.96, 0.2), (30, 0.98, 1.0)], "supported"),  # 25 of 375 steps are 2 of 30
        ([(2, 0.95, 0.1), (30, 0.98, 1.0)], "refuted"),
    ],
)
def test_h1_is_about_the_dose_curve(tmp_path: Path, rows: list[Row], verdict: str) -> None:
    study = SyntheticStudy(tmp_path)
    study.cell("1", "baseline", rows=rows)
    assert hypothesis(study, "H1").verdict == verdict


FAMILIES = {"H2": ("2A", "2B"), "H3": ("3",), "H4": ("4A", "4B"), "H5": ("5A", "5B")}


def family(path: Path, phases: tuple[str, ...], m1: float, learned: float) -> SyntheticStudy:
    study = SyntheticStudy(path)
    study.baseline()
    for phase in phases:
        study.cell(phase, "90:10", 0.98, 1.0, answers=behaviour(0))
        study.cell(phase, "80:20", m1, learned, answers=behaviour(0))
    study.file("base/behaviour.json", behaviour(0))
    return study


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_supported_by_one_pass_and_refuted_by_none(tmp_path: Path, name: str) -> None:
    phases = FAMILIES[name]
    assert hypothesis(SyntheticStudy(tmp_path / "none"), name).verdict == "not tested"
    assert hypothesis(family(tmp_path / "pass", phases, 0.949, 0.5), name).verdict == "supported"
    assert hypothesis(family(tmp_path / "m1", phases, 0.95, 0.5), name).verdict == "refuted"
    assert hypothesis(family(tmp_path / "hollow", phases, 0.949, 0.49), name).verdict == "refuted"
    waiting = family(tmp_path / "waiting", phases, 0.95, 0.5)
    waiting.missing(phases[-1], "70:30")
    assert hypothesis(waiting, name).verdict == "undecided"
    failed = family(tmp_path / "failed", phases, 0.95, 0.5)
    failed.event(phases[-1], "70:30", "failed")
    found = hypothesis(failed, name)
    assert found.verdict == "undecided" and "70:30" in found.evidence
    if len(phases) > 1:
        assert hypothesis(family(tmp_path / "half", phases[:1], 0.95, 0.5), name).verdict == "undecided"


def test_the_evidence_has_the_numbers(tmp_path: Path) -> None:
    found = hypothesis(family(tmp_path, ("3",), 0.9612, 0.55), "H3")
    assert "0 of 2" in found.evidence and "0.9612" in found.evidence and "0.9800" in found.evidence
    assert found.numbers.lowest_m1_that_teaches == RecipePoint("3 80:20", 0.9612, pytest.approx(0.55))


def test_a_family_is_judged_by_the_substantive_rule_whatever_stops_the_search(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, stop_rule="registered")
    study.baseline()
    study.cell("3", "r=4", 0.91, 0.1)
    assert hypothesis(study, "H3").verdict == "refuted"


# ---------------------------------------------------------------- phase 5


def questions(path: Path, mixture: float, steering: float | None = 0.95, **more: Any) -> dict[Any, Finding]:
    study = SyntheticStudy(path, narrow=more.pop("narrow", "tulu"))
    study.baseline(vectors=True)
    study.cell("EM", "unmixed", 0.99, 0.5, vectors=True)
    study.cell("5A", "95:5", mixture, more.pop("learned", 0.9), vectors=True, answers=behaviour(0), **more)
    study.cell("5B", "1:1", 0.985, 0.9, vectors=True)
    if steering is not None:
        study.cell("5C", "villain - assistant", steering, 0.9, vectors=True)
        study.cell("5C", "collapse", 0.90, 0.1, vectors=True, noise_seed=5)  # lower, and teaches nothing
    return {**judge_study(study.read()).phase5}


def test_what_learned_too_little_to_be_compared_refutes_nothing(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline(vectors=True)
    for phase, name in (("5A", "95:5"), ("5B", "1:1")):
        study.cell(phase, name, 0.96, 0.2, vectors=True, answers=behaviour(0))
    study.cell("5C", "collapse", 0.90, 0.9, vectors=True, answers=behaviour(0))
    study.file("base/behaviour.json", behaviour(0))
    judged = judge_study(study.read())
    assert judged.phase5["recovers_0.90"].verdict == judged.phase5["beats_steering"].verdict == "undecided"
    assert "learn too little" in judged.hypotheses["H5"].implication
    study.cell("5B", "3:1", 0.96, 0.9, vectors=True, answers=behaviour(0))  # control: one that teaches
    judged = judge_study(study.read())
    assert judged.phase5["recovers_0.90"].verdict == judged.phase5["beats_steering"].verdict == "refuted"
    assert "does not hold the personas apart" in judged.hypotheses["H5"].implication


def test_does_any_mixture_recover_the_base(tmp_path: Path) -> None:
    assert questions(tmp_path / "a", 0.90)["recovers_0.90"].verdict == "supported"
    assert questions(tmp_path / "b", 0.92)["recovers_0.90"].verdict == "refuted"
    assert questions(tmp_path / "c", 0.90, learned=0.1)["recovers_0.90"].verdict == "refuted"


def test_does_any_mixture_beat_steering(tmp_path: Path) -> None:
    assert questions(tmp_path / "a", 0.94)["beats_steering"].verdict == "supported"
    found = questions(tmp_path / "b", 0.96)["beats_steering"]
    assert found.verdict == "refuted" and "villain - assistant" in found.evidence
    assert questions(tmp_path / "c", 0.94, learned=0.1)["beats_steering"].verdict == "refuted"
    assert questions(tmp_path / "d", 0.94, steering=None)["beats_steering"].verdict == "not tested"
    # a lead within the noise of the questions is none
    assert questions(tmp_path / "e", 0.9499, noise_seed=9)["beats_steering"].verdict == "refuted"


def test_does_mixing_beat_not_mixing(tmp_path: Path) -> None:
    assert questions(tmp_path / "a", 0.97)["mixin_beats_none"].verdict == "supported"
    assert questions(tmp_path / "b", 0.982)["mixin_beats_none"].verdict == "refuted"
    # with EM as the narrow data the reference is the unmixed EM cell, with M1 0.99
    assert questions(tmp_path / "c", 0.987, narrow="em")["mixin_beats_none"].verdict == "supported"
    beyond = questions(tmp_path / "d", 0.97, learned=-0.1)["mixin_beats_none"]  # its loss is over the bound
    assert beyond.verdict == "refuted" and [row.cell for row in beyond.numbers.mixtures] == ["5B 1:1"]


def test_any_of_n_is_asked_at_a_level_for_n(tmp_path: Path) -> None:
    rows = questions(tmp_path, 0.97)["mixin_beats_none"].numbers.mixtures
    assert [row.level for row in rows] == [pytest.approx(0.975)] * 2
