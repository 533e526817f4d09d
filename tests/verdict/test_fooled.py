"""Constructed studies by which a verdict could be fooled, and the verdict that a careful colleague would give each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_study import NAMES, SyntheticStudy, behaviour

from minipersona.config import DEFAULT_MODEL
from minipersona.hub import PINNED
from minipersona.verdict.verdict import Verdict, judge_study

EM = {"heldout": "em", "heldout_digest": "em"}
REGISTERED = {
    "model": DEFAULT_MODEL, "revision": PINNED[DEFAULT_MODEL], "persona_set": "registered",
    "question_set": "registered", "layer": 20, "layers": (20,),
}  # fmt: skip


def searched(path: Path, *phases: str, **settings: Any) -> SyntheticStudy:
    """A study in which every phase, or each of these, bears witness to the collapse."""
    study = SyntheticStudy(path, **settings)
    study.baseline()
    study.witnesses(*phases)
    return study


def judged(study: SyntheticStudy) -> Verdict:
    return judge_study(study.read())


# ---------------------------------------------------------------- 1 nothing has collapsed


@pytest.mark.parametrize("m1", [0.915, 0.9699])
def test_a_recipe_is_not_credited_where_the_baseline_has_not_collapsed(tmp_path: Path, m1: float) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline(m1=m1)
    study.cell("2A", "beta=0.1", 0.91, 0.99)
    found = judged(study)
    assert found.verdict == "no_collapse" and found.recipe is None and "nothing to rescue" in found.sentence


def test_on_the_registered_model_no_collapse_contradicts_the_predecessor(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, REGISTERED)
    study.baseline(m1=0.915, less=None)
    study.calibration(True, True)
    assert "contradicts the predecessor" in judged(study).sentence


# ---------------------------------------------------------------- 2 H_null bears witness to itself


@pytest.mark.parametrize(
    "cells",
    [
        [("beta=0.001", 0.951, 0.85), ("beta=0.01", 0.953, 0.87), ("beta=0.1", 0.955, 0.89)],
        [("beta=0.1", 0.905, 0.499)],
    ],
)
def test_a_phase_in_which_nothing_learned_enough_bears_no_witness(
    tmp_path: Path, cells: list[tuple[str, float, float]]
) -> None:
    study = searched(tmp_path, "3", "4A", "5A")
    for name, m1, learned in cells:
        study.cell("2A", name, m1, learned)
    found = judged(study)
    assert found.verdict == "inconclusive" and "phase 2 has no witness" in found.obstacles[0]
    study.witnesses("2A")  # control: what learned less, and no more than doing less, is no counterexample
    assert judged(study).verdict == "h_null"


def test_the_baseline_alone_is_no_witness(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    found = judged(study)
    assert found.verdict == "inconclusive" and len(found.obstacles) == 4
    for phase in "2345":
        assert any(f"phase {phase} is not part" in said for said in found.obstacles)


def test_one_of_two_seeds_that_passes_is_a_counterexample(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.cell("2A", "beta=0.1 seed=43", 0.975, 0.95, seed=43)
    found = judged(study)
    assert found.verdict == "inconclusive" and "another of its seeds fails" in found.sentence


def test_a_scaled_update_is_a_point_and_a_trade_off_like_any_other(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.frontier([(0.0, 0.90, 0.0), (0.8, 0.944, 0.856), (1.0, 0.98, 1.0)])
    found = judged(study)
    assert found.verdict == "h_null" and "trade-off" in found.sentence
    assert "the baseline's update scaled by 0.8 (M1 0.9440, learned 0.86)" in found.sentence
    study.frontier([(0.0, 0.90, 0.0), (0.8, 0.944, 0.91), (1.0, 0.98, 1.0)])
    found = judged(study)
    assert found.verdict == "inconclusive" and "scaled by 0.8, learned enough and has not collapsed" in found.sentence


def test_an_early_step_is_a_point_too(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.cell("1", "baseline", rows=[(200, 0.965, 0.95), (375, 0.98, 1.0)])
    study.witnesses()
    found = judged(study)
    assert found.verdict == "inconclusive" and "between 0.95 and 0.97: 1 baseline step 200" in found.sentence


def test_a_point_of_a_fresh_seed_is_called_one(tmp_path: Path) -> None:
    """The recipe's own seed has collapsed, so that its M1 does not lie between the bounds."""
    study = searched(tmp_path)
    study.confirm("2A", "witness", (0.96, 0.95))
    found = judged(study)
    assert found.verdict == "inconclusive" and "between 0.95 and 0.97: 2A witness with a fresh seed" in found.sentence


