"""M1 persona by persona, for every recipe that passes: a lower M1 may be one persona's doing.

A persona's number is its mean cosine with the others; over all personas their mean is M1. The intervals are bootstraps
over questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minipersona.geometry.statistics import PersonaCosine, bootstrap_by_persona
from minipersona.geometry.vectors import load_vectors
from minipersona.run.directory import vectors_file
from minipersona.significance import Interval
from minipersona.verdict.files import step_of
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import StudyResults


@dataclass(frozen=True)
class PersonaChange:
    """A persona's mean cosine with the others in the base and after a recipe, with its first seed."""

    base: float
    base_ci95: Interval
    recipe: float
    recipe_ci95: Interval


Personas = dict[str, PersonaChange]


def by_persona(recipes: Iterable[RecipeResult], results: StudyResults) -> dict[str, Personas]:
    """Of each recipe that passes a rule and counts, by its id; those whose vectors are missing are left out."""
    passers = [r for r in recipes if r.may_be_named and (r.passes("registered") or r.passes("substantive"))]
    return {recipe.id: changes for recipe in passers if (changes := _changes(recipe, results))}


def _changes(recipe: RecipeResult, results: StudyResults) -> Personas:
    directory, row = recipe.cells[0].directory, recipe.rows[0]
    assert directory is not None and results.protocol is not None
    files = (vectors_file(directory, 0), vectors_file(directory, step_of(row)))
    if not all(file.is_file() for file in files):
        return {}
    base, own = (_cosines(file, results.protocol.layer) for file in files)
    return {
        name: PersonaChange(one.cosine, (one.low, one.high), own[name].cosine, (own[name].low, own[name].high))
        for name, one in base.items()
    }


def _cosines(file: Path, layer: int) -> dict[str, PersonaCosine]:
    vectors = load_vectors(file, layer)
    return {one.persona: one for one in bootstrap_by_persona(vectors.at(layer), vectors.personas)}
