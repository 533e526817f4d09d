"""A recipe against doing less: a lookalike is not better, a better one is, and what cannot be said stays open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic_study import HASH, LAYER, SyntheticStudy, samples_with, save_samples

from minipersona.errors import UserError
from minipersona.geometry.measures import m1, persona_vectors
from minipersona.geometry.statistics import bootstrap_m1_difference
from minipersona.verdict.doing_less import Bootstrap, Curve, DoingLess, Point
from minipersona.verdict.verdict import judge_study

FRONTIER = [(0.0, 0.90, 0.0), (0.3, 0.92, 0.5), (0.6, 0.95, 0.8), (1.0, 0.98, 1.0)]


def made(path: Path) -> SyntheticStudy:
    study = SyntheticStudy(path)
    study.baseline(vectors=True)
    study.frontier(FRONTIER)
    return study


def compared(study: SyntheticStudy, cell: str) -> DoingLess:
    return next(row for row in judge_study(study.read()).frontier if row.cell == cell)


def test_a_recipe_that_only_does_less_is_not_better(tmp_path: Path) -> None:
    """It passes, and yet it is the baseline's update scaled: M1 is that of the frontier at its learned."""
    study = made(tmp_path)
    study.cell("2A", "beta=0.1", 0.93, 0.6, vectors=True)
    row = compared(study, "2A beta=0.1")
    assert row.m1_at_equal_learned == pytest.approx(0.93) and row.difference == pytest.approx(0, abs=1e-9)
    assert row.better is False and row.ci95[0] <= 0 <= row.ci95[1]
    judged = judge_study(study.read())
    assert judged.verdict == "positive" and "doing less does as well" in judged.sentence
    assert "not been shown to be better" in judged.hypotheses["H2"].implication


