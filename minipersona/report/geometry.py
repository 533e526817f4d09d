"""The numbers of the geometry's figures, from the cosines of two personas to voice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minipersona.behaviour.voice import Voice
from minipersona.errors import UserError
from minipersona.geometry import measures
from minipersona.geometry.statistics import bootstrap_interval, question_weights
from minipersona.geometry.vectors import load_vectors
from minipersona.report.series import Missing, Series
from minipersona.run.directory import vectors_file
from minipersona.verdict.cells import CellResult, bare_name
from minipersona.verdict.files import read_voice, step_of
from minipersona.verdict.recipe_results import RecipeResult
from minipersona.verdict.results import StudyResults
from minipersona.verdict.verdict import Verdict


@dataclass(frozen=True)
class CosineRow:
    """The cosine of two personas' vectors in one model; `m1` is the model's."""

    model: str
    m1: float
    persona: str
    other: str
    cosine: float


def cosines(results: StudyResults, shown: Sequence[RecipeResult], named: bool) -> Series:
    """The cosine of every pair of personas, for the base, the baseline and the recipes that are shown.

    named  whether these are the verdict's
    """
    baseline, protocol = results.baseline, results.protocol
    if baseline is None or protocol is None:
        raise Missing("the baseline is not done")
    models = [("base", baseline, baseline.curve[0]), ("baseline", baseline, baseline.final)]
    models += [(recipe.id, recipe.cells[0], recipe.rows[0]) for recipe in shown]
    third = ". No recipe learned enough to stand beside them."
    if shown:
        lowest = "search found with the lowest M1 among those that learned at least 0.9"
        recipes = "recipes" if len(shown) > 1 else "recipe"
        third = f", and the {recipes} that the {'verdict names' if named else lowest}."
    return Series(
        "cosines",
        "Cosines between persona vectors",
        f"Raw cosines at layer {protocol.layer} on one scale: the untrained base, the baseline after its last step"
        + third,
        [CosineRow(name, row.m1, *pair) for name, cell, row in models
         for pair in _pairs(cell, protocol.layer, step_of(row))],
    )  # fmt: skip


def _pairs(cell: CellResult, layer: int, step: int) -> list[tuple[str, str, float]]:
    assert cell.directory is not None
    file = vectors_file(cell.directory, step)
    if not file.is_file():
        raise Missing(f"there is no {file.parent.parent.name}/{file.parent.name}/{file.name}")
    try:
        vectors = load_vectors(file, layer)
        matrix = measures.cosines(vectors.mean(layer)).tolist()  # (P, P)
    except UserError as error:
        raise Missing(str(error).replace(str(cell.directory.parent) + "/", "")) from None
    names = vectors.personas
    return [(a, b, matrix[i][j]) for i, a in enumerate(names) for j, b in enumerate(names)]


@dataclass(frozen=True)
class DecompositionRow:
    """The parts of a model's geometry; the last two are multiples of the base's variances."""

    phase: str
    recipe: str
    shared_mean_share: float | None
    between_variance: float | None
    within_variance: float | None
    between_of_base: float | None
    within_of_base: float | None


def decomposition(results: StudyResults) -> Series:
    """The shared mean's share and the variances of the base and of every recipe at its last step."""
    base = results.base
    judged = [] if base is None else [("", "base", base)]
    judged += [(cell.phase, cell.name, cell.final) for cell in results.cells if cell.result is not None]
    rows = [
        DecompositionRow(
            phase,
            name,
            row.shared_mean_share,
            row.between_variance,
            row.within_variance,
            None if base is None else _multiple(row.between_variance, base.between_variance),
            None if base is None else _multiple(row.within_variance, base.within_variance),
        )
        for phase, name, row in judged
    ]
    if len(rows) < 2 or all(row.shared_mean_share is None for row in rows):
        raise Missing("no recipe has the measures that it shows")
    return Series(
        "decomposition",
        "What the collapse consists of",
        "A raw cosine rises where the mean that all personas share grows (left; its share of the mean squared norm) "
        "or where they move together (middle; variance between personas, as a multiple of the base's). Right: how far "
        "one persona's vector moves from question to question, as a multiple of the base's. Vertical lines: the base "
        "(grey) and the baseline (black). Each recipe at its last step.",
        rows,
    )


def _multiple(own: float | None, base: float | None) -> float | None:
    return own / base if own is not None and base else None


# ---------------------------------------------------------------- persona by persona


@dataclass(frozen=True)
class PersonaRow:
    """A persona's mean cosine with the others: in the base, after the baseline, after a recipe that passes."""

    recipe: str
    persona: str
    base: float
    base_low: float
    base_high: float
    baseline: float | None
    after: float
    after_low: float
    after_high: float


