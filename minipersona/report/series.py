"""The numbers of each figure. A figure is drawn from its rows alone, and the CSV beside it holds the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from minipersona.errors import UserError
from minipersona.geometry.measures import cosines
from minipersona.geometry.vectors import load_vectors
from minipersona.report.blocks import plain
from minipersona.report.names import Row
from minipersona.run.judgement import PASS_M1
from minipersona.run.result import Checkpoint
from minipersona.run.train import vectors_file
from minipersona.verdict.files import step_of
from minipersona.verdict.mixture_threshold import broad_fraction
from minipersona.verdict.recipe_results import RecipeResult, bare_name, mixtures_reference, recipe_results
from minipersona.verdict.results import CellResult, JudgedPoint, StudyResults
from minipersona.verdict.verdict import Verdict

CURVE_POINTS = 101


@dataclass(frozen=True)
class Series:
    """What a figure shows: `rows` under `columns`."""

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[Row]

    def to_csv(self) -> str:
        """The rows as CSV; numbers in full precision, nothing where there is none."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: plain(v) if isinstance(v, str) else v for key, v in row.items()} for row in self.rows)
        return text.getvalue()


class Missing(Exception):
    """A figure that cannot be drawn, and why; the report says so in its place."""


def all_series(results: StudyResults, verdict: Verdict) -> tuple[list[Series], dict[str, str]]:
    """The series of every figure that has its data, and by name the reason of every one that has not."""
    builders: dict[str, Callable[[StudyResults, Verdict], Series]] = {
        "m1_against_learned": m1_against_learned,
        "m1_by_step": m1_by_step,
        "cosines": cosine_matrices,
        "decomposition": decomposition,
        "mixture": mixture,
    }
    series, missing = [], {}
    for name, build in builders.items():
        try:
            series.append(build(results, verdict))
        except Missing as reason:
            missing[name] = str(reason)
    assert all(built.name in builders for built in series)
    return series, missing


# ---------------------------------------------------------------- M1


def m1_by_step(results: StudyResults, verdict: Verdict) -> Series:
    """M1 at every checkpoint of every cell; step 0 is the base."""
    rows = [
        {**_name(cell), "step": row.step, "m1": row.m1, **_interval(row)}
        for cell in results.cells
        for row in cell.curve
    ]
    if not rows:
        raise Missing("no cell is done")
    return Series(
        "m1_by_step",
        "M1 along training",
        "Each panel shows a phase's recipes beside the unregularised baseline (black). Bands are 95% bootstrap "
        "intervals over questions. Dotted lines: M1 = 0.95, below which a recipe can pass, and M1 = 0.97, from which "
        "it counts as collapsed. Steps are spaced by their square root.",
        ("phase", "recipe", "seed", "step", "m1", "m1_low", "m1_high"),
        rows,
    )


def m1_against_learned(results: StudyResults, verdict: Verdict) -> Series:
    """Every recipe at its last step, every dose on the way, and the baseline's own update scaled down."""
    rows = []

    def add(kind: str, names: Row, dose: float, row: Checkpoint | JudgedPoint) -> None:
        if row.learned is not None:
            passes = {"registered": row.registered_pass, "substantive": row.substantive_pass}
            place = {"dose": dose, "learned": row.learned, "m1": row.m1, **_interval(row)}
            rows.append({"kind": kind, **names, **place, **passes})

    if results.base is not None:
        base = replace(results.base, learned=0.0 if results.baseline else None)
        add("base", {"phase": "", "recipe": "base", "seed": None}, 0, base)
    for cell in results.cells:
        for row in cell.checkpoints:
            final = row is cell.checkpoints[-1]
            kind = "baseline" if cell.id == "1 baseline" else "recipe"
            add(kind if final else f"{kind} on the way", _name(cell), step_of(row), row)
    for point in results.frontier:
        add("scaled baseline", {"phase": "1", "recipe": "scaled baseline", "seed": None}, point.scale, point)
    if not any(row["kind"] in ("baseline", "recipe") for row in rows):
        raise Missing("no recipe has a learned share, which needs a baseline and held-out losses")
    return Series(
        "m1_against_learned",
        "What a recipe learns and what it does to the personas",
        "Lower right is better: it learned the task and left the personas apart. Shaded: M1 < 0.95 and learned at "
        "least 0.5, where the substantive rule can pass. Solid black: the baseline along training. Dashed grey: the "
        "baseline's last update scaled by 0 to 1, which is what merely doing less gives. A recipe below both lines "
        "keeps more than doing less would. Bars are 95% bootstrap intervals over questions. Each seed is a point.",
        ("kind", "phase", "recipe", "seed", "dose", "learned", "m1", "m1_low", "m1_high", "registered", "substantive"),
        rows,
    )


def _name(cell: CellResult) -> Row:
    """A cell among the seeds of its recipe."""
    return {"phase": cell.phase, "recipe": bare_name(cell), "seed": cell.seed}


def _interval(row: Checkpoint | JudgedPoint) -> Row:
    low, high = row.m1_ci95
    return {"m1_low": low, "m1_high": high}


# ---------------------------------------------------------------- geometry


def shown_recipe(results: StudyResults, verdict: Verdict) -> RecipeResult | None:
    """The recipe that stands for the search: the verdict's, or of those that learned enough the one with lowest M1."""
    found = [c for c in recipe_results(results) if c.rows[0] is not (results.baseline and results.baseline.final)]
    named = None if verdict.recipe is None else verdict.recipe.cell
    learned = [c for c in found if c.teaches]
    return next((c for c in found if c.id == named), min(learned, key=lambda c: c.m1, default=None))