def test_control_a_recipe_below_the_curve_is_better(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("2A", "beta=0.1", 0.92, 0.6, vectors=True)
    row = compared(study, "2A beta=0.1")
    assert row.difference == pytest.approx(-0.01) and row.better is True
    assert row.ci95[0] < -0.01 < row.ci95[1] < 0
    assert row.dose_better is True and row.dose_m1_at_equal_learned == pytest.approx(0.955 + 0.1 / 0.5 * 0.025)
    judged = judge_study(study.read())
    assert "more than doing less" in judged.sentence
    assert judged.hypotheses["H2"].numbers.better_than_less == ("2A beta=0.1",)


def test_a_difference_within_the_noise_of_questions_is_not_better(tmp_path: Path) -> None:
    """The same small advantage counts where the questions' noise is shared, and not where it is each model's own."""
    study = made(tmp_path)
    study.cell("3", "paired", 0.9299, 0.6, vectors=True)
    study.cell("3", "unpaired", 0.9299, 0.6, vectors=True, noise_seed=7)
    paired, unpaired = compared(study, "3 paired"), compared(study, "3 unpaired")
    assert paired.difference == pytest.approx(unpaired.difference, abs=1e-9)
    assert paired.better is True and unpaired.better is False


def test_a_difference_of_rounding_is_not_better(tmp_path: Path) -> None:
    """Beside a point of the curve with the same noise, where the interval is next to nothing."""
    study = made(tmp_path)
    study.cell("3", "rounding", 0.92 - 5e-7, 0.5, vectors=True)
    study.cell("3", "more", 0.92 - 1e-5, 0.5, vectors=True)
    rounding, more = compared(study, "3 rounding"), compared(study, "3 more")
    assert rounding.ci95[1] < 0 and rounding.better is False
    assert more.ci95[1] < 0 and more.better is True


def test_the_interval_at_a_point_of_the_curve_is_that_of_the_two_models(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", 0.94, 0.8, vectors=True, noise_seed=3)
    row = compared(study, "3 r=4")
    expected = bootstrap_m1_difference(samples_with(0.95), samples_with(0.94, seed=3))
    assert row.ci95 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "learned, reason", [(1.01, "more than any point"), (-0.01, "less than any point"), (1.0, None), (0.0, None)]
)
def test_nothing_is_said_beyond_the_curve(tmp_path: Path, learned: float, reason: str | None) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", 0.94, learned, vectors=True)
    row = compared(study, "3 r=4")
    assert (row.better is None) == (reason is not None)
    assert (row.reason is None) if reason is None else (reason in row.reason)
    if learned > 1:
        assert "cannot be said: it learned more than any point" in judge_study(study.read()).sentence


def test_without_vectors_there_is_a_difference_and_no_verdict_on_it(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", 0.90, 0.6)
    row = compared(study, "3 r=4")
    assert row.difference == pytest.approx(-0.03) and row.better is None and row.reason == "vectors are missing"
    other = SyntheticStudy(tmp_path / "other")
    other.baseline(vectors=True)
    other.cell("3", "r=4", 0.90, 0.6, vectors=True)
    row = compared(other, "3 r=4")
    assert row.better is None and row.dose_better is True and "not been measured" in row.reason


def test_a_frontier_of_another_baseline_is_not_used(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", 0.90, 0.6, vectors=True)
    path = study.directory / "frontier.json"
    path.write_text(path.read_text().replace(f'"{HASH}"', '"fff"'))
    assert "not been measured" in compared(study, "3 r=4").reason
    path.write_text(path.read_text().replace('"fff"', f'"{HASH}"'))
    assert compared(study, "3 r=4").better is True


def test_checkpoints_are_held_against_the_frontier_and_not_against_themselves(tmp_path: Path) -> None:
    rows = judge_study(made(tmp_path).read()).frontier
    assert [row.cell for row in rows] == [f"1 baseline step {step}" for step in (10, 25, 50)]
    assert all(row.difference is not None and row.dose_better is None for row in rows)


def test_of_two_places_with_the_same_learned_the_curve_gives_the_first() -> None:
    rising = [Point(0.0, 0.90, None), Point(0.6, 0.92, None), Point(0.4, 0.96, None), Point(1.0, 0.98, None)]
    low, high, share = Curve(rising).bracket(0.5) or pytest.fail("within the curve")
    assert (low.m1, high.m1) == (0.90, 0.92) and share == pytest.approx(5 / 6)
    assert Curve([Point(0.0, 0.9, None), Point(0.0, 0.9, None)]).bracket(0.0) is not None  # two equal points


@pytest.mark.parametrize("wrong", ["other", "torn", "questions", "layer", "infinite"])
def test_vectors_that_are_not_those_of_their_row_are_refused(tmp_path: Path, wrong: str) -> None:
    study = made(tmp_path)
    directory = study.cell("3", "r=4", 0.94, 0.6, vectors=True)
    judge_study(study.read())  # as they are, they are taken
    file = directory / "vectors" / "step-000375.safetensors"
    if wrong == "other":
        save_samples(file, samples_with(0.941))
    elif wrong == "torn":
        file.write_bytes(file.read_bytes()[:200])
    elif wrong == "questions":
        save_samples(file, samples_with(0.94)[:, :-1])
    elif wrong == "layer":
        save_samples(file, samples_with(0.94), LAYER + 1)
    else:
        content = bytearray(file.read_bytes())
        content[-4:] = b"\x00\x00\x80\x7f"
        file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"step-000375.safetensors.*delete"):
        judge_study(study.read())


def test_a_file_is_read_once_and_its_samples_are_not_kept(tmp_path: Path) -> None:
    samples = samples_with(0.94)
    file = tmp_path / "v.safetensors"
    save_samples(file, samples)
    bootstrap = Bootstrap(LAYER, resamples=50)
    first = bootstrap.of_file(file, 0.94)
    file.write_bytes(b"")
    assert first is not None and bootstrap.of_file(file, 0.94) is first
    assert first.m1 == m1(persona_vectors(samples)) and first.values.shape == torch.Size([50])
