"""Two recipes side by side: the difference of their M1, by a paired bootstrap over questions."""

from __future__ import annotations

from collections.abc import Sequence

from minipersona.verdict.cells import CellResult
from minipersona.verdict.doing_less import Bootstrap
from minipersona.verdict.findings import Difference
from minipersona.verdict.recipe_results import RecipeResult

ROUNDING = 1e-6  # a smaller difference of two M1 may be that of fp32


def difference(recipe: RecipeResult, rivals: Sequence[CellResult], bootstrap: Bootstrap, level: float) -> Difference:
    """M1 of a recipe less its rival's last one, of equal seeds where both have them, else of the rival's first."""
    by_seed = {cell.seed: cell for cell in rivals}
    differences, intervals = [], []
    for cell, row in zip(recipe.cells, recipe.rows, strict=True):
        rival = by_seed.get(cell.seed, rivals[0])
        differences.append(row.m1 - rival.final.m1)
        own, other = bootstrap.m1_of(cell, row), bootstrap.m1_of(rival, rival.final)
        intervals.append(None if own is None or other is None else (own - other).interval(level))
    known = [interval for interval in intervals if interval is not None]
    interval = None
    if len(known) == len(intervals):
        interval = (min(low for low, _ in known), max(high for _, high in known))  # of several seeds, the widest
    return Difference(
        cell=recipe.id,
        rival=rivals[0].id,
        difference=sum(differences) / len(differences),
        interval=interval,
        level=level,
        lower=None if interval is None else interval[1] < -ROUNDING,
    )
