"""The tables of the recipes that pass: persona by persona, at every measured layer, on other sets of personas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from minipersona.report.blocks import Cell, Table
from minipersona.report.tables import INTERVAL, SAID, interval_cell, number_cell, outcome_cell
from minipersona.run.judgement import separation
from minipersona.run.result import Checkpoint
from minipersona.significance import seed_interval
from minipersona.verdict.cells import bare_name
from minipersona.verdict.files import SetTransfer
from minipersona.verdict.recipe_results import RecipeResult, recipe_results
from minipersona.verdict.results import StudyResults
from minipersona.verdict.verdict import Verdict


def passers(results: StudyResults) -> list[RecipeResult]:
    """The recipes that pass a rule or that fresh seeds confirm: by the substantive rule first."""
    found = [r for r in recipe_results(results) if r.passes("registered") or r.passes("substantive") or r.confirmed]
    return sorted(found, key=lambda recipe: recipe.passes("substantive") is not True)


def passer_table(results: StudyResults) -> Table | None:
    """What a pass rests on; numbers are means over seeds, intervals the first seed's."""
    rows = [
        [
            Cell(recipe.id),
            number_cell(recipe.m1),
            interval_cell(recipe.rows[0].m1_ci95),
            interval_cell(recipe.rows[0].m1_ci95_personas),
            number_cell(recipe.mean("learned"), ".2f"),
            number_cell(recipe.mean("learned_personas"), ".2f"),
            number_cell(recipe.mean("separation"), ".2f"),
            number_cell(recipe.mean("discriminability"), ".2f"),
            number_cell(recipe.mean("spread"), ".2f"),
            outcome_cell(recipe.passes("registered")),
            outcome_cell(recipe.passes("substantive")),
            Cell(SAID[recipe.confirmed]),
            Cell(_fresh(recipe)),
            Cell(", ".join(recipe.labels)),
        ]
        for recipe in passers(results)
    ]
    columns = ("recipe", "M1", "95%, questions", "95%, personas", "learned", "under personas", "separation",
               "discriminability", "spread", "registered", "substantive", "confirmed", "fresh seeds",
               "labels")  # fmt: skip
    caption = (
        "Intervals of M1: bootstrap over questions, jackknife over personas. Separation: (1 - M1) / (1 - M1 of the "
        "base); spread: the variance between personas, and discriminability: that variance over the one within "
        "personas, both as a share of the base's. Fresh seeds: M1 and learned of each."
    )
    return Table("passers", columns, rows, caption) if rows else None


def _fresh(recipe: RecipeResult) -> str:
    fresh = recipe.confirmation
    if fresh is None:
        return "none"
    pairs = zip(fresh.cells, fresh.rows, strict=True)
    return "; ".join(f"{cell.seed}: {row.m1:.4f}, {_share(row)}" for cell, row in pairs)


def _share(row: Checkpoint) -> str:
    return "-" if row.learned is None else f"{row.learned:.2f}"


def persona_table(results: StudyResults, verdict: Verdict) -> Table | None:
    """Each persona's mean cosine with the others before and after every passer."""
    rows_of = {recipe.id: recipe.rows[0] for recipe in passers(results)}
    order = [recipe for recipe in rows_of if recipe in verdict.personas]
    rows = [
        [
            Cell(recipe),
            Cell(persona),
            number_cell(change.base),
            interval_cell(change.base_ci95),
            number_cell(change.recipe),
            interval_cell(change.recipe_ci95),
            number_cell(change.recipe - change.base, "+.4f"),
            number_cell((rows_of[recipe].m1_without or {}).get(persona)),
        ]
        for recipe in order
        for persona, change in verdict.personas[recipe].items()
    ]
    columns = ("recipe", "persona", "base", INTERVAL, "after", INTERVAL, "change", "M1 without it")
    caption = (
        "The mean cosine of each persona with the others, in the base and after the recipe's first seed; their mean is "
        "M1. Intervals are bootstraps over questions. M1 without it: M1 of the recipe with that persona left out."
    )
    return Table("personas", columns, rows, caption) if rows else None


