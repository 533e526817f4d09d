"""Every figure that a study has the data for, and why the others are left out."""

from __future__ import annotations

from collections.abc import Callable

from minipersona.report.curves import m1_by_step, mixture
from minipersona.report.front import front, named_recipes
from minipersona.report.geometry import cosines, decomposition, personas, transfer, voice
from minipersona.report.series import Missing, Series
from minipersona.verdict.results import StudyResults
from minipersona.verdict.verdict import Verdict


def all_series(results: StudyResults, verdict: Verdict) -> tuple[list[Series], dict[str, str]]:
    """The series of every figure that has its data, and by name the reason of every one that does not."""
    named = named_recipes(results, verdict)
    by_verdict = verdict.recipe is not None or (verdict.beyond is not None and verdict.beyond.recipe is not None)
    builders: dict[str, Callable[[], Series]] = {
        "m1_against_learned": lambda: front(results, named),
        "m1_by_step": lambda: m1_by_step(results),
        "cosines": lambda: cosines(results, named, by_verdict),
        "decomposition": lambda: decomposition(results),
        "personas": lambda: personas(results, verdict, named),
        "transfer": lambda: transfer(results),
        "voice": lambda: voice(results),
        "mixture": lambda: mixture(results, verdict),
    }
    series, missing = [], {}
    for name, build in builders.items():
        try:
            series.append(build())
        except Missing as reason:
            missing[name] = str(reason)
    return series, missing
