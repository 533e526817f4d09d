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

from minipersona.geometry.measures import m1, m1_without, persona_vectors
from minipersona.geometry.statistics import bootstrap_interval, bootstrap_m1, jackknife_interval, question_weights

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


def spectrum(width: int) -> Tensor:
    """(D,) standard deviations, of total variance 1."""
    variances = 1 / torch.arange(1, width + 1)
    return (variances / variances.sum()).sqrt()


def draw(width: int, questions: int, seed: int, personas: int) -> Effects:
    """`seed` is that of questions and rest, `personas` that of the personas."""
    scale = spectrum(width)  # (D,)
    fixed, drawn = (torch.Generator().manual_seed(each) for each in (10**6 + personas, seed))
    return Effects(
        scale * torch.randn(PERSONAS, width, generator=fixed),
        scale * torch.randn(questions, width, generator=drawn),
        scale * torch.randn(PERSONAS, questions, width, generator=drawn),
    )


def estimates(width: int, questions: int, setting: Setting, personas: Tensor, worlds: int) -> Tensor:
    """M1 in so many worlds, (worlds,): the means over questions are drawn themselves, with 1 / Q of the variance."""
    generator, scale = torch.Generator().manual_seed(1), spectrum(width) / questions**0.5
    question, rest = setting.scales
    found = []
    for _ in range(worlds):
        means = scale * torch.randn(PERSONAS + 1, width, generator=generator)
        units = torch.nn.functional.normalize(personas + setting.mean(width) + question * means[0] + rest * means[1:])
        found.append(units.sum(0).double().square().sum())
    return (torch.stack(found) - PERSONAS) / (PERSONAS * (PERSONAS - 1))


def coverage(
    width: int, questions: int, settings: Sequence[Setting], worlds: int, resamples: int
) -> list[tuple[float, float, float]]:
    """For each setting: the mean M1 of 2,000 worlds; how often `bootstrap_m1`'s interval holds it; plain percentiles.

    Of Gaussian samples the mean and the residuals are independent, and an interval's distance from its estimate hangs
    on the residuals. So few worlds are bootstrapped, and each one's interval is laid around the estimates of all. A
    weighted mean of samples is linear in the effects: those of the effects are computed once a world for all settings.
    """
    weights = question_weights(questions, resamples).float()  # (R, Q)
    moved, plain = torch.zeros(2, len(settings), worlds, 2, dtype=torch.float64)
    for seed in range(worlds):
        effects = draw(width, questions, seed, personas=0)
        question, rest = weights @ effects.question, [weights @ persona for persona in effects.rest]  # (R, D)
        for i, setting in enumerate(settings):
            a, b = setting.scales
            total = torch.zeros(resamples, width)
            for centre, own in zip(setting.mean(width) + effects.persona, rest, strict=True):
                vectors = (centre + a * question).add_(own, alpha=b)  # (R, D), the resampled vectors of a persona
                total += vectors.div_(vectors.norm(dim=-1, keepdim=True))
            resampled = (total.double().square().sum(-1) - PERSONAS) / (PERSONAS * (PERSONAS - 1))
            estimate = m1(persona_vectors(samples := effects.samples(setting)))
            interval = bootstrap_interval(resampled, estimate)
            if seed == 0:  # the short cut and the function are the same
                assert interval == pytest.approx(bootstrap_m1(samples, resamples), abs=1e-6)
            moved[i, seed] = torch.tensor(interval) - estimate
            plain[i, seed] = torch.from_numpy(np.quantile(resampled.numpy(), [0.025, 0.975])) - estimate
    rows = []
    for i, setting in enumerate(settings):
        found = estimates(width, questions, setting, effects.persona, 2000)
        error = (found.mean() - found)[:, None]  # (2000, 1), of the truth from each estimate
        shares = [
            float(((error >= each[i, :, 0]) & (error <= each[i, :, 1])).double().mean()) for each in (moved, plain)
        ]
        rows.append((float(found.mean()), *shares))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("width, worlds", [(576, 20), (3584, 5)])  # of the wider, 20 take eight minutes
def test_the_interval_of_m1_covers_at_the_sizes_of_real_models(width: int, worlds: int) -> None:
    """0.93 to 0.99 over 12 personas and 240 questions; first with the variances of SmolLM2-135M at block 29."""
    settings = [Setting(w, s, level) for w, s in ((3.0, 0.87), (4.0, 0.4)) for level in (0.90, 0.95, 0.97)]
    for setting, (truth, moved, plain) in zip(settings, coverage(width, 240, settings, worlds, 1000), strict=True):
        print(f"| {width} | {setting.within} | {setting.question} | {truth:.4f} | {moved:.3f} | {plain:.3f} |")
        assert 0.93 <= moved <= 0.99


def test_the_interval_of_m1_covers_in_a_small_world_and_plain_percentiles_do_not() -> None:
    settings = [Setting(8.0, 0.2, level) for level in (0.90, 0.97)]
    for _, moved, plain in coverage(24, 20, settings, 40, 200):
        assert 0.88 <= moved <= 1
        assert plain < 0.8


def test_the_jackknife_over_personas_covers_what_other_personas_give() -> None:
    """Personas are new in every world here. The bootstrap over questions, the control, does not know of them."""
    worlds = [draw(24, 20, seed, personas=seed).samples(Setting(1.0, 0.8, 0.95)) for seed in range(150)]
    vectors = [persona_vectors(samples) for samples in worlds]
    truth = float(np.mean([m1(each) for each in vectors]))
    covered = []
    for each in vectors:
        without = m1_without(each)
        assert without is not None
        low, high = jackknife_interval(m1(each), without)
        covered.append(low <= truth <= high)
    assert np.mean(covered) > 0.85
    assert np.mean([low <= truth <= high for low, high in (bootstrap_m1(x, 200) for x in worlds)]) < 0.6