def separation_table(results: StudyResults) -> Table | None:
    """What is left of the base's separation at every measured layer: the baseline and every passer."""
    base, protocol, baseline = results.base, results.protocol, results.baseline
    found = [(recipe.id, recipe.rows[0]) for recipe in passers(results)]
    if base is None or protocol is None or not found:
        return None
    models = [*([] if baseline is None else [("1 baseline", baseline.final)]), *found]
    layers = [str(layer) for layer in sorted(protocol.layers)]
    rows = [[Cell(name), *(number_cell(_left(row, base, layer), ".2f") for layer in layers)] for name, row in models]
    columns = ("recipe", *(f"layer {layer}" for layer in layers))
    caption = (
        f"Separation, (1 - M1) / (1 - M1 of the base), at each layer that is measured along training; layer "
        f"{protocol.layer} decides."
    )
    return Table("separation", columns, rows, caption, pinned=int(baseline is not None))


def _left(row: Checkpoint, base: Checkpoint, layer: str) -> float | None:
    if layer not in row.m1_by_layer or layer not in base.m1_by_layer:
        return None
    return separation(row.m1_by_layer[layer], base.m1_by_layer[layer])


def transfer_table(results: StudyResults) -> Table | None:
    """Every confirmed recipe on every set of personas at the deciding layer, and its worst layer there."""
    groups: dict[tuple[str, str], list[tuple[SetTransfer, str]]] = {}
    for cell in results.cells:
        if cell.transfer is not None:
            for name, one in cell.transfer.sets.items():
                label = name if name in (one.personas, Path(one.personas).stem) else f"{name}: {one.personas}"
                key = (f"{cell.phase} {bare_name(cell)}", label)
                groups.setdefault(key, []).append((one, str(cell.transfer.layer)))
    rows = [[Cell(recipe), Cell(label), *_on_set(seeds)] for (recipe, label), seeds in groups.items()]
    columns = ("recipe", "personas", "seeds", "M1, base", "baseline", "recipe", INTERVAL, "separation",
               "discriminability", "spread", "lowest separation", "at layer")  # fmt: skip
    caption = (
        "Recipes on sets of personas and questions that they were not chosen by, beside the study's own. Numbers are "
        "means over seeds; the interval of M1 is Student's, over seeds. M1, separation, discriminability and spread "
        "(variance between personas, alone and over that within, as shares of the base's) are at the deciding layer; "
        "the lowest separation is over all layers."
    )
    return Table("transfer", columns, rows, caption) if rows else None


def _on_set(seeds: Sequence[tuple[SetTransfer, str]]) -> list[Cell]:
    """A set's columns, of each seed's measurements there and the deciding layer."""
    one, layer = seeds[0]

    def over_seeds(value: Callable[[SetTransfer], float]) -> float:
        return fmean(value(each) for each, _ in seeds)

    left = {
        key: over_seeds(lambda each, key=key: each.separation(key))  # type: ignore[misc]
        for key, m1 in one.base.m1.items()
        if m1 < 1
    }
    worst = min(left, key=lambda key: left[key], default=None)
    varies = one.base.between_variance > 0 and one.base.within_variance > 0
    spread = over_seeds(lambda each: each.recipe.between_variance / each.base.between_variance) if varies else None
    apart = over_seeds(lambda each: each.recipe.ratio / each.base.ratio) if varies else None
    return [
        Cell(str(len(seeds)), float(len(seeds))),
        number_cell(one.base.m1[layer]),
        number_cell(over_seeds(lambda each: each.baseline.m1[layer])),
        number_cell(over_seeds(lambda each: each.recipe.m1[layer])),
        interval_cell(seed_interval([each.recipe.m1[layer] for each, _ in seeds])),
        number_cell(left.get(layer), ".2f"),
        number_cell(apart, ".2f"),
        number_cell(spread, ".2f"),
        number_cell(None if worst is None else left[worst], ".2f"),
        Cell("-" if worst is None else worst, None if worst is None else float(worst)),
    ]


def layer_table(verdict: Verdict, results: StudyResults) -> Table | None:
    """M1 at every layer, of the base, the baseline and the recipe of a positive verdict, by the study's own set."""
    named = verdict.recipe
    if named is None and verdict.beyond is not None:
        named = verdict.beyond.recipe
    cell = next((cell for cell in results.cells if named is not None and cell.hash == named.hashes[0]), None)
    if named is None or cell is None or cell.transfer is None or "study" not in cell.transfer.sets:
        return None
    own = cell.transfer.sets["study"]
    rows = [
        [Cell(layer, float(layer)), *(number_cell(model.m1[layer]) for model in (own.base, own.baseline, own.recipe))]
        for layer in sorted(own.base.m1, key=int)
    ]
    return Table(
        "layers", ("layer", "base", "baseline", "recipe"), rows, f"M1 at every layer. The recipe is {named.cell}."
    )
