"""Where a study departs from its registration, for its verdict and report."""

from __future__ import annotations

from typing import Any

from minipersona.config import DEFAULT_MODEL
from minipersona.geometry.prompts import REGISTERED
from minipersona.run.judgement import LEAST_LEARNED
from minipersona.settings import flatten, load_config
from minipersona.study_config import STAGES, StudyConfig
from minipersona.verdict.results import StudyResults
from minipersona.verdict.summary import without_folders

# Settings with a sentence of their own, and those that are left to whoever runs the search.
TOLD_OTHERWISE = ("out", "narrow", "stop_rule", "exhaustive", "seeds", "model.", "execution.", "probe.personas",
                  "probe.questions", "rehearsal.em")  # fmt: skip


def deviations(results: StudyResults) -> list[str]:
    """One sentence each."""
    said = []
    protocol, config = results.protocol, results.config
    if config.stop_rule == "substantive":
        hollow = ": the untrained base passes it" if results.base is not None and results.base.registered_pass else ""
        said.append(
            f"The search stops at a substantive pass, which asks for learned >= {LEAST_LEARNED:g} besides the "
            f"registered rule. A pass by that rule alone does not show that a recipe teaches{hollow}."
        )
    if protocol is not None and protocol.model != DEFAULT_MODEL:
        said.append(f"The model is {without_folders(str(protocol.model))}; {DEFAULT_MODEL} is registered.")
    if protocol is not None and {protocol.persona_set, protocol.question_set} != {REGISTERED}:
        said.append("The personas and questions are not both the registered ones.")
    seeds = sorted({cell.seed for cell in results.cells})
    if protocol is not None and seeds != [42]:
        listed = ", ".join(map(str, seeds))
        said.append(f"The seeds are {listed}; 42 is registered. A recipe passes where every seed of it passes.")
    if config.narrow == "em":
        said.append(
            "In phase 5 the narrow rows are the emergent-misalignment ones, while loss and learned are those on the "
            "held-out rows, as everywhere: learned says nothing about how well the narrow rows are learned."
        )
    if settings := changed_settings(config):
        said.append(f"Settings that are not the registered ones (in brackets): {', '.join(settings)}.")
    planned = {cell.phase for cell in results.cells} | set(results.skipped_phases)
    left_out = [stage for stage, phases in STAGES.items() if not planned & set(phases)]
    if protocol is not None and left_out:
        said.append(f"Not part of this study: phase {', '.join(left_out)}.")
    return said


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
