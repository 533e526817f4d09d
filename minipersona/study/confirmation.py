"""Confirmation: a recipe that passes is run again with fresh seeds, and so is what it is judged against.

A pass is first seen as the best of some thirty recipes with one seed, and the best of thirty passes by luck too often.
With fresh seeds it has to pass each time, against the baseline with the same seed. The seeds are the smallest ones
above those of the study, so that the same command finds the same cells again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minipersona.study.cell import Cell, Study, hash_cell
from minipersona.study.recipes import Recipe
from minipersona.study_config import STAGES, StudyConfig
from minipersona.verdict.files import Plan


def fresh_seeds(config: StudyConfig) -> range:
    """The seeds with which passers are run again; none where `confirmations` is 0."""
    first = max(config.seeds) + 1
    return range(first, first + config.confirmations)


def confirmation_cells(study: Study, passers: Sequence[Cell]) -> list[Cell]:
    """Every cell that confirms one of these, which are cells of a study's first seed: the baselines come first.

    Of phase 5 on harmful rows also the unmixed cells, beside which the answers of its recipes are read.
    """
    if not passers:
        return []
    unmixed = [cell for cell in study.cells if cell.recipe.phase == "EM" and cell.recipe.role == "registered"][:1]
    rehearsed = any(cell.recipe.phase in STAGES["5"] for cell in passers)
    originals = {cell.hash: cell for cell in (study.baseline, *(unmixed if rehearsed else []), *passers)}
    return [_again(study, original, seed) for original in originals.values() for seed in fresh_seeds(study.config)]


def stored_confirmations(study: Study, plan: Plan) -> list[Cell]:
    """The confirmations of an earlier command that hold: the published cells, and the baselines beside them.

    The others come back where their recipes still pass. Those of another version of the code or the data do not hold.
    """
    originals = {(cell.recipe.phase, cell.recipe.name): cell for cell in study.cells}
    cells = []
    for entry in plan.cells:
        original = originals.get((entry.phase, entry.name.removesuffix(f" seed={entry.seed}")))
        if entry.role == "confirmation" and original is not None:
            cell = _again(study, original, entry.seed)
            if cell.id == entry.cell:
                cells.append(cell)
    published = {cell.recipe.config.seed for cell in cells if study.published(cell)}
    return [
        cell
        for cell in cells
        if study.published(cell) or (cell.recipe.is_baseline and cell.recipe.config.seed in published)
    ]


def _again(study: Study, cell: Cell, seed: int) -> Cell:
    """A cell with another seed, judged against the baseline with that seed."""
    baseline = "" if cell == study.baseline else _again(study, study.baseline_of(cell), seed).hash
    recipe = cell.recipe
    reseeded = replace(recipe.config, seed=seed)
    return hash_cell(
        Recipe(recipe.phase, f"{recipe.name} seed={seed}", reseeded, recipe.knobs, "confirmation"), baseline
    )
