"""The registered rules at and around their thresholds."""

from __future__ import annotations

import pytest

from minipersona.run.judgement import judge, learned_share

BASE, BASELINE = 3.0, 1.0


@pytest.mark.parametrize(
    "m1, loss, registered, substantive, collapsed",
    [
        (0.90, BASE, False, False, False),  # loss beyond twice the baseline's
        (0.90, 2.0, True, True, False),  # twice is within, half learned is enough
        (0.90, 2.0001, False, False, False),
        (0.9499, 1.0, True, True, False),
        (0.95, 1.0, False, False, False),  # the bound is strict
        (0.9699, 1.0, False, False, False),
        (0.97, 1.0, False, False, True),
        (0.99, 5.0, False, False, True),
    ],
)
def test_rules(m1: float, loss: float, registered: bool, substantive: bool, collapsed: bool) -> None:
    verdict = judge(m1, loss, BASE, BASELINE)
    assert verdict.registered_pass is registered
    assert verdict.substantive_pass is substantive
    assert verdict.collapsed is collapsed


def test_the_untrained_base_passes_the_registered_rule_and_not_the_substantive_one() -> None:
    verdict = judge(0.90, 1.5, 1.5, 1.0)
    assert verdict.registered_pass is True and verdict.substantive_pass is False and verdict.learned == 0.0


def test_what_cannot_be_said_is_none_but_a_failure_stays_one() -> None:
    assert judge(0.90, None, BASE, BASELINE).registered_pass is None
    assert judge(0.90, 1.0, BASE, None).substantive_pass is None
    assert judge(0.96, None, None, None).registered_pass is False
    assert judge(0.96, None, None, None).substantive_pass is False
    flat = judge(0.90, 1.0, 1.009, 1.0)  # the baseline gained under 0.01 nats: its share means nothing
    assert flat.learned is None and flat.registered_pass is True and flat.substantive_pass is None


def test_learned_share() -> None:
    assert learned_share(2.0, 3.0, 1.0) == 0.5
    assert learned_share(0.5, 3.0, 1.0) == 1.25
    assert learned_share(3.5, 3.0, 1.0) == -0.25
    assert learned_share(1.0, 1.0, 1.0) is None
