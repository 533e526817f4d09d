"""The rules at and around their thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minipersona.config import DEFAULT_MODEL
from minipersona.hub import PINNED
from minipersona.run.judgement import (
    ABSOLUTE,
    Bounds,
    bounds_for,
    judge_row,
    learned_share,
    registered_pass,
    relative_bounds,
)
from minipersona.run.result import Baseline, Checkpoint, MeasurementProtocol
from minipersona.significance import student_quantile

BASELINE = Baseline("self", eval_loss=1.0, step=375, persona_loss=1.0)
NAMES = ("assistant", "pirate", "poet")


def row(m1: float, loss: float | None, **more: Any) -> Checkpoint:
    """A row of a base with M1 0.90, loss 2 and variances of 1, whose flags are wrong."""
    numbers: dict[str, Any] = {
        "m1_ci95": (m1 - 1e-4, m1 + 1e-4), "persona_loss": loss, "between_variance": (1 - m1) / 0.1,
        "within_variance": 1.0, "m1_without": dict.fromkeys(NAMES, m1), **more,
    }  # fmt: skip
    return Checkpoint(
        layer=3, m1=m1, centred_cosine=None, shared_mean_share=0.9, effective_rank=None, nearest_centroid_accuracy=None,
        m1_noise_floor=1e-3, m1_by_layer={}, step=375, eval_loss=loss, learned=9.0, delta_norm=1.0,
        registered_pass=None, substantive_pass=None, collapsed=False, **numbers,
    )  # fmt: skip


BASE = row(0.90, 2.0)


def judged(
    m1: float, loss: float | None, base: Checkpoint = BASE, bounds: Bounds = ABSOLUTE, **more: Any
) -> Checkpoint:
    return judge_row(row(m1, loss, **more), base, BASELINE, bounds)


# ---------------------------------------------------------------- the registered rule, to the letter


@pytest.mark.parametrize(
    "m1, loss, passes",
    [
        (0.90, 2.0, True),  # twice the baseline's is within
        (0.90, 2.0001, False),
        (0.9499, 1.0, True),
        (0.95, 1.0, False),  # the bound is strict
        (0.99, 1.0, False),
    ],
)
def test_the_registered_rule(m1: float, loss: float, passes: bool) -> None:
    assert registered_pass(m1, loss, 1.0) is passes
    assert judged(m1, loss).registered_pass is passes
    assert judged(m1, loss, bounds=relative_bounds(0.5)).registered_pass is passes  # whatever else decides


@pytest.mark.parametrize("baseline", [0.5, 1.0, 3.0])
def test_the_registered_bound_is_twice_the_baseline_s_loss(baseline: float) -> None:
    assert registered_pass(0.9, 2 * baseline, baseline) is True
    assert registered_pass(0.9, 2.0001 * baseline, baseline) is False
    assert registered_pass(0.9, None, baseline) is registered_pass(0.9, baseline, None) is None
    assert registered_pass(0.95, None, baseline) is registered_pass(0.95, baseline, None) is False


def test_the_untrained_base_passes_the_registered_rule_and_not_the_substantive_one() -> None:
    found = judge_row(BASE, BASE, BASELINE, ABSOLUTE)
    assert found.registered_pass is True and found.substantive_pass is False and found.learned == 0.0
    assert (found.separation, found.spread, found.discriminability) == (1.0, 1.0, 1.0)


# ---------------------------------------------------------------- the substantive rule


PASSING: dict[str, Any] = {"m1": 0.94, "loss": 1.05}


@pytest.mark.parametrize(
    "changes, passes, shortfall",
    [
        ({}, True, None),
        ({"m1_ci95": (0.93, 0.9499)}, True, None),
        ({"m1_ci95": (0.93, 0.95)}, False, "upper 95% bound of M1, 0.9500"),  # the bound is strict
        ({"loss": 1.0999}, True, None),
        ({"loss": 1.1001}, False, "learned is 0.89990, less than 0.9"),
        ({"persona_loss": 1.1999}, True, None),
        ({"persona_loss": 1.2001}, False, "learned under personas is 0.79990, less than 0.8"),
        ({"between_variance": 0.5001}, True, None),
        ({"between_variance": 0.4999}, False, "discriminability is 0.49990, less than 0.5"),
        ({"between_variance": 0.9, "within_variance": 1.81}, False, "discriminability"),
        ({"m1_without": {"assistant": 0.9499, "pirate": 0.94, "poet": 0.94}}, True, None),
        ({"m1_without": {"assistant": 0.9501, "pirate": 0.94, "poet": 0.94}}, False, "without assistant"),
        ({"persona_loss": None}, None, "learned under personas is not known"),
        ({"within_variance": None}, None, "discriminability is not known"),
        ({"m1_without": None}, None, "left out is not known"),
        ({"m1_without": {"pirate": 0.94, "poet": 0.94}}, None, "left out is not known"),
        ({"persona_loss": None, "m1_ci95": (0.93, 0.96)}, False, "upper 95% bound"),  # a failure stays one
    ],
)
def test_the_substantive_rule_asks_for_each_of_its_conditions(
    changes: dict[str, Any], passes: bool | None, shortfall: str | None
) -> None:
    found = judged(**(PASSING | changes))
    assert found.substantive_pass is passes
    assert found.shortfalls == () if shortfall is None else any(shortfall in said for said in found.shortfalls)


def test_without_a_baseline_or_what_a_base_of_an_older_version_lacks_the_pass_is_open() -> None:
    assert judge_row(row(0.94, 1.05), BASE, None, ABSOLUTE).substantive_pass is None
    assert judge_row(row(0.96, 1.05), BASE, None, ABSOLUTE).substantive_pass is False
    for name in ("persona_loss", "m1_without", "between_variance"):
        assert judged(**PASSING, base=replace(BASE, **{name: None})).substantive_pass is None
    flat = replace(BASE, eval_loss=1.009)  # the baseline gained under 0.01 nats: its share means nothing
    assert judged(0.94, 1.0, base=flat).learned is None and judged(0.94, 1.0, base=flat).substantive_pass is None


@pytest.mark.parametrize(
    "loss, m1, trade_off", [(1.5, 0.94, True), (1.5001, 0.94, False), (1.1001, 0.94, True), (1.0999, 0.94, False),
                            (1.3, 0.9499, False), (1.3, 0.96, False)]
)  # fmt: skip
def test_between_half_and_nine_tenths_learned_a_kept_geometry_is_a_trade_off(
    loss: float, m1: float, trade_off: bool
) -> None:
    assert judged(m1, loss).trade_off is trade_off


def test_each_loss_is_held_against_the_baseline_s_own() -> None:
    found = judge_row(row(0.94, 1.1, persona_loss=1.4), BASE, replace(BASELINE, persona_loss=1.5), ABSOLUTE)
    assert (found.learned, found.learned_personas) == (pytest.approx(0.9), pytest.approx(1.2))


def test_a_share_that_is_just_enough_is_enough() -> None:
    """9 of 10 nats, 8 of 10 under personas, half of the discriminability: all of them exact in binary arithmetic."""
    base = replace(BASE, eval_loss=10.0, persona_loss=10.0, between_variance=1.0)
    baseline = replace(BASELINE, eval_loss=0.0, persona_loss=0.0)
    found = judge_row(row(0.94, 1.0, persona_loss=2.0, between_variance=0.5), base, baseline, ABSOLUTE)
    assert (found.learned, found.learned_personas, found.discriminability) == (0.9, 0.8, 0.5)
    assert found.substantive_pass is True and found.trade_off is False
    half = judge_row(row(0.94, 5.0), base, baseline, ABSOLUTE)
    assert half.learned == 0.5 and half.trade_off is True


def test_learned_share() -> None:
    assert learned_share(2.0, 3.0, 1.0) == 0.5
    assert learned_share(0.5, 3.0, 1.0) == 1.25
    assert learned_share(3.5, 3.0, 1.0) == -0.25
    assert learned_share(1.0, 1.0, 1.0) is None


# ---------------------------------------------------------------- collapse and mean growth


@pytest.mark.parametrize(
    "m1, between, collapsed, grown",
    [
        (0.9699, 0.3, False, False),
        (0.97, 0.3, True, False),
        (0.97, 0.8999, True, False),
        (0.97, 0.9, False, True),
        (0.9699, 1.2, False, False),
        (0.97, None, True, False),  # not known
    ],
)
def test_collapse_and_growth_of_the_shared_mean(m1: float, between: float | None, collapsed: bool, grown: bool) -> None:
    found = judged(m1, 1.0, between_variance=between)
    assert (found.collapsed, found.mean_growth) == (collapsed, grown)


# ---------------------------------------------------------------- bounds


def test_relative_bounds_keep_the_meaning_of_the_registered_ones() -> None:
    """On the 7B they are 0.9498 and 0.9699; SmolLM2 at block 25 gets 0.9825 and 0.9895."""
    found = relative_bounds(0.8996)
    assert (found.passing, found.collapsed) == (pytest.approx(0.9498), pytest.approx(0.96988))
    found = relative_bounds(0.965)
    assert (found.passing, found.collapsed) == (pytest.approx(0.9825), pytest.approx(0.9895))
    base = row(0.965, 2.0)
    assert judged(0.9820, 1.05, base, found, between_variance=0.6).substantive_pass is True
    assert judged(0.9820, 1.05, base, ABSOLUTE, between_variance=0.6).substantive_pass is False
    assert judged(0.9896, 1.05, base, found).collapsed and not judged(0.9894, 1.05, base, found).collapsed


def test_the_jackknife_uses_the_base_without_the_same_persona() -> None:
    base = replace(BASE, m1_without={"assistant": 0.94, "pirate": 0.88, "poet": 0.88})
    without = {"assistant": 0.9699, "pirate": 0.9399, "poet": 0.9}
    assert judged(0.94, 1.05, base, m1_without=without).substantive_pass is True
    assert judged(0.94, 1.05, base, m1_without=without | {"pirate": 0.9401}).substantive_pass is False


def test_the_interval_over_personas_is_the_jackknife_s() -> None:
    values = np.array([0.93, 0.94, 0.96])
    low, high = judged(0.943, 1.05, m1_without=dict(zip(NAMES, values.tolist(), strict=True))).m1_ci95_personas
    error = ((3 - 1) / 3 * ((values - values.mean()) ** 2).sum()) ** 0.5
    assert 0.943 - low == pytest.approx(student_quantile(0.975, 2) * error) and high == 1.0
    assert judged(0.943, 1.05, m1_without=None).m1_ci95_personas is None


PROTOCOL = MeasurementProtocol(
    model=DEFAULT_MODEL, revision=PINNED[DEFAULT_MODEL], compute_dtype="bfloat16", layer=20, layers=(20,),
    layer_convention="", method="A", persona_set="registered", persona_digest="p", question_set="registered",
    question_digest="q", heldout="h", heldout_digest="h", max_tokens=2048, tokenizer_digest="t",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, choice, bounds",
    [
        ({}, "auto", ABSOLUTE),
        ({"layer": 14}, "auto", relative_bounds(0.8)),
        ({"model": "tiny"}, "auto", relative_bounds(0.8)),
        ({"revision": "other"}, "auto", relative_bounds(0.8)),
        ({"persona_set": "shipped"}, "auto", relative_bounds(0.8)),
        ({"question_set": "shipped"}, "auto", relative_bounds(0.8)),
        ({"method": "B"}, "auto", relative_bounds(0.8)),
        ({}, "relative", relative_bounds(0.8)),
        ({"model": "tiny"}, "absolute", ABSOLUTE),
    ],
)
def test_bounds_are_absolute_where_the_protocol_is_the_registered_one(
    changes: dict[str, Any], choice: Any, bounds: Bounds
) -> None:
    assert bounds_for(replace(PROTOCOL, **changes), 0.8, choice) == bounds