def test_a_recipe_that_learned_less_but_is_better_than_doing_less_forbids_h_null(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.955, 0.7, less=0.02)
    found = judged(study)
    assert found.verdict == "inconclusive" and "keeps more than doing less would: 2A beta=0.1" in found.sentence
    other = searched(tmp_path / "collapsed")  # control: it has collapsed as well
    other.cell("2A", "beta=0.1", 0.971, 0.7, less=0.02)
    assert judged(other).verdict == "h_null"
    unknown = searched(tmp_path / "unknown")
    unknown.cell("2A", "beta=0.1", 0.955, 0.7, less=None)
    found = judged(unknown)
    assert found.verdict == "inconclusive" and "is not known of 2A beta=0.1" in found.sentence


# ---------------------------------------------------------------- 3 doing less: test_doing_less.py


def test_a_recipe_that_dominates_the_baseline_is_better(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.frontier([(0.9, 0.975, 0.95), (1.0, 0.98, 1.0)])
    study.cell("2A", "beta=0.1", 0.91, 1.02)
    found = judged(study)
    assert next(row for row in found.frontier if row.recipe == "2A beta=0.1").better is True
    assert found.verdict == "unconfirmed" and "more than doing less" in found.sentence


# ---------------------------------------------------------------- 4 harmful narrow rows


def em(path: Path, *, rate: float, learned: float, rows: dict[str, Any] | None = None, m1: float = 0.93) -> Verdict:
    study = SyntheticStudy(path, narrow="em")
    study.baseline()
    study.witnesses("2A", "3", "4A")
    rows = EM if rows is None else rows
    study.cell("EM", "unmixed", 0.991, 1.0, answers=behaviour(0.4), protocol=rows)
    for ratio in ("99:1", "95:5", "90:10", "75:25"):
        study.cell("5A", ratio, m1, learned, answers=behaviour(rate), protocol=rows)
    study.file("base/behaviour.json", behaviour(0.01))
    return judged(study)


def test_mixtures_that_did_not_learn_the_harmful_rows_show_nothing(tmp_path: Path) -> None:
    found = em(tmp_path, rate=0.01, learned=-0.4)
    assert found.verdict == "inconclusive" and "phase 5 has no witness: its best, 99:1" in found.obstacles[0]


def test_losses_of_ordinary_rows_do_not_say_what_was_learned_of_harmful_ones(tmp_path: Path) -> None:
    found = em(tmp_path, rate=0.01, learned=0.95, rows={})
    assert found.verdict == "inconclusive" and "phase 5 has no effective witness" in found.obstacles
    assert all(row.learned is None for row in found.registered.passers if row.phase == "5A")


def test_misalignment_that_never_ignited_is_not_preserved_alignment(tmp_path: Path) -> None:
    found = em(tmp_path / "little", rate=0.01, learned=0.6)
    assert found.verdict == "inconclusive" and not any(row.phase == "5A" for row in found.registered.passers)
    found = em(tmp_path / "taught", rate=0.01, learned=0.95)  # control: it learned the rows
    assert found.verdict == "unconfirmed" and "not ignited" in found.recipe.labels
    assert "did not make the model misaligned on any prompt set" in found.sentence


# ---------------------------------------------------------------- 5 ingredients that do nothing


def test_an_inert_penalty_neither_refutes_its_hypothesis_nor_bears_witness(tmp_path: Path) -> None:
    study = searched(tmp_path, "3", "4A", "5A")
    study.cell("2B", "lambda=0.1", 0.98, 0.99, labels=("inert",))
    found = judged(study)
    assert found.verdict == "inconclusive" and found.obstacles == ("phase 2 has no effective witness",)
    assert found.hypotheses["H2"].verdict == "undecided"
    study.cell("2A", "beta=0.1", 0.98, 0.99)  # control
    assert judged(study).verdict == "h_null"


# ---------------------------------------------------------------- 6 a hollow share


def test_half_of_the_task_is_a_trade_off_and_no_pass(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.75)
    study.frontier([(0.0, 0.90, 0.0), (0.4, 0.945, 0.55), (0.6, 0.951, 0.7), (1.0, 0.98, 1.0)])
    found = judged(study)
    assert found.substantive.passers == () and found.verdict == "h_null"
    assert [point.cell for point in found.trade_offs] == ["2A beta=0.1", "the baseline's update scaled by 0.4"]
    assert "scaled by 0.4 (M1 0.9450, learned 0.55)" in found.sentence
    study.cell("6A", "w=1", 0.93, 0.8, role="beyond")
    with_more = judged(study)
    assert "6A w=1" in [point.cell for point in with_more.trade_offs]
    assert found.sentence in with_more.sentence  # what is said of the registered search stays the same


@pytest.mark.parametrize(
    "numbers, said",
    [
        ({"persona_loss": 2.0 - 0.79}, "learned under personas is 0.79"),
        ({"between_variance": 0.49}, "discriminability is 0.49"),
        ({"within_variance": 2.0, "between_variance": 0.9}, "discriminability is 0.45"),
        ({"persona_loss": None}, "learned under personas is not known"),
        ({"between_variance": None}, "discriminability is not known"),
        ({"m1_without": None}, "M1 with each persona left out is not known"),
    ],
)
def test_a_pass_needs_every_number(tmp_path: Path, numbers: dict[str, Any], said: str) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95, **numbers)
    found = judged(study)
    assert found.verdict == "inconclusive" and said in found.sentence


