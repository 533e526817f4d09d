"""The verdict on a study, from what its directory holds. The first of these that applies, in this order:

    not_reproduced   the calibration was due and failed: no number of the study is to be trusted
    positive         a recipe passes by the stop rule, in a phase all of whose cells are done or failed
    incomplete       a planned cell of a phase that was reached is missing, or the baseline is; or a calibration that
                     is due; or a pass waits for the answers of the multi-prompt evaluation
    h_null           every recipe with learned >= 0.9 has M1 >= 0.97, there is one, no cell failed and no pass is open
    inconclusive     everything else

A pass is open where its answers are in and decide nothing, such as those that the judge could not score. A failed cell
is a recipe that was tried and has no result. It might have been the exception, so it forbids h_null, and
running the study again tries it again; a failed baseline leaves nothing to judge by and the study incomplete. An
ineffective cell bears no witness for h_null, but against it: its M1 and its loss are those of a recipe all the same.
Once a phase has a passer the later phases are skipped, unless the search is exhaustive.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minipersona.files import read_json, write_text
from minipersona.run.judgement import COLLAPSED_M1, LEAST_LEARNED, PASS_M1
from minipersona.study_config import PHASES, STAGES
from minipersona.verdict.calibration import calibration_due
from minipersona.verdict.deviations import deviations
from minipersona.verdict.doing_less import bootstrap_of, dose_curve, frontier_curve, place
from minipersona.verdict.hypotheses import hypotheses
from minipersona.verdict.mixture_threshold import mixture_threshold
from minipersona.verdict.phase_five import MIXTURES, phase_five
from minipersona.verdict.recipe_results import RecipeResult, behaviour_against, recipe_results
from minipersona.verdict.results import CellResult, StudyResults, Table
from minipersona.verdict.summary import sentence

VERDICTS = ("positive", "h_null", "inconclusive", "not_reproduced", "incomplete")


def decide(results: StudyResults) -> dict[str, Any]:
    """The part of verdict.json that says how a study goes on: `verdict` and `recipe`. It reads no vectors."""
    found = recipe_results(results)
    verdict = overall(found, results)
    recipe = best(found, results) if verdict == "positive" else None
    return {"verdict": verdict, "recipe": None if recipe is None else recipe.summary()}


def judge_study(results: StudyResults) -> dict[str, Any]:
    """verdict.json of a study, finished or not. Deterministic: equal directories give equal verdicts.

    It reads the vectors of every cell, about a second each at the size of the 7B.
    """
    found = recipe_results(results)
    rule = results.stop_rule
    decision = decide(results)
    verdict = decision["verdict"]
    passers = {name: [c for c in found if c.passes(name)] for name in ("registered", "substantive")}
    recipe = best(found, results) if verdict == "positive" else None

    bootstrap = bootstrap_of(results)
    frontier, dose = frontier_curve(results, bootstrap), dose_curve(results, bootstrap)
    placed = [row for c in found if not _is_end_of_dose(c, results) for row in place(c, frontier, dose, bootstrap)]
    phases = _phases(found, results)
    return {
        **decision,
        "results_digest": results.digest,
        "stop_rule": rule,
        "registered": {"passers": [c.summary() for c in passers["registered"]]},
        "substantive": {"passers": [c.summary() for c in passers["substantive"]]},
        "sentence": sentence(verdict, found, recipe, placed, results),
        "hypotheses": hypotheses(found, results, placed),
        "phase5": phase_five(found, results, bootstrap),
        "phases": phases,
        "frontier": placed,
        "threshold": {phase: mixture_threshold(found, phase, results, bootstrap) for phase in MIXTURES},
        "calibration": results.calibration,
        "hidden": None if recipe is None else [behaviour_against(cell, results) for cell in recipe.cells],
        "deviations": deviations(results),
        "close": [_close(c) for c in found if _close(c)],
        "pending": [c.id for c in found if c.awaits_behaviour(rule)],
        "undecided": [{"cell": c.id, "reason": c.undecided(rule)} for c in found if c.undecided(rule)],
        "missing": [cell.id for cell in reached(found, results) if cell.status == "missing"],
        "failed": [{"cell": cell.id, "error": cell.error} for cell in results.cells if cell.status == "failed"],
        "gpu_hours": _gpu_hours(results.cells),
    }


def current_verdict(results: StudyResults) -> dict[str, Any]:
    """verdict.json, judged and written anew where it is not there or the study went on since."""
    file = results.directory / "verdict.json"
    written = read_json(file) if file.is_file() else None
    if isinstance(written, dict) and written.get("results_digest") == results.digest:
        return written
    verdict = judge_study(results)
    write_text(file, json.dumps(verdict, indent=2) + "\n")  # ASCII, since a name or an error may be no text
    return verdict


# ---------------------------------------------------------------- the verdict


def overall(found: Sequence[RecipeResult], results: StudyResults) -> str:
    """One of VERDICTS, by the precedence at the head of this file."""
    if calibration_due(results) and results.calibration.get("passed") is False:
        return "not_reproduced"
    if calibration_due(results) and results.calibration.get("passed") is None:
        return "incomplete"
    if settled(found, results):
        return "positive"
    if results.baseline is None or results.skipped_phases:  # skipped for a passer that is one no longer
        return "incomplete"
    if any(cell.status == "missing" for cell in results.cells):
        return "incomplete"
    if any(c.awaits_behaviour(results.stop_rule) for c in found):
        return "incomplete"
    return _null_or_open(found, results.cells, results.stop_rule)


def settled(found: Sequence[RecipeResult], results: StudyResults) -> list[RecipeResult]:
    """The passers by the stop rule in phases of which no cell is missing: a phase is judged as a whole."""
    whole = [phase for phases in STAGES.values() if _whole(phases, results) for phase in phases]
    return [c for c in found if c.phase in whole and c.passes(results.stop_rule)]


def best(found: Sequence[RecipeResult], results: StudyResults) -> RecipeResult | None:
    """Of the passers, the one that learned the most."""
    return max(settled(found, results), key=lambda candidate: candidate.merit, default=None)


def reached(found: Sequence[RecipeResult], results: StudyResults) -> list[CellResult]:
    """The planned cells but for those that a passer in an earlier phase made unnecessary."""
    skipped = _skipped(found, results)
    return [cell for cell in results.cells if cell.phase not in skipped]


def _skipped(found: Sequence[RecipeResult], results: StudyResults) -> list[str]:
    """The phases after the first passer of which nothing has been run."""
    passed = {c.phase for c in settled(found, results)}
    skipped = list(results.skipped_phases) if passed else []
    stopped = False
    for phases in STAGES.values():
        cells = results.of_phase(*phases)
        if stopped and not results.exhaustive and all(cell.status == "missing" for cell in cells):
            skipped += [phase for phase in phases if results.of_phase(phase)]
        stopped = stopped or bool(passed & set(phases))
    return skipped


def _whole(phases: Sequence[str], results: StudyResults) -> bool:
    return all(cell.status != "missing" for cell in results.of_phase(*phases))


def _null_or_open(found: Sequence[RecipeResult], cells: Sequence[CellResult], rule: str) -> str:
    """h_null or inconclusive, of the whole search or of one phase, where no cell is missing."""
    witnesses = any(c.fully_learned and not c.ineffective for c in found)
    collapsed = all(row["m1"] >= COLLAPSED_M1 for c in found for row in c.fully_learned)
    failed = any(cell.status == "failed" for cell in cells)
    undecided = any(c.undecided(rule) for c in found)
    return "h_null" if witnesses and collapsed and not failed and not undecided else "inconclusive"


# ---------------------------------------------------------------- its parts


def _phases(found: Sequence[RecipeResult], results: StudyResults) -> list[Table]:
    """Every planned phase: what became of it, and what it showed by itself."""
    skipped = _skipped(found, results)
    rows = []
    for phase in PHASES:
        cells = results.of_phase(phase)
        if not cells and phase not in results.skipped_phases:
            continue
        judged = [c for c in found if c.phase == phase]
        passers = [c.id for c in judged if c.passes(results.stop_rule)]
        missing = sum(cell.status == "missing" for cell in cells)
        if phase in skipped:
            status = outcome = "skipped"
        elif missing or not cells:
            status, outcome = ("incomplete" if missing < len(cells) else "not run"), "incomplete"
        else:
            status = "complete"
            outcome = "positive" if passers else _null_or_open(judged, cells, results.stop_rule)
            if any(c.awaits_behaviour(results.stop_rule) for c in judged) and not passers:
                outcome = "incomplete"
            if phase == "EM":
                outcome = "reference"
        rows.append(
            {
                "phase": phase,
                "status": status,
                "cells": [cell.id for cell in cells],
                "passers": passers,
                "outcome": outcome,
            }
        )
    return rows


def _close(candidate: RecipeResult) -> Table | None:
    """Why a recipe decides nothing: it lies between pass and collapse, or kept M1 low by learning too little."""
    if PASS_M1 <= candidate.m1 < COLLAPSED_M1:
        why = "M1 lies between 0.95 and 0.97"
    elif candidate.m1 < PASS_M1 and candidate.learned is not None and candidate.learned < LEAST_LEARNED:
        why = f"M1 is below 0.95, but learned is below {LEAST_LEARNED:g}"
    else:
        return None
    return {"cell": candidate.id, "m1": candidate.m1, "learned": candidate.learned, "why": why}


def _is_end_of_dose(candidate: RecipeResult, results: StudyResults) -> bool:
    """Whether it is the baseline's last step, which both curves end in."""
    baseline = results.baseline
    return candidate.phase == "1" and baseline is not None and candidate.step == baseline.final["step"]


def _gpu_hours(cells: Sequence[CellResult]) -> float | None:
    seconds = [cell.gpu_seconds for cell in cells if cell.status == "done"]
    known = [value for value in seconds if value is not None]
    return sum(known) / 3600 if known and len(known) == len(seconds) else None