def cosine_matrices(results: StudyResults, verdict: Verdict) -> Series:
    """The cosine of every pair of personas, for the base, the baseline and the recipe that is shown."""
    baseline, protocol = results.baseline, results.protocol
    if baseline is None or protocol is None:
        raise Missing("the baseline is not done")
    models = [("base", baseline, baseline.curve[0]), ("baseline", baseline, baseline.final)]
    shown = shown_recipe(results, verdict)
    if shown is not None:
        models.append((shown.id, shown.cells[0], shown.rows[0]))
    rows = []
    for name, cell, judged in models:
        for a, b, value in _pairs(cell, protocol.layer, step_of(judged)):
            rows.append({"model": name, "m1": judged.m1, "persona": a, "other": b, "cosine": value})
    passer = "the recipe that the verdict names" if verdict.recipe else (
        "the recipe with the lowest M1 of those that learned at least 0.5"
    )  # fmt: skip
    return Series(
        "cosines",
        "Cosines between persona vectors",
        f"Raw cosines at layer {protocol.layer} on one scale: the untrained base, the baseline after its "
        "last step" + (f", and {passer}." if shown else ". No recipe learned enough to stand beside them."),
        ("model", "m1", "persona", "other", "cosine"),
        rows,
    )


def _pairs(cell: CellResult, layer: int, step: int) -> list[tuple[str, str, float]]:
    assert cell.directory is not None
    file = vectors_file(cell.directory, step)
    if not file.is_file():
        raise Missing(f"there is no {file.parent.parent.name}/{file.parent.name}/{file.name}")
    try:
        vectors = load_vectors(file)
        matrix = cosines(vectors.mean(layer)).tolist()  # (P, P)
    except UserError as error:
        raise Missing(str(error).replace(str(cell.directory.parent) + "/", "")) from None
    names = vectors.personas
    return [(a, b, matrix[i][j]) for i, a in enumerate(names) for j, b in enumerate(names)]


def decomposition(results: StudyResults, verdict: Verdict) -> Series:
    """The shared mean's share, and the variances as multiples of the base's, of the base and of every recipe."""
    base, rows = results.base, list[Row]()
    judged = [] if base is None else [("", "base", base)]
    judged += [(cell.phase, cell.name, cell.final) for cell in results.cells if cell.result is not None]
    for phase, name, row in judged:
        rows.append(
            {
                "phase": phase,
                "recipe": name,
                "shared_mean_share": row.shared_mean_share,
                "between_variance": row.between_variance,
                "within_variance": row.within_variance,
                "between_of_base": _multiple(row.between_variance, None if base is None else base.between_variance),
                "within_of_base": _multiple(row.within_variance, None if base is None else base.within_variance),
            }
        )
    if len(rows) < 2 or all(row["shared_mean_share"] is None for row in rows):
        raise Missing("no recipe has the measures that it shows")
    return Series(
        "decomposition",
        "What the collapse consists of",
        "A raw cosine rises where the mean that all personas share grows (left; its share of the mean squared norm) "
        "or where they move together (middle; variance between personas, as a multiple of the base's). Right: how far "
        "one persona's vector moves from question to question, as a multiple of the base's. Vertical lines: the base "
        "(grey) and the baseline (black). Each recipe at its last step.",
        tuple(rows[0]),
        rows,
    )


def _multiple(own: float | None, base: float | None) -> float | None:
    return own / base if own is not None and base else None


# ---------------------------------------------------------------- mixtures


def mixture(results: StudyResults, verdict: Verdict) -> Series:
    """M1 against the broad fraction, with the fitted curve and where it crosses 0.95."""
    reference = mixtures_reference(results)
    thresholds = {phase: found for phase, found in verdict.threshold.items() if found.points}
    mixtures = [recipe for recipe in recipe_results(results) if recipe.phase in thresholds]
    if reference is None or not mixtures:
        raise Missing("no mixture is done, or not what it is compared with")
    columns = (
        "phase",
        "kind",
        "recipe",
        "seed",
        "fraction",
        "m1",
        "m1_low",
        "m1_high",
        "fraction_low",
        "fraction_high",
    )
    rows = []

    def add(kind: str, fraction: float, m1: float, **more: Any) -> None:
        rows.append(dict.fromkeys(columns) | {"kind": kind, "fraction": fraction, "m1": m1, **more})

    def measured(fraction: float, cell: CellResult, **names: str) -> None:
        add("measured", fraction, cell.final.m1, **(_name(cell) | names), **_interval(cell.final))

    for phase, found in thresholds.items():
        measured(0.0, reference, phase=phase, recipe="nothing mixed in")
        for mixed in mixtures:
            for cell in mixed.cells if mixed.phase == phase else ():
                measured(broad_fraction(mixed), cell)
        if found.fit is not None and found.range is not None:
            low, high = found.range
            for k in range(CURVE_POINTS):
                fraction = low + (high - low) * k / (CURVE_POINTS - 1)
                add("fit", fraction, found.fit.at(fraction), phase=phase)
        if found.fraction is not None:
            ends = found.ci95 or (None, None)
            add("threshold", found.fraction, PASS_M1, phase=phase, fraction_low=ends[0], fraction_high=ends[1])
    return Series(
        "mixture",
        "How much broad data it takes",
        "M1 against the share of rows that broad data takes: raw text (5A) or other instructions (5B). The curve is "
        "m_inf + (m_0 - m_inf) exp(-f / f_0), fitted by least squares. Where it crosses 0.95, the fraction is marked "
        "with its 95% bootstrap interval.",
        columns,
        rows,
    )