def personas(results: StudyResults, verdict: Verdict, shown: Sequence[RecipeResult]) -> Series:
    """M1 by persona before and after each of the shown recipes that passes."""
    baseline = None if results.baseline is None else results.baseline.final.m1_by_persona
    rows = [
        PersonaRow(recipe.id, name, one.base, *one.base_ci95, (baseline or {}).get(name), one.recipe, *one.recipe_ci95)
        for recipe in shown
        for name, one in verdict.personas.get(recipe.id, {}).items()
    ]
    if not rows:
        raise Missing("no recipe that the verdict names has its vectors")
    return Series(
        "personas",
        "M1 persona by persona",
        "The mean cosine of each persona with the others; their mean is M1. Grey: the base; black: the baseline after "
        "its last step; colour: the recipe. Bars are 95% bootstrap intervals over questions. A recipe protects the "
        "personas where it keeps all of them apart, and not only one from the rest.",
        rows,
    )


# ---------------------------------------------------------------- other layers and sets of personas


@dataclass(frozen=True)
class TransferRow:
    """M1 at a layer on a set of personas, and the separation that is left of the base's."""

    recipe: str
    seed: int
    personas: str  # "study" is the study's own set
    layer: int
    deciding: bool
    base: float
    baseline: float
    m1: float
    separation_baseline: float
    separation: float


def transfer(results: StudyResults) -> Series:
    """Every confirmed recipe, with every seed, on every set of personas at every layer, beside base and baseline."""
    rows = [
        TransferRow(
            f"{cell.phase} {bare_name(cell)}", cell.seed, name, int(layer), int(layer) == cell.transfer.layer,
            one.base.m1[layer], one.baseline.m1[layer], one.recipe.m1[layer],
            (1 - one.baseline.m1[layer]) / (1 - one.base.m1[layer]), one.separation(layer),
        )
        for cell in results.cells
        if cell.transfer is not None
        for name, one in cell.transfer.sets.items()
        for layer in sorted(one.base.m1, key=int)
        if one.base.m1[layer] < 1
    ]  # fmt: skip
    if not rows:
        raise Missing("no recipe was measured on other sets of personas, as confirmed ones are")
    return Series(
        "transfer",
        "Other personas, other layers",
        "The separation (1 - M1) / (1 - M1 of the base) that is left at each layer, a panel for each set of personas: "
        "the mean over seeds. Recipes were chosen by the first set and seed alone. Dotted line: half of the base's, "
        "where the bound on M1 lies by its meaning. Vertical line: the deciding layer.",
        rows,
    )


# ---------------------------------------------------------------- voice


@dataclass(frozen=True)
class VoiceRow:
    """Voice of a model in nats a response token, and as a share of the base's."""

    phase: str
    model: str
    seed: int | None
    nats: float
    nats_low: float
    nats_high: float
    share: float
    share_low: float
    share_high: float


def voice(results: StudyResults) -> Series:
    """Voice of the base, the baseline and every other cell in which it was measured."""
    base = read_voice(results.directory / "base")
    measured = [(cell.phase, f"{cell.phase} {bare_name(cell)}", cell.seed, one) for cell, one in _voices(results)]
    if base is None or base.value <= 0 or not measured:
        raise Missing("voice was not measured")
    comparable = [row for row in measured if row[3].responses == base.responses]
    if not comparable:
        raise Missing("voice was measured on other responses than the base's")
    return Series(
        "voice",
        "Voice",
        "How much a response token says about which persona speaks, in the model's own probabilities, on the base's "
        f"responses: a share of the base's {base.value:.4f} nats a token, a bar for the mean over seeds and a dot a "
        "seed. Lines are the first seed's 95% bootstrap interval over questions, the same ones for both models. 0: the "
        "model ignores the persona.",
        [_voice_row("", "base", None, base, base), *(_voice_row(*row, base) for row in comparable)],
    )


def voice_shares(results: StudyResults) -> dict[str, float]:
    """Voice as a share of the base's, by the hash of each cell in which it was measured at its last step."""
    base = read_voice(results.directory / "base")
    if base is None or base.value <= 0:
        return {}
    return {
        cell.hash: one.value / base.value
        for cell, one in _voices(results)
        if one.responses == base.responses and one.step == step_of(cell.final)
    }


def _voices(results: StudyResults) -> list[tuple[CellResult, Voice]]:
    found = [(cell, read_voice(cell.directory)) for cell in results.cells if cell.directory is not None]
    return [(cell, voice) for cell, voice in found if voice is not None]


def _voice_row(phase: str, model: str, seed: int | None, own: Voice, base: Voice) -> VoiceRow:
    share = own.value / base.value
    of_own, of_base = (torch.tensor([*one.by_response.values()], dtype=torch.float64).mean(0) for one in (own, base))
    weights = question_weights(len(of_base), 1000)  # (R, Q)
    low, high = bootstrap_interval((weights @ of_own) / (weights @ of_base), share)
    return VoiceRow(phase, model, seed, own.value, *own.ci95, share, low, high)
