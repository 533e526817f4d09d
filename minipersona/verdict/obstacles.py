"""What stands against H_null, in words. H_null holds where nothing does:

witnesses    every phase has an effective one: a recipe other than the baseline that learned at least 0.9
points       every point that learned at least 0.9 has collapsed, whatever its role; the baseline's earlier steps
             and its scaled updates are points too
doing less   no recipe that learned less is better than doing less, with M1 below the collapse bound
passes       none is open, and no recipe failed to give a result
"""

from __future__ import annotations

from collections.abc import Sequence

from minipersona.run.judgement import LEAST_LEARNED
from minipersona.run.result import Checkpoint
from minipersona.verdict.cells import CellResult
from minipersona.verdict.doing_less import DoingLess, better_than_less
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import JudgedPoint, StudyResults


def obstacles(
    recipes: Sequence[RecipeResult],
    cells: Sequence[CellResult],
    phases: Sequence[Sequence[str]],
    results: StudyResults,
    comparisons: Sequence[DoingLess],
    points: Sequence[JudgedPoint] = (),
) -> list[str]:
    """A phrase each; `phases` are those that must bear witness, each by the cells' phases that it is made of."""
    parts = [
        *(_witness(group, recipes, cells) for group in phases),
        *_points(recipes, points, results),
        *_doing_less(recipes, results, comparisons),
        *_open(recipes, cells, results),
    ]
    return [part for part in parts if part]


def _witness(phases: Sequence[str], recipes: Sequence[RecipeResult], cells: Sequence[CellResult]) -> str:
    name = phases[0] if len(phases) == 1 else phases[-1][0]  # 5 is made of EM, 5A, 5B and 5C
    mine = [recipe for recipe in recipes if recipe.phase in phases]
    if any(recipe.is_witness for recipe in mine):
        return ""
    if not any(cell.phase in phases for cell in cells):
        return f"phase {name} is not part of this study and so bears no witness"
    effective = [recipe for recipe in mine if recipe.effective and recipe.learned is not None]
    if not effective:
        return f"phase {name} has no effective witness"
    best = max(effective, key=lambda recipe: recipe.merit)
    return (
        f"phase {name} has no witness: its best, {best.name}, learned {best.learned:.2f}, less than {LEAST_LEARNED:g}"
    )


def _points(recipes: Sequence[RecipeResult], points: Sequence[JudgedPoint], results: StudyResults) -> list[str]:
    bounds = results.bounds
    taught = [(recipe, row) for recipe in recipes for row in recipe.taught_rows if not row.collapsed]
    grown = _names([(recipe, row) for recipe, row in taught if row.mean_growth])
    between = _names([(recipe, row) for recipe, row in taught if bounds.passing <= row.m1 < bounds.collapsed])
    below = [(recipe, row) for recipe, row in taught if row.m1 < bounds.passing]
    scaled = sorted(
        point.scale
        for point in points
        if not point.collapsed and point.learned is not None and point.learned >= LEAST_LEARNED
    )
    return [
        f"M1 rises only because the mean that all personas share grows: {listed(grown)}" if grown else "",
        f"M1 lies between {bounds.passing:.4g} and {bounds.collapsed:.4g}: {listed(between)}" if between else "",
        *(f"{recipe.id} has M1 {row.m1:.4f} and yet does not pass: {why(recipe, row)}" for recipe, row in below[:3]),
        f"and so do {len(below) - 3} more" if len(below) > 3 else "",
        f"the baseline's own update, scaled by {scaled[0]:.2g}, learned enough and has not collapsed" if scaled else "",
    ]


def why(recipe: RecipeResult, row: Checkpoint) -> str:
    """Why a row that learned enough and has a low M1 is not a pass that counts."""
    if recipe.role in ("reference", "control"):
        return f"it is a {recipe.role}"
    if row.shortfalls:
        return "; ".join(row.shortfalls)
    if inconsistent := [answers.reason for answers in recipe.consistency if answers.consistent is not True]:
        return inconsistent[0]
    if not recipe.may_be_named:
        return f"it is labelled {', '.join(recipe.labels)}"
    return "another of its seeds fails"


def _doing_less(recipes: Sequence[RecipeResult], results: StudyResults, comparisons: Sequence[DoingLess]) -> list[str]:
    bounds = results.bounds
    kept = [
        recipe
        for recipe in recipes
        if recipe.role in ("registered", "beyond") and not recipe.teaches and recipe.m1 < bounds.collapsed
    ]
    verdicts = {recipe.id: better_than_less(recipe, comparisons) for recipe in kept}
    better = [name for name, found in verdicts.items() if found]
    unknown = [name for name, found in verdicts.items() if found is None]
    reasons = dict.fromkeys(row.reason for row in comparisons if row.recipe in unknown and row.reason)
    return [
        f"learned less, but keeps more than doing less would: {listed(better)}" if better else "",
        f"whether it keeps more than doing less would is not known of {listed(unknown)} ({' and '.join(reasons)})"
        if unknown
        else "",
    ]


def _open(recipes: Sequence[RecipeResult], cells: Sequence[CellResult], results: StudyResults) -> list[str]:
    rule = results.config.stop_rule
    opened = [(recipe.id, reason) for recipe in recipes if recipe.may_be_named and (reason := recipe.undecided(rule))]
    failed = [cell.id for cell in cells if cell.status == "failed"]
    return [
        f"the pass of {listed([name for name, _ in opened])} is open, since {opened[0][1]}" if opened else "",
        f"no result: {listed(failed)}" if failed else "",
    ]


def _names(rows: Sequence[tuple[RecipeResult, Checkpoint]]) -> list[str]:
    """The recipes of the rows; of one whose own seeds are not among them, that it is a fresh seed of it."""
    own = {recipe.id for recipe, row in rows if row in recipe.rows}
    return list(dict.fromkeys(r.id if r.id in own else f"{r.id} with a fresh seed" for r, _ in rows))


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
