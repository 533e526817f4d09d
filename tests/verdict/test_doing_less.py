"""A recipe against doing less: a lookalike is not better, a better one is, and what cannot be said stays open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_study import LAYER, SyntheticStudy, losses_with, samples_with, save_samples

from minipersona.errors import UserError
from minipersona.geometry.measures import m1, persona_vectors
from minipersona.geometry.statistics import bootstrap_m1_difference
from minipersona.records import read_record, write_record
from minipersona.run.directory import losses_file
from minipersona.verdict.doing_less import Bootstrap, DoingLess
from minipersona.verdict.files import MatchedScale
from minipersona.verdict.verdict import judge_study


def made(path: Path) -> SyntheticStudy:
    study = SyntheticStudy(path)
    study.baseline()
    study.frontier([(0.0, 0.90, 0.0), (0.9, 0.97, 0.9), (1.0, 0.98, 1.0)])
    return study


def compared(study: SyntheticStudy, cell: str = "3 r=4") -> DoingLess:
    return next(row for row in judge_study(study.read()).frontier if row.cell == cell)


def change_matched(study: SyntheticStudy, **changes: Any) -> None:
    """Write these fields into the record of every scaled baseline that matches a cell of phase 3."""
    for path in study.directory.glob("matched/3-*.json"):
        write_record(path, replace(read_record(path, MatchedScale, ""), **changes))


def test_a_recipe_that_only_does_less_is_not_better(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.92)
    row = compared(study, "2A beta=0.1")
    assert row.difference == pytest.approx(0, abs=1e-6) and row.scale == 0.5
    assert row.better is False and row.ci95[0] <= 0 <= row.ci95[1]
    judged = judge_study(study.read())
    assert judged.verdict == "unconfirmed" and "doing less may do" in judged.sentence
    assert not judged.hypotheses["H2"].numbers.better_than_less


def test_control_a_recipe_below_the_scaled_baseline_is_better(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.92, less=0.01)
    row = compared(study, "2A beta=0.1")
    assert row.difference == pytest.approx(-0.01, abs=1e-6) and row.better is True
    assert row.ci95[0] < -0.01 < row.ci95[1] < 0 and row.p < 1e-6
    judged = judge_study(study.read())
    assert "more than doing less" in judged.sentence
    assert judged.hypotheses["H2"].numbers.better_than_less == ("2A beta=0.1",)


def test_a_difference_within_the_noise_of_questions_is_not_better(tmp_path: Path) -> None:
    """The same small advantage counts where the questions' noise is shared, and not where it is each model's own."""
    study = made(tmp_path)
    study.cell("3", "paired", 0.9299, 0.6, less=0.0005)
    study.cell("3", "unpaired", 0.9299, 0.6, less=0.0005, noise_seed=7)
    paired, unpaired = compared(study, "3 paired"), compared(study, "3 unpaired")
    assert paired.difference == pytest.approx(unpaired.difference, abs=1e-6)
    assert paired.better is True and unpaired.better is False


def test_how_much_was_learned_is_uncertain_too(tmp_path: Path) -> None:
    """Rows whose losses are another draw widen the interval by the slope times their noise."""
    study = made(tmp_path)
    directory = study.cell("3", "r=4", 0.93, 0.6, less=0.002)
    paired = compared(study)
    assert paired.better is True
    losses_with(1.4, noise=0.35, seed=9).save(losses_file(directory, 375))
    noisy = compared(study)
    assert noisy.difference == pytest.approx(paired.difference, abs=1e-6)
    assert noisy.better is False and noisy.ci95[1] - noisy.ci95[0] > 2 * (paired.ci95[1] - paired.ci95[0])


def test_the_difference_is_taken_at_the_recipe_s_own_loss(tmp_path: Path) -> None:
    """The scaled baseline may miss the loss; the slope, -0.08 a nat, says what its M1 would be there."""
    study = made(tmp_path)
    directory = study.cell("3", "r=4", 0.93, 0.6, less=0.0)
    losses = losses_with(1.45).save  # 0.05 nats above the recipe's 1.4
    losses(next((study.directory / "matched").glob("3-*.losses.safetensors")))
    change_matched(study, eval_loss=1.45)
    assert compared(study).difference == pytest.approx(0.08 * (1.4 - 1.45), abs=1e-6)  # the curve lies higher there
    assert directory.is_dir()


def test_a_difference_below_the_resolution_is_not_better(tmp_path: Path) -> None:
    """With the same noise, where the interval is next to nothing."""
    study = made(tmp_path)
    study.cell("3", "rounding", 0.92, 0.5, less=9e-5)
    study.cell("3", "more", 0.92, 0.5, less=3e-4)
    rounding, more = compared(study, "3 rounding"), compared(study, "3 more")
    assert rounding.ci95[1] < 0 and rounding.better is False
    assert more.ci95[1] < 0 and more.better is True


def test_the_interval_is_that_of_the_two_models_where_losses_are_equal(tmp_path: Path) -> None:
    study = made(tmp_path)
    directory = study.cell("3", "r=4", 0.94, 0.8, less=0.01, noise_seed=3)
    losses_with(1.2).save(losses_file(directory, 375))
    expected = bootstrap_m1_difference(samples_with(0.95), samples_with(0.94, seed=3))
    assert compared(study).ci95 == pytest.approx(expected, abs=1e-6)


def test_many_recipes_are_tested_at_a_level_for_as_many(tmp_path: Path) -> None:
    """An advantage that would count by itself does not count as one of twenty."""
    alone, many = made(tmp_path / "alone"), made(tmp_path / "many")
    for study in (alone, many):
        study.cell("3", "r=4", 0.93, 0.6, less=0.0076, noise_seed=7)
    for number in range(20):
        many.cell("3", f"other {number}", 0.93, 0.6)
    one, other = compared(alone), compared(many)
    assert one.p == other.p and 0.05 / 21 < one.p < 0.05 / 4
    assert one.better is True and other.better is False


def test_every_seed_has_to_be_better(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", 0.93, 0.6, less=0.01)
    study.cell("3", "r=4 seed=43", 0.93, 0.6, less=0.0, seed=43)
    rows = [row for row in judge_study(study.read()).frontier if row.recipe == "3 r=4"]
    assert [row.better for row in rows] == [False, False] and rows[0].p < 1e-6


@pytest.mark.parametrize(
    "value, learned, better, reason",
    [
        (0.94, 1.02, True, None),  # it dominates the baseline
        (0.985, 1.02, None, "its M1 is not lower"),
        (0.9799, 1.0, False, None),  # below the baseline by no more than the resolution
        (0.94, 0.0, False, "it learned nothing"),
        (0.94, -0.3, False, "it learned nothing"),
    ],
)
def test_beyond_the_ends_of_the_scaled_baseline(
    tmp_path: Path, value: float, learned: float, better: bool | None, reason: str | None
) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", value, learned)
    row = compared(study)
    assert row.better is better and (row.reason is None if reason is None else reason in row.reason)


def test_a_lead_in_learned_that_is_noise_does_not_dominate(tmp_path: Path) -> None:
    study = made(tmp_path)
    directory = study.cell("3", "r=4", 0.9785, 1.001)
    assert compared(study).better is True
    losses_with(0.999, noise=0.3, seed=5).save(losses_file(directory, 375))
    assert compared(study).better is False


def test_what_is_missing_leaves_it_open(tmp_path: Path) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", 0.90, 0.6, less=None)
    assert (compared(study).better, "not measured" in compared(study).reason) == (None, True)
    study.cell("3", "r=8", 0.90, 0.6, less=0.01)
    assert compared(study, "3 r=8").better is True
    next(study.directory.glob("matched/3-*.losses.safetensors")).unlink()
    row = compared(study, "3 r=8")
    assert row.better is None and row.reason == "vectors or losses by row are missing"


@pytest.mark.parametrize("field", ["baseline", "cell"])
def test_a_scaled_update_of_another_baseline_or_for_another_cell_is_not_used(tmp_path: Path, field: str) -> None:
    study = made(tmp_path)
    study.cell("3", "r=4", 0.90, 0.6, less=0.01)
    change_matched(study, **{field: "fff"})
    assert "not measured" in compared(study).reason


def test_checkpoints_are_compared_and_the_baseline_s_last_is_not(tmp_path: Path) -> None:
    rows = judge_study(made(tmp_path).read()).frontier
    assert [row.cell for row in rows] == [f"1 baseline step {step}" for step in (10, 25, 50)]
    assert all(row.difference is not None and row.better is False for row in rows)


@pytest.mark.parametrize("wrong", ["other", "torn", "fewer questions", "more questions", "layer", "infinite"])
def test_vectors_that_are_not_those_of_their_row_are_refused(tmp_path: Path, wrong: str) -> None:
    study = made(tmp_path)
    directory = study.cell("3", "r=4", 0.94, 0.6)
    judge_study(study.read())  # as they are, they are taken
    file = directory / "vectors" / "step-000375.safetensors"
    if wrong == "other":
        save_samples(file, samples_with(0.941))
    elif wrong == "torn":
        file.write_bytes(file.read_bytes()[:200])
    elif wrong.endswith("questions"):  # with the M1 of the row
        save_samples(file, samples_with(0.94).mean(1, keepdim=True).expand(-1, 23 if "fewer" in wrong else 25, -1))
    elif wrong == "layer":
        save_samples(file, samples_with(0.94), LAYER + 1)
    else:
        content = bytearray(file.read_bytes())
        content[-4:] = b"\x00\x00\x80\x7f"
        file.write_bytes(bytes(content))
    said = "has 2[35] questions, other cells 24.*" if wrong.endswith("questions") else ""
    with pytest.raises(UserError, match=rf"step-000375.safetensors.*{said}delete"):
        judge_study(study.read())


@pytest.mark.parametrize("wrong", ["other", "torn", "fewer rows", "more rows"])
def test_losses_that_are_not_those_of_their_row_are_refused(tmp_path: Path, wrong: str) -> None:
    study = made(tmp_path)
    directory = study.cell("3", "r=4", 0.94, 0.6)
    file, losses = losses_file(directory, 375), losses_with(1.4)
    if wrong == "other":
        losses_with(1.41).save(file)
    elif wrong == "torn":
        file.write_bytes(file.read_bytes()[:60])
    else:
        rows = 49 if "fewer" in wrong else 51  # with the pooled loss of the row
        equal = {name: value.sum().expand(rows) for name, value in vars(losses).items()}
        replace(losses, **{name: value.clone() for name, value in equal.items()}).save(file)
    said = "has (49|51) rows, other cells 50.*" if wrong.endswith("rows") else ""
    with pytest.raises(UserError, match=rf"losses/step-000375.safetensors.*{said}delete"):
        judge_study(study.read())


def test_a_file_is_read_once_and_its_samples_are_not_kept(tmp_path: Path) -> None:
    samples = samples_with(0.94)
    file = tmp_path / "v.safetensors"
    save_samples(file, samples)
    bootstrap = Bootstrap(LAYER, resamples=50)
    first = bootstrap.m1(file, 0.94)
    file.write_bytes(b"")
    assert first is not None and bootstrap.m1(file, 0.94) is first
    assert first.estimate == m1(persona_vectors(samples)) and first.values.shape == torch.Size([50])