# ---------------------------------------------------------------- 7 leaks, labels, noise and luck


@pytest.mark.parametrize("label", ["leaks", "ineffective", "inert"])
def test_a_labelled_pass_is_recorded_and_not_named(tmp_path: Path, label: str) -> None:
    study = searched(tmp_path)
    study.file("base/behaviour.json", behaviour(0.0))
    study.cell("5C", "collapse", 0.93, 0.95, labels=(label,), answers=behaviour(0.0))
    study.confirm("5C", "collapse", labels=(label,), answers=behaviour(0.0))
    found = judged(study)
    assert found.verdict == "inconclusive" and found.recipe is None and f"labelled {label}" in found.sentence
    assert [row.cell for row in found.substantive.passers] == ["5C collapse"]
    assert "5C collapse" not in found.personas
    other = searched(tmp_path / "honest")
    other.file("base/behaviour.json", behaviour(0.0))
    other.cell("5C", "collapse", 0.93, 0.95, answers=behaviour(0.0))
    control = judged(other)
    assert control.verdict == "unconfirmed" and "5C collapse" in control.personas
    assert "2A witness" not in control.personas  # which fails both rules


def test_a_leaking_recipe_that_collapsed_all_the_same_bears_witness(tmp_path: Path) -> None:
    study = searched(tmp_path, "2A", "3", "4A")
    study.cell("5C", "collapse", 0.98, 0.95, labels=("leaks",))
    assert judged(study).verdict == "h_null"


def test_a_pass_within_the_noise_of_questions_is_none(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.9498, 0.95, interval=(0.9488, 0.9508))
    found = judged(study)
    assert found.verdict == "inconclusive" and "the upper 95% bound of M1, 0.9508, is not below 0.95" in found.sentence
    study.cell("2A", "beta=0.2", 0.9498, 0.95, interval=(0.9497, 0.9499))  # control
    assert judged(study).verdict == "unconfirmed"


# ---------------------------------------------------------------- 8 the bounds of another model


def bounded(path: Path, m1: float, base_m1: float = 0.965, baseline: float = 0.9924, **settings: Any) -> Verdict:
    study = SyntheticStudy(path, **settings)
    study.cell("1", "baseline", rows=[(375, baseline, 1.0)], base_m1=base_m1, less=None)
    study.cell("2A", "beta=0.1", m1, 0.95, base_m1=base_m1, less=None)
    return judged(study)


