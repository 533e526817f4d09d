"""Coverage of M1's intervals in simulation: how often they hold what they are to estimate.

Worlds are drawn by the model behind `measures.variances`: a sample is mean + persona + question + rest, and a question
does the same to all personas. All effects are Gaussian with one spectrum, variances as 1 / k over the channels k,
because residual streams have few large directions and a long tail. The squared norm of the mean sets M1. In one table
the personas stay and the questions are new in every world: the target is M1 over Q other questions.

P = personas, Q = questions, D = width, R = resamples

    python -m pytest -n0 -s -m slow tests/geometry/test_coverage.py     prints the table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from minipersona.geometry.measures import m1, persona_vectors
from minipersona.geometry.statistics import bootstrap_interval, bootstrap_m1, jackknife_m1, question_weights

PERSONAS = 12


@dataclass(frozen=True)
class Setting:
    """Variances, where that between personas is 1."""

    within: float  # of question and rest together
    question: float  # the question's share of it
    m1: float  # about

    def mean(self, width: int) -> Tensor:
        """(D,) what all samples share."""
        return torch.tensor([(self.m1 / (1 - self.m1)) ** 0.5] + [0.0] * (width - 1))

    @property
    def scales(self) -> tuple[float, float]:
        """Of question and rest."""
        return (self.within * self.question) ** 0.5, (self.within * (1 - self.question)) ** 0.5


@dataclass(frozen=True)
class Effects:
    """Of total variance 1 each."""

    persona: Tensor  # (P, D)
    question: Tensor  # (Q, D)
    rest: Tensor  # (P, Q, D)

    def samples(self, setting: Setting) -> Tensor:
        """(P, Q, D)"""
        question, rest = setting.scales
        centres = setting.mean(self.persona.shape[1]) + self.persona
        return centres[:, None] + question * self.question + rest * self.rest


def draw(width: int, questions: int, seed: int, personas: int) -> Effects:
    """`seed` is that of questions and rest, `personas` that of the personas."""
    spectrum = 1 / torch.arange(1, width + 1)
    scale = (spectrum / spectrum.sum()).sqrt()  # (D,)
    fixed, drawn = (torch.Generator().manual_seed(each) for each in (10**6 + personas, seed))
    return Effects(
        scale * torch.randn(PERSONAS, width, generator=fixed),
        scale * torch.randn(questions, width, generator=drawn),
        scale * torch.randn(PERSONAS, questions, width, generator=drawn),
    )


def coverage(
    width: int, questions: int, settings: Sequence[Setting], worlds: int, resamples: int
) -> list[tuple[float, float, float]]:
    """For each setting: the mean M1 of the worlds; how often `bootstrap_m1`'s interval holds it; and plain percentiles.

    A weighted mean of samples is linear in the effects. So those of the effects, which take nearly all of the time, are
    computed once a world for all settings.
    """
    weights = question_weights(questions, resamples).float()  # (R, Q)
    estimates = np.empty((len(settings), worlds))
    resampled = torch.empty(len(settings), worlds, resamples, dtype=torch.float64)
    for seed in range(worlds):
        effects = draw(width, questions, seed, personas=0)
        question, rest = weights @ effects.question, [weights @ persona for persona in effects.rest]  # (R, D)
        for i, setting in enumerate(settings):
            a, b = setting.scales
            total = torch.zeros(resamples, width)
            for centre, own in zip(setting.mean(width) + effects.persona, rest, strict=True):
                vectors = (centre + a * question).add_(own, alpha=b)  # (R, D), the resampled vectors of a persona
                total += vectors.div_(vectors.norm(dim=-1, keepdim=True))
            resampled[i, seed] = (total.double().square().sum(-1) - PERSONAS) / (PERSONAS * (PERSONAS - 1))
            estimates[i, seed] = m1(effects.persona + setting.mean(width) + a * effects.question.mean(0)
                                    + b * effects.rest.mean(1))  # fmt: skip
            if seed == 0:  # the short cut and the function are the same
                interval = bootstrap_interval(resampled[i, 0], float(estimates[i, 0]))
                assert interval == pytest.approx(bootstrap_m1(effects.samples(setting), resamples), abs=1e-6)
    rows = []
    for own, draws in zip(estimates, resampled, strict=True):
        truth = float(own.mean())
        moved = [bootstrap_interval(each, float(estimate)) for each, estimate in zip(draws, own, strict=True)]
        plain = np.quantile(draws.numpy(), [0.025, 0.975], axis=1).T
        shares = [float(np.mean([low <= truth <= high for low, high in intervals])) for intervals in (moved, plain)]
        rows.append((truth, *shares))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("width", [576, 3584])
def test_the_interval_of_m1_covers_at_the_sizes_of_real_models(width: int) -> None:
    """0.93 to 0.99 over 12 personas and 240 questions; a share of 200 worlds is itself known to 0.015."""
    settings = [Setting(w, s, level) for w, s in ((1.0, 0.8), (4.0, 0.4)) for level in (0.90, 0.95, 0.97)]
    for setting, (truth, moved, plain) in zip(settings, coverage(width, 240, settings, 200, 1000), strict=True):
        print(f"| {width} | {setting.within} | {setting.question} | {truth:.4f} | {moved:.3f} | {plain:.3f} |")
        assert 0.93 - 0.015 <= moved <= 0.99 + 0.01


def test_the_interval_of_m1_covers_in_a_small_world_and_plain_percentiles_do_not() -> None:
    settings = [Setting(8.0, 0.2, level) for level in (0.90, 0.97)]
    for _, moved, plain in coverage(24, 20, settings, 150, 200):
        assert 0.88 <= moved <= 1
        assert plain < 0.8


def test_the_jackknife_over_personas_covers_what_other_personas_give() -> None:
    """Personas are new in every world here. The bootstrap over questions, the control, does not know of them."""
    worlds = [draw(24, 20, seed, personas=seed).samples(Setting(1.0, 0.8, 0.95)) for seed in range(150)]
    vectors = [persona_vectors(samples) for samples in worlds]
    truth = float(np.mean([m1(each) for each in vectors]))
    assert np.mean([low <= truth <= high for low, high in map(jackknife_m1, vectors)]) > 0.85
    assert np.mean([low <= truth <= high for low, high in (bootstrap_m1(x, 200) for x in worlds)]) < 0.6
