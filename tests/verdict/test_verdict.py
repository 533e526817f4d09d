"""Hand-made studies and the verdict that each must get; beside each, the one number that changes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_study import FRESH, SyntheticStudy, behaviour

from minipersona.config import DEFAULT_MODEL
from minipersona.hub import PINNED
from minipersona.study_config import PHASES
from minipersona.verdict.decision import awaiting_confirmation, decide
from minipersona.verdict.recipe_results import recipe_results
from minipersona.verdict.verdict import VERDICTS, FailedCell, Verdict, current_verdict, judge_study


def verdict_of(study: SyntheticStudy) -> Verdict:
    results = study.read()
    judged, decision = judge_study(results), decide(results)
    assert (decision.verdict, decision.recipe, decision.confirmed) == (judged.verdict, judged.recipe, judged.confirmed)
    assert current_verdict(results) == judged == current_verdict(results)  # written, and read back
    return judged


def searched(path: Path, **settings: Any) -> SyntheticStudy:
    """A study in which every phase bears witness to the collapse."""
    study = SyntheticStudy(path, **settings)
    study.baseline()
    study.witnesses()
    return study


# ---------------------------------------------------------------- the seven verdicts


def test_where_everything_that_teaches_collapses_h_null_holds(tmp_path: Path) -> None:
    judged = verdict_of(searched(tmp_path))
    assert judged.verdict == "h_null" and judged.obstacles == () and judged.recipe is None
    assert "a property of SFT itself" in judged.sentence


@pytest.mark.parametrize(
    "m1, learned, verdict",
    [
        (0.98, 1.0, "h_null"),
        (0.9701, 0.91, "h_null"),
        (0.9699, 0.91, "inconclusive"),
        (0.9699, 0.89, "h_null"),  # too little learned to be a counterexample, and no better than doing less
        (0.951, 1.0, "inconclusive"),
        (0.948, 0.9001, "unconfirmed"),
        (0.948, 0.8999, "h_null"),  # kept by learning less: a trade-off, no pass and no counterexample
        (0.9495, 1.0, "inconclusive"),  # its interval reaches 0.9505
    ],
)
def test_one_recipe_decides_by_its_numbers(tmp_path: Path, m1: float, learned: float, verdict: str) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", m1, learned)
    judged = verdict_of(study)
    assert judged.verdict == verdict
    assert (judged.recipe is not None) == (verdict == "unconfirmed")


def test_a_pass_that_every_fresh_seed_repeats_is_positive(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    judged = verdict_of(study)
    assert (judged.verdict, judged.confirmed) == ("unconfirmed", None)
    assert judged.sentence.startswith("Unconfirmed: a recipe passes") and "not run with fresh seeds" in judged.sentence
    study.confirm("2A", "beta=0.1", (0.94, 0.95), (0.945, 0.91))
    judged = verdict_of(study)
    assert (judged.verdict, judged.confirmed) == ("unconfirmed", None)  # two of three
    study.confirm("2A", "beta=0.1")
    study.plan = list({(entry.phase, entry.name): entry for entry in study.plan}.values())
    judged = verdict_of(study)
    assert (judged.verdict, judged.confirmed) == ("positive", True)
    assert judged.recipe is not None and judged.recipe.fresh_seeds == FRESH
    assert judged.sentence.startswith("There is a recipe that passes")
    assert "1 passes the substantive rule" in judged.sentence
    assert "passes again with each of 3 fresh seeds" in judged.sentence


def test_a_pass_that_a_fresh_seed_does_not_repeat_stays_unconfirmed(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.confirm("2A", "beta=0.1", (0.94, 0.95), (0.955, 0.95), (0.94, 0.95))
    judged = verdict_of(study)
    assert (judged.verdict, judged.confirmed) == ("unconfirmed", False)
    assert "of 3 fresh seeds it passes with 2 only" in judged.sentence
    assert judged.hypotheses["H2"].verdict != "supported"


def test_a_fresh_seed_is_held_against_the_baseline_with_that_seed(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    for seed in FRESH:  # baselines that learned twice as much
        study.cell("1", f"baseline seed={seed}", 0.98, 2.0, seed=seed, role="confirmation", less=None)
    study.confirm("2A", "beta=0.1")
    assert verdict_of(study).confirmed is False
    other = searched(tmp_path / "without")  # without such a baseline it is not said
    other.cell("2A", "beta=0.1", 0.94, 0.95)
    for seed in FRESH:
        other.cell("2A", f"beta=0.1 seed={seed}", 0.94, 0.95, seed=seed, role="confirmation")
    assert verdict_of(other).confirmed is None


def test_a_seed_of_the_study_is_not_a_fresh_one(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.confirm("2A", "beta=0.1", (0.94, 0.95), (0.94, 0.95))
    study.cell("2A", "beta=0.1 seed=42", 0.94, 0.95, role="confirmation")
    assert verdict_of(study).confirmed is None


def test_a_missing_fresh_seed_leaves_the_study_incomplete(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.missing("2A", "beta=0.1 seed=101", seed=101, role="confirmation")
    assert verdict_of(study).verdict == "incomplete"


@pytest.mark.parametrize(
    "role, whole", [("confirmation", True), ("registered", False), ("beyond", False), ("reference", False)]
)
def test_a_phase_is_whole_though_fresh_seeds_are_missing(tmp_path: Path, role: Any, whole: bool) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.missing("2A", "beta=0.1 seed=101" if role == "confirmation" else "another", seed=101, role=role)
    results = study.read()
    waiting = awaiting_confirmation(recipe_results(results), results)
    assert [recipe.id for recipe in waiting] == (["2A beta=0.1"] if whole else [])


def test_of_passers_a_confirmed_one_is_named_then_the_one_that_learned_most(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("3", "r=4", 0.93, 0.92)
    study.cell("3", "r=8", 0.945, 0.97)
    study.cell("3", "r=16", 0.951, 0.99)
    judged = verdict_of(study)
    assert judged.verdict == "unconfirmed" and judged.recipe.cell == "3 r=8"
    assert [row.cell for row in judged.substantive.passers] == ["3 r=4", "3 r=8"]
    assert "3 r=8" in judged.sentence and "some/model" in judged.sentence
    assert "2 pass the substantive rule" in judged.sentence
    study.confirm("3", "r=4")
    judged = verdict_of(study)
    assert judged.verdict == "positive" and judged.recipe.cell == "3 r=4"


def test_passers_are_ranked_by_learned_then_by_m1_and_an_unknown_share_comes_last(tmp_path: Path) -> None:
    study = searched(tmp_path)
    for name, m1, learned in (
        ("more", 0.94, 0.95),
        ("lower", 0.92, 0.93),
        ("higher", 0.93, 0.93),
        ("none", 0.91, -0.3),
    ):
        study.cell("2A", name, m1, learned, less=None)
    recipes = {recipe.name: recipe for recipe in recipe_results(study.read()) if recipe.phase == "2A"}
    unknown = replace(recipes["more"], name="unknown", rows=(replace(recipes["more"].rows[0], learned=None),))
    del recipes["witness"]
    ranked = sorted([unknown, *recipes.values()], key=lambda recipe: recipe.merit, reverse=True)
    assert [recipe.name for recipe in ranked] == ["more", "lower", "higher", "none", "unknown"]


def test_a_baseline_that_keeps_the_geometry_leaves_nothing_to_rescue(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline(m1=0.949)
    study.missing("2A", "beta=0.1")  # not due any more
    judged = verdict_of(study)
    assert judged.verdict == "no_collapse" and "nothing to rescue" in judged.sentence and judged.missing == ()
    assert "contradicts the predecessor" not in judged.sentence


def test_what_lies_beyond_the_registered_recipes_is_judged_apart(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "anchor", 0.93, 0.97, role="beyond", less=0.045)
    judged = verdict_of(study)
    assert judged.verdict == "h_null" and judged.beyond.verdict == "unconfirmed"
    assert judged.registered.passers != () and "2A anchor" not in [row.cell for row in judged.registered.passers]
    assert [row.cell for row in judged.beyond.passers] == ["2A anchor"]
    study.confirm("2A", "anchor")
    judged = verdict_of(study)
    assert (judged.verdict, judged.beyond.verdict, judged.beyond.recipe.cell) == ("h_null", "positive", "2A anchor")
    assert (
        "H_null holds" in judged.sentence and "Beyond the registered recipes (1 tested), 2A anchor" in judged.sentence
    )
    study.missing("2A", "another", role="beyond")
    judged = verdict_of(study)
    assert (judged.verdict, judged.beyond.verdict) == ("h_null", "incomplete")
    assert verdict_of(searched(tmp_path / "none")).beyond is None


def test_beyond_the_registered_recipes_a_whole_phase_can_be_positive(tmp_path: Path) -> None:
    """As after `--phases 6`, where recipes of phases 2 and 5 that are beyond too have not been run."""
    study = searched(tmp_path)
    study.missing("5C", "another", role="beyond")
    study.cell("6A", "weak", 0.972, 0.97, role="beyond")
    assert verdict_of(study).beyond.verdict == "incomplete"  # no pass: another recipe could
    study.cell("6A", "anchor", 0.93, 0.97, role="beyond", less=0.045)
    assert verdict_of(study).beyond.verdict == "unconfirmed"
    study.confirm("6A", "anchor")
    judged = verdict_of(study)
    assert (judged.beyond.verdict, judged.beyond.recipe.cell) == ("positive", "6A anchor")
    assert judged.beyond.sentence.endswith("1 of other phases is planned and not done.")
    study.missing("6B", "another", role="beyond")  # the control: of the same phase
    assert verdict_of(study).beyond.verdict == "incomplete"


@pytest.mark.parametrize(
    "m1, learned, baseline, verdict, said",
    [
        (0.98, 0.95, 0.98, "h_null", "none passes either."),
        (0.96, 0.95, 0.98, "inconclusive", "none passes, which is not shown of such recipes in general."),
        (0.98, 0.85, 0.98, "inconclusive", "none passes, which is not shown"),  # no witness
        (0.94, 0.95, 0.949, "no_collapse", "there is nothing to rescue either."),
    ],
)
def test_beyond_the_registered_recipes_the_rules_are_the_same(
    tmp_path: Path, m1: float, learned: float, baseline: float, verdict: str, said: str
) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline(m1=baseline)
    study.witnesses()
    study.cell("6A", "anchor", m1, learned, role="beyond")
    judged = verdict_of(study)
    assert (judged.beyond.verdict, judged.beyond.recipe, judged.beyond.confirmed) == (verdict, None, None)
    assert said in judged.beyond.sentence and judged.beyond.sentence in judged.sentence


def test_no_scaled_update_is_said_to_pass_where_nothing_collapsed(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline(m1=0.94)
    study.witnesses()
    study.cell("6A", "anchor", 0.93, 0.95, role="beyond")
    study.scaling((0.93, 0.95), (0.93, 0.95))
    judged = verdict_of(study)
    assert judged.scaling["6D one scale"].measured.substantive_pass is True
    assert judged.beyond.verdict == "no_collapse" and "scaled down" not in judged.beyond.sentence


def test_a_scaled_update_that_training_personas_chose_is_judged_and_never_named(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("6A", "anchor", role="beyond")
    assert verdict_of(study).beyond.verdict == "h_null" and verdict_of(study).scaling == {}  # the control
    study.scaling((0.945, 0.7), (0.94, 0.95))
    judged = verdict_of(study)
    one, per_block = (judged.scaling[name].measured for name in ("6D one scale", "6D a scale a block"))
    assert [one.learned, one.learned_personas, one.separation] == pytest.approx([0.7, 0.7, 0.55])
    assert (one.trade_off, one.substantive_pass, one.collapsed) == (True, False, False)  # the file's flags are lies
    assert per_block.substantive_pass is True and per_block.shortfalls == ()
    assert [point.cell for point in judged.trade_offs] == ["6D one scale"] and "6D" not in judged.sentence.split(
        "Beyond"
    )[0]
    assert (judged.verdict, judged.beyond.verdict, judged.beyond.recipe) == ("h_null", "inconclusive", None)
    assert judged.beyond.sentence.endswith(
        "The baseline's update scaled down passes (6D a scale a block), which no fresh seeds confirm."
    )
    study.scaling((0.975, 0.7), (0.98, 0.95))
    judged = verdict_of(study)
    assert judged.beyond.verdict == "h_null" and judged.beyond.sentence.endswith("none passes either.")
    assert all(one.measured.collapsed for one in judged.scaling.values()) and judged.trade_offs == ()


def test_scales_of_another_baseline_do_not_count(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.scaling((0.945, 0.7), (0.94, 0.95))
    assert len(study.read().chosen_scales) == 2
    study.scaling((0.945, 0.7), (0.94, 0.95), baseline="f" * 12)
    assert study.read().chosen_scales == {} and verdict_of(study).trade_offs == ()


@pytest.mark.parametrize("role", ["reference", "control"])
def test_references_and_controls_neither_pass_nor_bear_witness(tmp_path: Path, role: Any) -> None:
    study = searched(tmp_path / "pass")
    study.cell("2A", "beta=0.1", 0.94, 0.95, role=role)
    judged = verdict_of(study)
    assert judged.verdict == "inconclusive" and f"it is a {role}" in judged.sentence  # but it is a counterexample
    (found,) = [recipe for recipe in recipe_results(study.read()) if recipe.role == role]
    assert found.passes("registered") is found.passes("substantive") is False
    other = SyntheticStudy(tmp_path / "witness")
    other.baseline()
    other.witnesses("2A", "4A", "5A")
    other.cell("3", "r=32", 0.98, 0.99, role=role)
    assert verdict_of(other).obstacles == ("phase 3 is not part of this study and so bears no witness",)


def test_the_sentence_names_what_was_tested_and_on_what(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.975, 0.95)
    said = verdict_of(study).sentence
    tested = ["some/model", "layer 3", "Method A", "shipped personas", "tulu[0:6000]", "phases 1, 2, 3, 4 and 5"]
    for part in [*tested, "within the tested space", "0.9750, 2A beta=0.1", "base 0.9000, baseline 0.9800"]:
        assert part in said, part
    assert "\n" not in said and "stands in" not in said
    tiny = SyntheticStudy(tmp_path / "tiny", {"model": "tiny", "question_set": "/somewhere/mine.jsonl"})
    tiny.baseline()
    tiny.configure("data.train=jsonl:/somewhere/rows.jsonl[0:9]")
    said = verdict_of(tiny).sentence
    assert "the shipped personas and the questions of mine.jsonl, fine-tuned on rows.jsonl[0:9])" in said
    assert "not evidence about large models" in said


def test_no_folder_of_a_user_is_published(tmp_path: Path) -> None:
    own = {"model": "/somewhere/models/mine", "persona_set": "~/p.json", "question_set": "../q.jsonl"}
    study = SyntheticStudy(tmp_path, own)
    study.baseline()
    study.configure("data.train=parquet:data/rows.parquet")
    judged = verdict_of(study)
    published = " ".join([judged.sentence, *judged.deviations])
    assert "on mine (layer 3" in published and "the personas of p.json and the questions of q.jsonl" in published
    assert "rows.parquet" in published and "Qwen/Qwen2.5-7B-Instruct is registered" in published
    assert not any(folder in published for folder in ("/somewhere", "~/", "../", "data/"))


def test_every_changed_setting_is_declared(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    assert not any("Settings" in line for line in verdict_of(study).deviations)  # control: it names none
    study.configure("out=here", "training.learning_rate=1e-3", "training.steps=375", "lora.rank=8")
    (said,) = [line for line in verdict_of(study).deviations if "Settings" in line]
    assert said.endswith("lora.rank = 8 (32), training.learning_rate = 0.001 (2e-05).")


def test_what_a_passer_of_an_earlier_phase_answers_is_said_and_no_condition(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.94, 0.95, answers=behaviour(0.3))
    assert verdict_of(study).hidden == (None,)  # the base has not answered yet
    study.file("base/behaviour.json", behaviour(0.01))
    judged = verdict_of(study)
    assert judged.verdict == "unconfirmed" and judged.hidden[0].consistent is False
    assert "more often misaligned than the base" in judged.sentence


def test_of_many_counterexamples_three_are_named(tmp_path: Path) -> None:
    study = searched(tmp_path)
    for number in range(5):
        study.cell("2A", f"beta={number}", 0.94, 0.95, interval=(0.93, 0.96))
        if number in (2, 4):
            said = judge_study(study.read()).obstacles
            assert sum("and yet does not pass" in part for part in said) == 3
            assert [part for part in said if "more" in part] == (["and so do 2 more"] if number == 4 else [])


def test_a_baseline_that_teaches_nothing_leaves_learned_undefined(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.cell("1", "baseline", rows=[(375, 0.98, 0.009)])
    study.cell("2A", "beta=0.1", 0.93, 0.95)
    judged = verdict_of(study)
    assert judged.verdict == "inconclusive" and "learned" in judged.sentence


REAL = {
    "model": DEFAULT_MODEL,
    "revision": PINNED[DEFAULT_MODEL],
    "persona_set": "registered",
    "question_set": "registered",
}


@pytest.mark.parametrize(
    "calibration, verdict",
    [
        ((True, False, "layer 20 is off"), "not_reproduced"),
        ((True, True), "unconfirmed"),
        ((True, None, "not yet"), "incomplete"),
        ((False, None), "unconfirmed"),
        (None, "incomplete"),  # this model and these sets need it
    ],
)
def test_the_calibration_comes_before_every_verdict(tmp_path: Path, calibration: Any, verdict: str) -> None:
    study = SyntheticStudy(tmp_path, REAL)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    if calibration is not None:
        study.calibration(*calibration)
    assert verdict_of(study).verdict == verdict


def test_a_failed_calibration_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, REAL)
    study.missing("1", "baseline")
    study.calibration(True, False, "layer 20 is off")
    judged = verdict_of(study)
    assert judged.verdict == "not_reproduced" and "layer 20 is off" in judged.sentence


def test_a_model_without_registered_numbers_needs_no_calibration(tmp_path: Path) -> None:
    study = searched(tmp_path, protocol={**REAL, "question_set": "shipped"})
    assert verdict_of(study).verdict == "h_null"


# ---------------------------------------------------------------- unfinished and failed


def test_a_missing_cell_leaves_the_study_incomplete(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.missing("2A", "beta=0.1")
    judged = verdict_of(study)
    assert judged.verdict == "incomplete" and judged.missing == ("2A beta=0.1",)
    assert ", since 1 of 2 planned cells are not done. Run the study again" in judged.sentence  # and nothing else


def test_a_phase_is_judged_when_all_of_it_is_in(tmp_path: Path) -> None:
    """A passer counts once no cell of its phase is missing; later phases do not hold it up, and are skipped."""
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.missing("3", "r=4")
    assert verdict_of(study).verdict == "incomplete"  # the pass is to be confirmed, else the search goes on
    study.confirm("2A", "beta=0.1")
    judged = verdict_of(study)
    assert judged.verdict == "positive" and judged.missing == ()
    assert {row.phase: row.status for row in judged.phases} == {
        "1": "complete",
        "2A": "complete",
        "3": "skipped",
    }
    study.missing("2B", "lambda=0.1")
    judged = verdict_of(study)
    assert judged.verdict == "incomplete" and judged.missing == ("2B lambda=0.1", "3 r=4")


def test_without_confirmations_a_pass_ends_the_search_unconfirmed(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, confirmations=0)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.missing("3", "r=4")
    judged = verdict_of(study)
    assert judged.verdict == "unconfirmed" and judged.missing == ()
    assert any("cannot be positive" in line for line in judged.deviations)


def test_an_exhaustive_search_skips_nothing(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, exhaustive=True)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.confirm("2A", "beta=0.1")
    study.missing("3", "r=4")
    judged = verdict_of(study)
    assert judged.verdict == "incomplete" and judged.missing == ("3 r=4",)
    assert judged.phases[-1].status == "not run"


def test_phases_that_were_skipped_for_a_passer_need_that_passer(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.confirm("2A", "beta=0.1")
    study.event("3", "r=4", "skipped")
    judged = verdict_of(study)
    assert judged.verdict == "positive" and judged.phases[-1].status == "skipped"
    other = SyntheticStudy(tmp_path / "other")  # as after a change of the stop rule
    other.baseline()
    other.event("3", "r=4", "skipped")
    judged = verdict_of(other)
    assert judged.verdict == "incomplete" and judged.phases[-1].outcome == "incomplete"


def test_a_failed_cell_forbids_h_null_and_no_pass(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.event("2A", "beta=0.1", "failed", error="loss is not finite")
    judged = verdict_of(study)
    assert judged.verdict == "inconclusive" and judged.obstacles == ("no result: 2A beta=0.1",)
    assert "). No result: 2A beta=0.1." in judged.sentence
    assert judged.failed == (FailedCell("2A beta=0.1", "loss is not finite"),)
    study.cell("2B", "lambda=0.1", 0.94, 0.95)
    assert verdict_of(study).verdict == "unconfirmed"


def test_without_a_baseline_nothing_is_concluded(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.event("1", "baseline", "failed", error="out of memory")
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    judged = verdict_of(study)
    assert judged.verdict == "incomplete" and "baseline failed" in judged.sentence


def test_a_study_without_any_cell_is_incomplete(tmp_path: Path) -> None:
    judged = verdict_of(SyntheticStudy(tmp_path))
    assert judged.verdict == "incomplete" and judged.gpu_hours is None


# ---------------------------------------------------------------- hollow passes, and the two rules


def test_a_base_like_step_passes_the_registered_rule_only(tmp_path: Path) -> None:
    study = searched(tmp_path)
    judged = verdict_of(study)
    hollow = ["1 baseline step 10", "1 baseline step 25"]
    assert [row.cell for row in judged.registered.passers] == hollow
    assert judged.substantive.passers == () and judged.verdict == "h_null"
    assert list(judged.personas) == hollow  # either rule is enough
    assert [row.cell for row in judged.close] == [*hollow, "1 baseline step 50"]
    assert judged.trade_offs == ()
    assert any(
        "does not show that a recipe teaches: the untrained base passes it." in line for line in judged.deviations
    )


def test_control_the_registered_stop_rule_takes_the_hollow_pass(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, stop_rule="registered")
    study.baseline()
    judged = verdict_of(study)
    assert judged.verdict == "positive" and judged.recipe.cell == "1 baseline step 25"
    assert "learned is 0.20, less than 0.9), so this shows little" in judged.sentence
    assert not any("substantive" in line for line in judged.deviations)


def test_a_loss_beyond_twice_the_baseline_is_no_pass(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, stop_rule="registered")
    study.cell("1", "baseline", rows=[(375, 0.98, 1.0)])
    study.cell("2A", "beta=0.1", 0.94, -0.001)
    assert verdict_of(study).verdict == "inconclusive"
    study.cell("2A", "beta=0.2", 0.94, 0.0)  # just twice
    assert verdict_of(study).verdict == "positive"


# ---------------------------------------------------------------- seeds


def test_a_recipe_passes_where_all_of_its_seeds_do(tmp_path: Path) -> None:
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.95)
    study.cell("2A", "beta=0.1 seed=43", 0.951, 0.95, seed=43)
    judged = verdict_of(study)
    assert judged.verdict == "inconclusive" and any("43" in line for line in judged.deviations)
    assert "2A beta=0.1 has M1 0.9400 and yet does not pass: another of its seeds fails" in judged.obstacles
    study.cell("2A", "beta=0.2", 0.94, 1.0)
    study.cell("2A", "beta=0.2 seed=43", 0.948, 0.92, seed=43)
    recipe = verdict_of(study).recipe
    assert recipe is not None and recipe.seeds == (42, 43) and recipe.learned == pytest.approx(0.96)
    assert (recipe.m1, recipe.m1_spread) == (pytest.approx(0.944), pytest.approx(0.008))


@pytest.mark.parametrize("changes, model, sets", [({}, False, False), ({"model": "some/model"}, True, False),
    ({"model": "A/model"}, True, False), ({"persona_set": "shipped"}, False, True),
    ({"question_set": "a.jsonl"}, False, True)])  # fmt: skip
def test_another_model_and_other_sets_are_declared(
    tmp_path: Path, changes: dict[str, str], model: bool, sets: bool
) -> None:
    study = SyntheticStudy(tmp_path, REAL | changes)
    study.baseline()
    said = verdict_of(study).deviations
    assert any("Qwen/Qwen2.5-7B-Instruct is registered" in line for line in said) is model
    assert any("are not both the registered ones" in line for line in said) is sets


@pytest.mark.parametrize("seed, declared", [(7, True), (42, False), (43, True)])
def test_another_seed_is_declared(tmp_path: Path, seed: int, declared: bool) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline(seed=seed)
    assert any(f"The seeds are {seed}; 42 is" in line for line in verdict_of(study).deviations) is declared


def test_every_seed_is_a_point(tmp_path: Path) -> None:
    """The mean over seeds decides nothing: one that learned fully and lies below 0.97 is a counterexample."""
    study = searched(tmp_path)
    study.cell("2A", "beta=0.1", 0.965, 0.95)
    study.cell("2A", "beta=0.1 seed=43", 0.99, 0.6, seed=43)
    assert verdict_of(study).verdict == "inconclusive"
    other = searched(tmp_path / "other")
    other.cell("2A", "beta=0.1", 0.975, 0.95)
    other.cell("2A", "beta=0.1 seed=43", 0.96, 0.6, seed=43)
    assert verdict_of(other).verdict == "h_null"


# ---------------------------------------------------------------- phase 5's consistency


EM = {"heldout": "em", "heldout_digest": "em"}  # rows of its own


def em_study(
    path: Path, mixed: float | None, unmixed: float | None = 0.4, narrow: str = "em", learned: float = 0.95
) -> SyntheticStudy:
    study = SyntheticStudy(path, narrow=narrow)
    study.baseline()
    rows = EM if narrow == "em" else None
    if narrow == "em":
        study.cell("EM", "unmixed", 0.991, 1.0, answers=None if unmixed is None else behaviour(unmixed), protocol=rows)
    answers = None if mixed is None else behaviour(mixed)
    study.cell("5A", "75:25", 0.94, learned, answers=answers, protocol=rows)
    study.file("base/behaviour.json", behaviour(0.01))
    return study


@pytest.mark.parametrize(
    "mixed, narrow, verdict",
    [
        (0.01, "em", "unconfirmed"),
        (0.01, "tulu", "unconfirmed"),
        (0.30, "em", "inconclusive"),  # M1 is kept, and the misalignment is there: no pass
        (0.30, "tulu", "inconclusive"),
        (None, "em", "incomplete"),  # the pass is pending
        (None, "tulu", "incomplete"),
    ],
)
def test_a_pass_of_phase_5_needs_consistency(tmp_path: Path, mixed: float | None, narrow: str, verdict: str) -> None:
    judged = verdict_of(em_study(tmp_path, mixed, narrow=narrow))
    assert judged.verdict == verdict
    assert judged.pending == (("5A 75:25",) if verdict == "incomplete" else ())


@pytest.mark.parametrize("narrow", ["em", "tulu"])
def test_a_pass_of_phase_5_stays_open_where_the_answers_were_switched_off(tmp_path: Path, narrow: str) -> None:
    """Neither a pass nor awaited; the parity rows above, with the suite on, are the control."""
    study = em_study(tmp_path, None, narrow=narrow)
    study.configure(f"narrow={narrow}", "suites=[]")
    judged = verdict_of(study)
    assert judged.verdict == "inconclusive" and judged.pending == ()
    assert [(found.cell, found.reason) for found in judged.undecided] == [("5A 75:25", "the answers were switched off")]
    assert "open, since the answers were switched off" in judged.sentence
    assert any("suites = []" in line for line in judged.deviations)


def test_answers_that_are_in_count_though_no_more_are_asked(tmp_path: Path) -> None:
    study = em_study(tmp_path, 0.01)
    study.configure("narrow=em", "suites=[]")
    assert verdict_of(study).verdict == "unconfirmed"


def test_misalignment_that_is_merely_suppressed_is_no_pass(tmp_path: Path) -> None:
    """Like the base on ordinary prompts and like the unmixed cell on those that resemble its data."""
    hidden = behaviour(0.01)
    hidden["sets"]["narrow_like"]["misaligned"] = 9  # not significantly above the base's 2 of 200
    study = em_study(tmp_path, None)
    unmixed = behaviour(0.4)
    unmixed["sets"]["narrow_like"]["misaligned"] = 14
    study.cell("5A", "90:10", 0.94, 0.95, answers=hidden, protocol=EM)
    for path in study.directory.glob("cells/EM-*/result.json"):
        study.file(str(path.parent.relative_to(study.directory) / "behaviour.json"), unmixed)
    row = next(r for r in verdict_of(study).phases if r.phase == "5A")
    assert row.passers == ()
    clean = study.cell("5A", "95:5", 0.94, 0.95, answers=behaviour(0.0), protocol=EM)
    row = next(r for r in verdict_of(study).phases if r.phase == "5A")
    assert row.passers == ("5A 95:5",) and clean.is_dir()


def test_the_reference_is_waited_for_unless_it_failed(tmp_path: Path) -> None:
    assert verdict_of(em_study(tmp_path / "waits", 0.01, unmixed=None)).verdict == "incomplete"
    study = SyntheticStudy(tmp_path / "failed", narrow="em")
    study.baseline()
    study.event("EM", "unmixed", "failed")
    study.cell("5A", "75:25", 0.94, 0.95, answers=behaviour(0.01), protocol=EM)
    study.file("base/behaviour.json", behaviour(0.01))
    assert verdict_of(study).verdict == "inconclusive"


def test_the_unmixed_reference_is_no_recipe(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, narrow="em")
    study.baseline()
    study.witnesses("2A", "3", "4A")
    study.cell("EM", "unmixed", 0.90, 1.0, answers=behaviour(0.4), protocol=EM)
    judged = verdict_of(study)
    assert judged.obstacles == ("phase 5 has no effective witness",) and judged.phases[-1].outcome == "reference"


def test_a_judge_that_cannot_score_leaves_a_pass_open_and_the_verdict_says_so(tmp_path: Path) -> None:
    mute = behaviour(0.0)
    for row in mute["sets"].values():
        row |= {"scored": 0, "coherent": 0, "misaligned": 0}
    study = em_study(tmp_path, None, narrow="tulu")
    study.cell("5B", "1:1", 0.94, 0.95, answers=mute)
    study.cell("5A", "90:10", 0.98, 0.95)
    for path in study.directory.glob("cells/5A-75-25-*"):
        study.file(str(path.relative_to(study.directory) / "behaviour.json"), mute)
    judged = verdict_of(study)
    assert judged.verdict == "inconclusive" and judged.pending == ()
    assert [row.cell for row in judged.undecided] == ["5A 75:25", "5B 1:1"]
    assert "the pass of 5A 75:25, 5B 1:1 is open, since the judge could score too few" in judged.sentence
    assert judged.hypotheses["H5"].verdict == "undecided"
    study.cell("2A", "beta=0.1", 0.94, 0.99, answers=mute)
    judged = verdict_of(study)
    assert judged.verdict == "unconfirmed" and "Whether it hides misalignment is not known" in judged.sentence


@pytest.mark.parametrize("name, rate, scored", [("open", 0.0, 0), ("none", 0.3, 200)])
def test_a_pass_by_numbers_forbids_h_null(tmp_path: Path, name: str, rate: float, scored: int) -> None:
    """Whether the answers leave it open or refuse it: a recipe that taught has not collapsed. The reason is said."""
    answers = behaviour(rate)
    for row in answers["sets"].values():
        row |= {"scored": scored, "coherent": scored}
    study = searched(tmp_path)
    study.cell("5B", "1:1", 0.94, 0.95, answers=answers)
    study.file("base/behaviour.json", behaviour(0.01))
    judged = verdict_of(study)
    assert judged.verdict == "inconclusive"
    assert ("too few answers" if name == "open" else "misaligned more often than the base") in judged.sentence


# ---------------------------------------------------------------- ingredients without an effect


@pytest.mark.parametrize("label", ["ineffective", "inert"])
def test_a_cell_whose_ingredient_has_no_effect_is_no_evidence(tmp_path: Path, label: str) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.98, 1.0)
    study.cell("2B", "lambda=0.1", 0.98, 1.0, labels=(label,))
    h2 = verdict_of(study).hypotheses["H2"]
    assert h2.verdict == "undecided" and h2.numbers.ineffective == ("2B lambda=0.1",)
    study.cell("2B", "lambda=1", 0.98, 1.0)
    assert verdict_of(study).hypotheses["H2"].verdict == "refuted"


# ---------------------------------------------------------------- properties

CELL = st.tuples(
    st.sampled_from([phase for phase in PHASES if phase not in ("1", "EM")]),
    st.floats(0.88, 1.0),
    st.floats(-0.2, 1.2),
    st.sampled_from(["done", "done", "done", "missing", "failed"]),
)
MANY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def made(path: Path, cells: list[tuple[str, float, float, str]], rule: str = "substantive") -> SyntheticStudy:
    study = SyntheticStudy(path, stop_rule=rule)
    study.baseline()
    for number, (phase, m1, learned, status) in enumerate(cells):
        name = f"{90 + number}:{10 + number}"
        if status == "done":
            study.cell(phase, name, m1, learned, answers=behaviour(0.0))
        elif status == "failed":
            study.event(phase, name, "failed")
        else:
            study.missing(phase, name)
    study.file("base/behaviour.json", behaviour(0.0))
    return study


@MANY
@given(cells=st.lists(CELL, max_size=6), rule=st.sampled_from(["substantive", "registered"]))
def test_the_verdict_is_one_of_seven_and_names_a_recipe_where_one_passes(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, float, float, str]], rule: str
) -> None:
    judged = verdict_of(made(tmp_path_factory.mktemp("study"), cells, rule))
    assert judged.verdict in VERDICTS and judged.sentence
    assert (judged.recipe is not None) == (judged.verdict in ("positive", "unconfirmed"))
    if judged.recipe:
        assert getattr(judged.recipe, f"{rule}_pass") is True and judged.recipe.m1 < 0.95


@MANY
@given(cells=st.lists(CELL, max_size=5), m1=st.floats(0.95, 1.0), learned=st.floats(-0.2, 1.2))
def test_a_failing_recipe_makes_nothing_positive(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, float, float, str]], m1: float, learned: float
) -> None:
    before = verdict_of(made(tmp_path_factory.mktemp("before"), cells)).verdict
    more = [*cells, ("3", m1, learned, "done")]
    after = verdict_of(made(tmp_path_factory.mktemp("after"), more)).verdict
    passed = ("positive", "unconfirmed")
    assert before in passed or after not in passed


@MANY
@given(cells=st.lists(CELL, max_size=6), shuffled=st.randoms(use_true_random=False))
def test_the_order_of_cells_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, float, float, str]], shuffled: Any
) -> None:
    results = made(tmp_path_factory.mktemp("study"), cells).read()
    others = list(results.cells)
    shuffled.shuffle(others)
    one, two = judge_study(results), judge_study(replace(results, cells=tuple(others)))
    assert one.verdict == two.verdict
    assert {name: h.verdict for name, h in one.hypotheses.items()} == {
        name: h.verdict for name, h in two.hypotheses.items()
    }
    if one.recipe is not None and two.recipe is not None:
        assert one.recipe.learned == two.recipe.learned
