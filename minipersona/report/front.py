"""The front: M1 of every recipe against what it learned, of the ordinary rows and under the measured personas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from minipersona.report.series import Missing, Series
from minipersona.run.judgement import learned_share
from minipersona.run.result import Checkpoint
from minipersona.verdict.cells import CellResult, bare_name
from minipersona.verdict.files import MatchedScale, same_hash, step_of
from minipersona.verdict.recipe_results import RecipeResult, recipe_results
from minipersona.verdict.results import JudgedPoint, StudyResults
from minipersona.verdict.verdict import Verdict

KINDS = {"reference": "reference", "control": "control", "confirmation": "fresh seed"}


@dataclass(frozen=True)
class FrontRow:
    """A point of the front. `dose` is a step or, of the scaled baseline, the scale or the mean over blocks."""

    kind: str  # base, baseline, recipe, reference, control, fresh seed, or one of these "on the way"; scaled baseline,
    # or matched scale where it has just a recipe's loss
    phase: str
    recipe: str
    seed: int | None
    dose: float
    learned: float
    learned_personas: float | None
    m1: float
    m1_low: float
    m1_high: float
    registered: bool | None
    substantive: bool | None
    trade_off: bool
    confirmed: bool | None
    label: str  # beside the point; empty for most


def front(results: StudyResults, named: Sequence[RecipeResult]) -> Series:
    """Every recipe at its last step, every checkpoint before it, and the baseline's own update scaled down.

    named  the recipes that have their name beside their point
    """
    rows = [*_base(results), *_recipes(results, named), *_chosen(results), *_scaled(results)]
    if not any(row.kind in ("baseline", "recipe") for row in rows):
        raise Missing("no recipe has a learned share, which needs a baseline and held-out losses")
    bounds = results.bounds
    return Series(
        "m1_against_learned",
        "What a recipe learns and what it does to the personas",
        "Lower right is better: the recipe learned the task and kept the personas apart. Left: learned of the held-out "
        "rows; right, where it was measured: of the same rows under the measured personas. Each point is a recipe at "
        "its last step, with one seed; bars are 95% bootstrap intervals over questions. Green: M1 < "
        f"{bounds.passing:.4g} and learned at least 0.9 (0.8 under personas), where the substantive rule can pass; "
        "yellow: trade-offs. A ring marks a recipe that fresh seeds confirm. Solid black: the baseline at its "
        "checkpoints. Dashed grey: the baseline's last update, scaled down, which is what doing less gives (plus "
        "signs: at just a recipe's loss). A recipe below it keeps more than doing less would.",
        rows,
        bounds,
    )


def shown_recipe(results: StudyResults, named: str | None) -> RecipeResult | None:
    """The recipe that stands for the search: the `named` one, or the one of lowest M1 that learned enough."""
    found = [c for c in recipe_results(results) if c.rows[0] is not (results.baseline and results.baseline.final)]
    judged = [c for c in found if c.teaches and c.role in ("registered", "beyond")]
    return next((c for c in found if c.id == named), min(judged, key=lambda c: c.m1, default=None))


def named_recipes(results: StudyResults, verdict: Verdict) -> list[RecipeResult]:
    """The recipes that the verdict names, of the registered search and beyond it; without one, what stands for all."""
    by_id = {recipe.id: recipe for recipe in recipe_results(results)}
    named = [verdict.recipe, None if verdict.beyond is None else verdict.beyond.recipe]
    found = [by_id[one.cell] for one in named if one is not None and one.cell in by_id]
    shown = shown_recipe(results, None)
    return found or ([] if shown is None else [shown])


def _base(results: StudyResults) -> Iterable[FrontRow]:
    if results.base is not None and results.baseline is not None:
        learned = replace(results.base, learned=0.0, learned_personas=0.0)
        yield from _row("base", None, learned, None, "untrained base")


def _recipes(results: StudyResults, named: Sequence[RecipeResult]) -> Iterable[FrontRow]:
    recipe_of = {id(row): recipe for recipe in recipe_results(results) for row in recipe.rows}
    labels = {id(recipe.rows[0]): recipe.id for recipe in named}
    for cell in results.cells:
        kind = "baseline" if cell is results.baseline else KINDS.get(cell.role, "recipe")
        for row in cell.checkpoints:
            last, recipe = row is cell.final, recipe_of.get(id(row))
            label = labels.get(id(row), "baseline" if last and kind == "baseline" else "")
            yield from _row(kind if last else f"{kind} on the way", cell, row, recipe, label)


def _row(
    kind: str, cell: CellResult | None, row: Checkpoint, recipe: RecipeResult | None, label: str
) -> Iterable[FrontRow]:
    """A point, where it has a learned share."""
    if row.learned is not None:
        yield FrontRow(
            kind=kind,
            phase="" if cell is None else cell.phase,
            recipe="base" if cell is None else bare_name(cell),
            seed=None if cell is None else cell.seed,
            dose=step_of(row),
            learned=row.learned,
            learned_personas=row.learned_personas,
            m1=row.m1,
            m1_low=row.m1_ci95[0],
            m1_high=row.m1_ci95[1],
            registered=row.registered_pass,
            substantive=row.substantive_pass,
            trade_off=row.trade_off,
            confirmed=None if recipe is None else recipe.confirmed,
            label=label,
        )


def _chosen(results: StudyResults) -> Iterable[FrontRow]:
    """The baseline's update by the scales that training personas chose."""
    for name, one in results.chosen_scales.items():
        phase, recipe = name.split(" ", 1)
        for row in _row("recipe", None, one.measured, None, ""):
            yield replace(row, phase=phase, recipe=recipe, dose=fmean(one.scales))


def _scaled(results: StudyResults) -> Iterable[FrontRow]:
    """The baseline's update scaled down: in tenths, and where it has a recipe's loss."""
    baseline, base = results.baseline, results.base
    if baseline is None or base is None:
        return
    final = baseline.final
    for point in results.frontier:
        yield from _point("scaled baseline", point, point.learned, None)
    for one in results.matched:
        if same_hash(one.baseline, baseline.hash):
            learned = learned_share(one.eval_loss, base.eval_loss, final.eval_loss)
            under = learned_share(one.persona_loss, base.persona_loss, final.persona_loss)
            yield from _point("matched scale", one, learned, under)


def _point(
    kind: str, point: JudgedPoint | MatchedScale, learned: float | None, personas: float | None
) -> Iterable[FrontRow]:
    if learned is not None:
        yield FrontRow(kind, "1", "scaled baseline", None, point.scale, learned, personas, point.m1, *point.m1_ci95,
                       None, None, False, None, "")  # fmt: skip
