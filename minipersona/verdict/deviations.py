"""Where a study departs from the letter of its registration, a sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from minipersona.config import DEFAULT_MODEL
from minipersona.geometry.prompts import REGISTERED
from minipersona.run.judgement import (
    COLLAPSED_M1,
    LEAST_DISCRIMINABILITY,
    LEAST_LEARNED,
    LEAST_LEARNED_PERSONAS,
    MEAN_GROWTH_SPREAD,
    PASS_M1,
)
from minipersona.settings import flatten, load_config
from minipersona.study_config import STAGES, StudyConfig
from minipersona.verdict.recipe_results import LEAKS
from minipersona.verdict.results import StudyResults

# Settings with a sentence of their own, and those that are left to whoever runs the search.
TOLD_OTHERWISE = ("out", "narrow", "stop_rule", "exhaustive", "seeds", "model.", "execution.", "probe.personas",
                  "probe.questions", "rehearsal.em", "confirmations", "recipe", "controls")  # fmt: skip


def deviations(results: StudyResults) -> list[str]:
    """One sentence each."""
    said = [*_rules(results)]
    protocol, config = results.protocol, results.config
    if protocol is not None and protocol.model != DEFAULT_MODEL:
        said.append(f"The model is {without_folders(str(protocol.model))}; {DEFAULT_MODEL} is registered.")
    if protocol is not None and {protocol.persona_set, protocol.question_set} != {REGISTERED}:
        said.append("The personas and questions are not both the registered ones.")
    seeds = sorted({cell.seed for cell in results.cells if cell.role != "confirmation"})
    if protocol is not None and seeds != [42]:
        listed = ", ".join(map(str, seeds))
        said.append(f"The seeds are {listed}; 42 is registered. A recipe passes where every seed of it passes.")
    if config.narrow == "em":
        said.append(
            "In phase 5 the narrow rows are the harmful ones: loss, learned and the bound on the loss are those on "
            "held-out harmful rows, against the unmixed cell."
        )
    if any(LEAKS in cell.labels for cell in results.cells):
        said.append(
            "The registered steering vectors (5C) are made from the measured personas and questions. Those cells are "
            "run as registered and labelled so; a pass of them is recorded and not named."
        )
    if settings := changed_settings(config):
        said.append(f"Settings that are not the registered ones (in brackets): {', '.join(settings)}.")
    planned = {cell.phase for cell in results.cells} | set(results.skipped_phases)
    registered = [stage for stage in STAGES if stage in "12345"]
    left_out = [stage for stage in registered if not planned & set(STAGES[stage])]
    if protocol is not None and left_out:
        said.append(f"Not part of this study: phase {', '.join(left_out)}.")
    return said


def _rules(results: StudyResults) -> Iterator[str]:
    """Where the rules that decide are not the registered ones."""
    config, bounds, base = results.config, results.bounds, results.base
    if bounds.relative and base is not None:
        yield (
            f"The bounds on M1 are relative to the base's {base.m1:.4f}: a pass is below {bounds.passing:.4f}, where "
            f"half of the base's separation 1 - M1 is left, and the collapse begins at {bounds.collapsed:.4f}, where "
            f"0.3 of it is left. On the registered model they are {PASS_M1:g} and {COLLAPSED_M1:g}."
        )
    if config.stop_rule == "substantive":
        hollow = ": the untrained base passes it" if base is not None and base.registered_pass else ""
        yield (
            "The search stops at a substantive pass: the 95% interval of M1 lies below the bound, M1 without any one "
            f"persona too, learned >= {LEAST_LEARNED:g}, learned under personas >= {LEAST_LEARNED_PERSONAS:g} and "
            f"discriminability >= {LEAST_DISCRIMINABILITY:g} of the base's. A pass by the registered rule alone does "
            f"not show that a recipe teaches{hollow}."
        )
        fresh = config.confirmations
        yield (
            f"A pass counts once it is confirmed: by {fresh} fresh seeds, each against a baseline with the same seed."
            if fresh
            else "Passes are not confirmed with fresh seeds, so the verdict cannot be positive."
        )
    yield (
        "Where M1 reaches the collapse bound while the between-persona variance is at least "
        f"{MEAN_GROWTH_SPREAD:g} of the base's, the row counts as mean growth and not as collapsed."
    )


def changed_settings(config: StudyConfig) -> list[str]:
    """The settings that differ from the shipped study's, as ``key = value (registered)``."""
    mine = flatten(config)
    return [
        f"{key} = {_shown(mine[key])} ({_shown(value)})"
        for key, value in flatten(load_config("study", StudyConfig)).items()
        if not key.startswith(TOLD_OTHERWISE) and _shown(mine[key]) != _shown(value)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return without_folders(value) or '""' if isinstance(value, str) else str(value)


def without_folders(name: str) -> str:
    """A source or a model without the folders that it lies in: what is published does not say whose disk it was.

    ``jsonl:/data/rows.jsonl[0:9]`` -> ``rows.jsonl[0:9]``; a hub id, ``tiny`` or ``tulu[0:6000]`` stays as it is.
    """
    return re.sub(r"^(jsonl:|parquet:)(.*/)?|^(random:)?(?=[/.~]).*/", r"\3", name)
