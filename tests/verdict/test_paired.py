"""M1 of a recipe less its rival's, seed by seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_study import SyntheticStudy

from minipersona.verdict.doing_less import bootstrap_of
from minipersona.verdict.findings import Difference
from minipersona.verdict.paired import difference
from minipersona.verdict.recipe_results import recipe_results


def compared(
    path: Path, own: dict[int, float], rival: dict[int, float], level: float = 0.95, **more: int | None
) -> Difference:
    """A recipe's M1 by its seeds against that of the baseline by its own."""
    study = SyntheticStudy(path)
    for seed, m1 in rival.items():
        study.cell("1", "baseline" if seed == 42 else f"baseline seed={seed}", m1, 1.0, seed=seed)
    for seed, m1 in own.items():
        study.cell("2A", f"beta=0.1 seed={seed}", m1, 1.0, seed=seed, noise_seed=seed, **more)  # type: ignore[arg-type]
    results = study.read()
    (recipe,) = [recipe for recipe in recipe_results(results) if recipe.phase == "2A"]
    return difference(recipe, results.of_phase("1"), bootstrap_of(results), level)


def test_equal_seeds_are_compared_and_else_the_rival_s_first(tmp_path: Path) -> None:
    found = compared(tmp_path, {42: 0.94, 43: 0.95, 44: 0.96}, {42: 0.98, 43: 0.96})
    assert found.difference == pytest.approx((-0.04 - 0.01 - 0.02) / 3)
    assert (found.cell, found.rival, found.level) == ("2A beta=0.1", "1 baseline", 0.95)


def test_of_several_seeds_the_interval_is_the_widest_and_lower_is_said_of_all_of_it(tmp_path: Path) -> None:
    first, second = (compared(tmp_path / f"{m1}", {42: m1}, {42: 0.98}) for m1 in (0.94, 0.97))
    both = compared(tmp_path / "both", {42: 0.94, 43: 0.97}, {42: 0.98, 43: 0.98})
    assert first.interval is not None and second.interval is not None and both.interval is not None
    assert first.interval[0] < -0.04 < first.interval[1] < second.interval[0] < -0.01 < second.interval[1] < 0
    assert both.interval == (pytest.approx(first.interval[0], abs=1e-3), pytest.approx(second.interval[1], abs=1e-3))
    assert both.lower is first.lower is second.lower is True
    assert compared(tmp_path / "one", {42: 0.94, 43: 0.985}, {42: 0.98, 43: 0.98}).lower is False
    wider = compared(tmp_path / "level", {42: 0.94}, {42: 0.98}, level=0.999)
    assert wider.interval is not None and wider.interval[0] < first.interval[0]


def test_without_vectors_the_difference_has_no_interval(tmp_path: Path) -> None:
    found = compared(tmp_path, {42: 0.94}, {42: 0.98}, less=None)
    assert found.difference == pytest.approx(-0.04) and found.interval is None and found.lower is None
