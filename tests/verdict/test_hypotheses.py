"""H1 to H5 and phase 5's questions: each verdict from hand-made cells, and the number that turns it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_study import SyntheticStudy, behaviour

from minipersona.config import DEFAULT_MODEL
from minipersona.hub import PINNED
from minipersona.verdict.findings import Finding, RecipePoint
from minipersona.verdict.verdict import judge_study

Row = tuple[int, float, float]
REGISTERED = {
    "model": DEFAULT_MODEL, "revision": PINNED[DEFAULT_MODEL], "persona_set": "registered",
    "question_set": "registered",
}  # fmt: skip


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


@pytest.mark.parametrize("rows, step", [
    ([(10, 0.94, 0.1), (50, 0.979, 0.6), (200, 0.9805, 0.9), (375, 0.98, 1.0)], 50),
    ([(10, 0.94, 0.1), (50, 0.975, 0.6), (200, 0.9805, 0.9), (375, 0.98, 1.0)], 200),
    ([(10, 0.94, 0.1), (50, 0.9788, 0.6), (200, 0.9815, 0.9), (375, 0.98, 1.0)], 50),  # the last interval alone counts
    ([(10, 0.98, 0.1), (50, 0.97, 0.6), (375, 0.98, 1.0)], 375),  # it has to stay there
    ([(10, 0.94, 0.1), (50, 0.985, 0.6), (375, 0.98, 1.0)], 375),  # it was higher
    ([(10, 0.94, 0.1), (375, 0.98, 1.0)], 375),
    ([(10, 0.90, 0.1), (375, 0.901, 1.0)], None),  # there is no collapse to saturate
])  # fmt: skip
def test_h1_says_where_the_collapse_saturates(tmp_path: Path, rows: list[Row], step: int | None) -> None:
    study = SyntheticStudy(tmp_path)
    study.cell("1", "baseline", rows=rows)
    assert hypothesis(study, "H1").numbers.saturated_at == step


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_supported_by_a_confirmed_pass_and_refuted_by_none(tmp_path: Path, name: str) -> None:
    phases = FAMILIES[name]
    assert hypothesis(SyntheticStudy(tmp_path / "none"), name).verdict == "not tested"
    passing = family(tmp_path / "pass", phases, 0.948, 0.91)
    found = hypothesis(passing, name)
    assert found.verdict == "undecided" and "is not confirmed by fresh seeds" in found.implication
    passing.confirm(phases[0], "80:20", answers=behaviour(0))
    assert hypothesis(passing, name).verdict == "supported"
    refuted = family(tmp_path / "refuted", phases, 0.948, 0.91)
    for phase in phases:
        refuted.confirm(phase, "80:20", (0.955, 0.95), answers=behaviour(0))
    assert hypothesis(refuted, name).verdict == "refuted"
    assert hypothesis(family(tmp_path / "m1", phases, 0.95, 0.91), name).verdict == "refuted"
    assert hypothesis(family(tmp_path / "hollow", phases, 0.948, 0.89), name).verdict == "refuted"
    waiting = family(tmp_path / "waiting", phases, 0.95, 0.91)
    waiting.missing(phases[-1], "70:30")
    assert hypothesis(waiting, name).verdict == "undecided"
    failed = family(tmp_path / "failed", phases, 0.95, 0.91)
    failed.event(phases[-1], "70:30", "failed")
    found = hypothesis(failed, name)
    assert found.verdict == "undecided" and f" Not done: {phases[-1]} 70:30." in found.evidence
    assert "Not done" not in hypothesis(passing, name).evidence  # the control
    if len(phases) > 1:
        assert hypothesis(family(tmp_path / "half", phases[:1], 0.95, 0.91), name).verdict == "undecided"


def test_what_a_phase_runs_beside_its_registered_cells_counts_for_its_hypothesis(tmp_path: Path) -> None:
    """R3F is inert at the registered strengths; at one that is not, H2 can be refuted."""
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.witnesses("2A")
    study.cell("2B", "lambda=0.1", 0.98, 1.0, labels=("inert",))
    study.cell("2B", "shuffled", 0.98, 1.0, role="control")
    assert hypothesis(study, "H2").verdict == "undecided"
    study.cell("2B", "lambda=0.1 xT", 0.98, 0.99, role="beyond")
    assert hypothesis(study, "H2").verdict == "refuted"


def test_the_evidence_has_the_numbers(tmp_path: Path) -> None:
    found = hypothesis(family(tmp_path, ("3",), 0.9612, 0.95), "H3")
    assert "0 of 2" in found.evidence and "0.9612" in found.evidence and "0.9800" in found.evidence
    assert found.numbers.lowest_m1_that_teaches == RecipePoint("3 80:20", 0.9612, pytest.approx(0.95))


# ---------------------------------------------------------------- H3: against rank 32 at the same learning rate


def low_rank(path: Path, own: float, full: float | None) -> SyntheticStudy:
    """A confirmed pass of rank 4 at a learning rate of 1e-4, and rank 32 there."""
    study = SyntheticStudy(path)
    study.baseline()
    knobs: dict[str, int | float | str] = {"rank": 4, "learning_rate": 1e-4}
    study.cell("3", "r=4 lr=0.0001", own, 0.95, knobs=knobs)
    study.confirm("3", "r=4 lr=0.0001", *[(own, 0.95)] * 3, knobs=knobs)
    if full is not None:
        study.cell("3", "r=32 lr=0.0001", full, 1.0, role="reference", knobs={**knobs, "rank": 32})
    return study


def test_a_pass_that_rank_32_shares_is_not_the_rank_s_doing(tmp_path: Path) -> None:
    assert hypothesis(low_rank(tmp_path / "own", 0.94, 0.975), "H3").verdict == "supported"
    shared = hypothesis(low_rank(tmp_path / "shared", 0.94, 0.94), "H3")
    assert shared.verdict == "refuted" and "not because of the rank" in shared.implication
    unknown = hypothesis(low_rank(tmp_path / "unknown", 0.94, None), "H3")
    assert unknown.verdict == "undecided" and "rank 32 at the same learning rate is not measured" in unknown.implication


def test_the_rival_is_the_one_with_the_same_learning_rate(tmp_path: Path) -> None:
    study = low_rank(tmp_path, 0.94, 0.975)
    study.cell("3", "r=8 lr=2e-05", 0.975, 0.9, knobs={"rank": 8, "learning_rate": 2e-5})
    rows = hypothesis(study, "H3").numbers.against_same_rate
    assert {row.cell: row.rival for row in rows} == {
        "3 r=4 lr=0.0001": "3 r=32 lr=0.0001",
        "3 r=8 lr=2e-05": "1 baseline",
    }
    assert [row.level for row in rows] == [pytest.approx(0.975)] * 2  # as many as there are settings


@pytest.mark.parametrize("m1, word", [(0.9629, "unlike"), (0.9631, "as"), (0.9829, "as"), (0.9831, "unlike")])
def test_the_predecessor_s_own_recipe_is_reproduced_or_not(tmp_path: Path, m1: float, word: str) -> None:
    study = SyntheticStudy(tmp_path, REGISTERED)
    study.baseline()
    knobs: dict[str, int | float | str] = {"rank": 32, "learning_rate": 1e-4}
    study.cell("3", "r=4 lr=2e-05", 0.98, 1.0)
    study.cell("3", "r=32 lr=0.0001", m1, 1.0, role="reference", knobs=knobs)
    assert f"ends at M1 {m1:.4f}, {word} the predecessor's 0.9730" in hypothesis(study, "H3").evidence


def test_a_family_is_judged_by_the_substantive_rule_whatever_stops_the_search(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, stop_rule="registered")
    study.baseline()
    study.cell("3", "r=4", 0.91, 0.1)
    assert hypothesis(study, "H3").verdict == "refuted"


# ---------------------------------------------------------------- phase 5


def questions(path: Path, mixture: float, steering: float | None = 0.95, **more: Any) -> dict[Any, Finding]:
    narrow = more.pop("narrow", "tulu")
    study = SyntheticStudy(path, narrow=narrow)
    study.baseline()
    rows = {"heldout": "em", "heldout_digest": "em"} if narrow == "em" else None
    if narrow == "em":
        study.cell("EM", "unmixed", 0.99, 1.0, protocol=rows)
    study.cell("5A", "95:5", mixture, more.pop("learned", 0.95), answers=behaviour(0), protocol=rows, **more)
    study.cell("5B", "1:1", 0.985, 0.95, protocol=rows)
    if steering is not None:
        study.cell("5C", "villain - assistant", steering, 0.95, protocol=rows)
        study.cell("5C", "collapse", 0.90, 0.1, noise_seed=5, protocol=rows)  # lower, and teaches nothing
    return {**judge_study(study.read()).phase5}


def test_what_learned_too_little_to_be_compared_refutes_nothing(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    for phase, name in (("5A", "95:5"), ("5B", "1:1")):
        study.cell(phase, name, 0.96, 0.2, answers=behaviour(0))
    study.cell("5C", "collapse", 0.90, 0.95, answers=behaviour(0))
    study.file("base/behaviour.json", behaviour(0))
    judged = judge_study(study.read())
    assert judged.phase5["recovers_0.90"].verdict == judged.phase5["beats_steering"].verdict == "undecided"
    assert "learn too little" in judged.hypotheses["H5"].implication
    study.cell("5B", "3:1", 0.96, 0.95, answers=behaviour(0))  # control: one that teaches
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