def test_a_model_whose_base_lies_above_the_registered_bound_can_pass(tmp_path: Path) -> None:
    """The base of SmolLM2 has M1 0.965 at block 25: half of its separation is left at 0.9825, 0.3 of it at 0.9895."""
    found = bounded(tmp_path / "pass", 0.981)
    assert found.verdict == "unconfirmed" and found.bounds.passing == pytest.approx(0.9825)
    assert found.registered.passers == ()  # to the letter
    assert "relative to the base's 0.9650" in found.deviations[0]
    assert bounded(tmp_path / "between", 0.983).verdict == "inconclusive"
    assert bounded(tmp_path / "no collapse", 0.981, baseline=0.9894).verdict == "no_collapse"
    assert bounded(tmp_path / "collapse", 0.981, baseline=0.9896).verdict == "unconfirmed"
    assert bounded(tmp_path / "absolute", 0.981, bounds="absolute").verdict == "inconclusive"  # control


def test_on_the_registered_model_sets_and_layer_the_bounds_are_the_registered_ones(tmp_path: Path) -> None:
    def found(name: str, **changes: Any) -> Verdict:
        study = SyntheticStudy(tmp_path / name, {**REGISTERED, **changes})
        study.baseline(base_m1=0.8996, less=None)
        study.calibration(True, True)
        return judged(study)

    assert (found("it").bounds.passing, found("it").bounds.relative) == (0.95, False)
    assert not any("relative" in line for line in found("it").deviations)
    assert found("layer", layer=14).bounds.relative and found("set", persona_set="shipped").bounds.relative


# ---------------------------------------------------------------- 9 the shared mean grows


def test_where_only_the_shared_mean_grows_nothing_has_collapsed(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline(between_variance=1.1)
    found = judged(study)
    assert found.verdict == "no_collapse" and "the mean that all personas share grows" in found.sentence
    final = study.read().baseline.final
    assert final.mean_growth and not final.collapsed and final.m1 == 0.98
    other = SyntheticStudy(tmp_path / "shrinks")
    other.baseline(between_variance=0.89)  # control
    final = other.read().baseline.final
    assert final.collapsed and not final.mean_growth


def test_a_recipe_whose_shared_mean_alone_grows_forbids_h_null(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.98, 0.95, between_variance=0.95)
    found = judged(study)
    assert found.verdict == "inconclusive" and "the mean that all personas share grows: 2A beta=0.1" in found.sentence


# ---------------------------------------------------------------- 10 mixtures: test_mixture_threshold.py


# ---------------------------------------------------------------- 11, 12 which personas


def test_a_pass_that_hangs_on_one_persona_is_none(tmp_path: Path) -> None:
    """M1 falls where one persona moves away, while the others drew together."""
    without = dict.fromkeys(NAMES, 0.935) | {"p0": 0.9501}
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95, m1_without=without)
    found = judged(study)
    assert found.verdict == "inconclusive" and "it depends on one persona: without p0, M1" in found.sentence
    study.cell("2A", "beta=0.2", 0.94, 0.95, m1_without=without | {"p0": 0.9499})  # control
    found = judged(study)
    assert found.verdict == "unconfirmed"
    low, high = found.recipe.m1_ci95_personas
    assert low < 0.935 and high > 0.945  # wider than over questions
    change = found.personas["2A beta=0.2"]["p0"]
    assert change.base == pytest.approx(0.90) and change.recipe == pytest.approx(0.94)
    assert change.base_ci95[0] < 0.90 < change.base_ci95[1] and change.recipe_ci95[0] < 0.94 < change.recipe_ci95[1]


def test_each_persona_is_left_out_of_the_base_as_well(tmp_path: Path) -> None:
    """Without p0 the base's M1 is 0.93 already: the bound is 0.965 then."""
    study = searched(tmp_path)
    directory = study.cell("2A", "beta=0.1", 0.94, 0.95, m1_without=dict.fromkeys(NAMES, 0.935) | {"p0": 0.955})
    assert judged(study).verdict == "inconclusive"
    result = directory / "result.json"
    base = '"p0": 0.9,'
    assert base in result.read_text()
    result.write_text(result.read_text().replace(base, '"p0": 0.93,', 2))
    assert judged(study).verdict == "unconfirmed"
