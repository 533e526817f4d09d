"""How often the rules err, in simulation. docs/log.md has the tables of the slow tests, which `-s` prints.

A simulated model answers Q questions as P personas in D dimensions and has R held-out rows. Doing less is a family of
models: at scale s the vectors are base + s x (what the update adds, which draws the personas together), and a row's
loss is base - gain (s - s^2 / 3), a curve. A twin of a scaled model has the same expected vectors and losses, and noise
of its own in every question and row: it is no better than doing less, and only noise can make it look so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_study import BASE_M1, checkpoint

from minipersona.geometry.measures import m1, persona_vectors
from minipersona.geometry.statistics import question_weights, resampled_m1
from minipersona.run.judgement import ABSOLUTE, judge_row
from minipersona.run.result import Baseline
from minipersona.significance import LEVEL, holm
from minipersona.verdict.cells import CellResult
from minipersona.verdict.consistency import Consistency
from minipersona.verdict.doing_less import RESAMPLES, RESOLUTION, ROWS_SEED, Resampled, difference_at_equal_loss
from minipersona.verdict.recipe_results import RecipeResult

P, Q, D, ROWS = 12, 120, 24, 300
SCALES = [round(0.1 * k, 1) for k in range(1, 10)]
RECIPES = 30


class World:
    """A base, its baseline's update, and the questions and rows that a study happens to draw."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        fixed = np.random.default_rng(0)
        self.mean, self.persona = 3 * fixed.standard_normal(D) / D**0.5, fixed.standard_normal((P, D)) / D**0.5
        self.question = 0.3 * self.rng.standard_normal((1, Q, D)) / D**0.5
        self.noise = 0.5 * self.rng.standard_normal((P, Q, D)) / D**0.5
        self.gain = np.abs(0.15 + 0.1 * self.rng.standard_normal(ROWS))
        self.base_loss = 2 + 0.6 * self.rng.standard_normal(ROWS)
        self.tokens = self.rng.integers(20, 200, ROWS)
        self.questions = question_weights(Q, RESAMPLES)
        self.rows = question_weights(ROWS, RESAMPLES, ROWS_SEED)

    def samples(self, scale: float) -> np.ndarray:
        """(P, Q, D) of the model at a scale."""
        shared, apart = self.mean * (1 + 0.3 * scale), (1 - 0.45 * scale) * self.persona[:, None]
        return np.asarray(shared + apart + self.question + self.noise)

    def losses(self, scale: float) -> np.ndarray:
        """(R,) of the model at a scale, in nats a token."""
        return np.asarray(self.base_loss - self.gain * (scale - scale**2 / 3))

    def at(self, scale: float, own: float = 0.0) -> tuple[Resampled, Resampled]:
        """M1 and loss of the model at a scale, or of a twin with `own` noise."""
        samples = self.samples(scale) + own * self.rng.standard_normal((P, Q, D)) / D**0.5
        losses = self.losses(scale) + 0.2 * own * self.rng.standard_normal(ROWS)
        tensor = torch.from_numpy(samples).float()
        return Resampled(m1(persona_vectors(tensor)), resampled_m1(tensor, self.questions)), self._loss(losses)

    def _loss(self, losses: np.ndarray) -> Resampled:
        nats, tokens = torch.from_numpy(losses * self.tokens), torch.from_numpy(self.tokens).double()
        return Resampled(float(nats.sum() / tokens.sum()), (self.rows @ nats) / (self.rows @ tokens))

    def scale_with(self, loss: float) -> float:
        """By bisection, to 1e-4 nats."""
        low, high = 0.0, 1.2
        for _ in range(20):
            scale = (low + high) / 2
            found = self._loss(self.losses(scale)).estimate
            if abs(found - loss) < 1e-4:
                break
            low, high = (scale, high) if found > loss else (low, scale)
        return scale

    def p(self, model: tuple[Resampled, Resampled]) -> float:
        """The p-value of "it is better than doing less", as `doing_less.py` has it."""
        scale = self.scale_with(model[1].estimate)
        scaled, near = self.at(scale), scale + 0.05
        near_m1 = m1(persona_vectors(torch.from_numpy(self.samples(near)).float()))
        slope = (near_m1 - scaled[0].estimate) / (self._loss(self.losses(near)).estimate - scaled[1].estimate)
        return difference_at_equal_loss(*model, *scaled, slope).p_below(-RESOLUTION)


def test_the_scaled_baseline_itself_is_never_better() -> None:
    world = World(seed=1)
    assert all(world.p(world.at(scale)) > 0.5 for scale in SCALES)


def test_control_a_model_with_lower_m1_at_that_loss_is_better() -> None:
    world = World(seed=1)
    model, lower = world.at(0.5, own=0.3), world.at(0.4)
    assert world.p((lower[0], model[1])) < 1e-3  # the M1 of a smaller scale at the loss of a larger one


@pytest.mark.slow
def test_a_scaled_baseline_is_falsely_better_at_most_in_5_percent() -> None:
    """Alone at each scale, and any of 30 such recipes of a study, by Holm; the bounds allow for 100 studies' noise."""
    studies = 100
    alone: dict[float, list[float]] = {scale: [] for scale in SCALES}
    any_better = 0
    for seed in range(studies):
        world = World(seed)
        p_values = {}
        for number in range(RECIPES):
            scale = SCALES[number % len(SCALES)]
            p_values[str(number)] = world.p(world.at(scale, own=0.3))
            alone[scale].append(p_values[str(number)])
        any_better += any(holm(p_values, LEVEL).values())
    for scale, values in alone.items():
        print(f"| {scale} | {np.mean(np.array(values) < LEVEL):.3f} | of {len(values)}")
    print(f"any of {RECIPES} in a study: {any_better / studies:.3f} of {studies}")
    everyone = np.concatenate([*alone.values()])
    assert np.mean(everyone < LEVEL) <= 0.06 and any_better / studies <= 0.09


# ---------------------------------------------------------------- thirty recipes, and luck


def lucky(studies: int, spread: float, rng: np.random.Generator) -> Iterator[tuple[bool, bool]]:
    """Of studies with thirty recipes truly at M1 0.955: whether one passes, and whether it is confirmed."""
    base, baseline = checkpoint(0, BASE_M1, 0.0), Baseline("b", eval_loss=1.0, persona_loss=1.0)
    cell = CellResult("2A", "r", "", 42, {}, "done")

    def seeds(count: int) -> RecipeResult:
        drawn = [checkpoint(375, value, 0.97) for value in 0.955 + spread * rng.standard_normal(count)]
        rows = tuple(judge_row(row, base, baseline, ABSOLUTE) for row in drawn)
        return RecipeResult("2A", "r", None, (cell,) * count, rows, (Consistency(True, ""),) * count)

    for _ in range(studies):
        recipes = [replace(seeds(1), fresh_wanted=3) for _ in range(RECIPES)]
        passers = [recipe for recipe in recipes if recipe.passes("substantive")]
        confirmed = any(replace(recipe, confirmation=seeds(3)).confirmed for recipe in passers)
        yield bool(passers), confirmed


@pytest.mark.parametrize("studies", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_the_best_of_thirty_passes_by_luck_and_is_not_confirmed(studies: int) -> None:
    found = list(lucky(studies, 0.003, np.random.default_rng(0)))
    passed, confirmed = (float(np.mean(column)) for column in zip(*found, strict=True))
    print(f"of {studies} studies a recipe passes in {passed:.3f}, and is confirmed in {confirmed:.4f}")
    assert passed > 0.3 and confirmed < 0.01
