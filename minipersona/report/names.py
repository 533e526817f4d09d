"""What the report calls things, and how it writes numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minipersona.report.blocks import one_line
from minipersona.verdict.files import Knobs

Row = dict[str, Any]

PHASE_NAMES = {
    "1": "dose",
    "2A": "KL to the base",
    "2B": "R3F noise",
    "3": "low rank",
    "4A": "persona system prompts",
    "4B": "persona responses",
    "EM": "unmixed EM reference",
    "5A": "raw text mixed in",
    "5B": "instructions mixed in",
    "5C": "preventative steering",
}


def phase_title(phase: str) -> str:
    """``"2A"`` -> ``"2A  KL to the base"``."""
    return f"{phase}  {PHASE_NAMES.get(phase, '')}".rstrip()


def number(value: float | None, form: str = ".4f") -> str:
    """A number in that form, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def interval(bounds: Sequence[float] | None, form: str = ".4f") -> str:
    """``[low, high]``, or a dash."""
    return "-" if not bounds else f"[{format(bounds[0], form)}, {format(bounds[1], form)}]"


def knob_text(knobs: Knobs) -> str:
    """The knobs of a recipe, one after another."""
    pairs = ((name.replace("_", " "), value) for name, value in knobs.items())
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in pairs)


def yes_no(value: bool | None) -> str:
    """A verdict of a rule."""
    return {True: "PASS", False: "FAIL", None: "-"}[value]


def shortened(text: str, most: int = 34) -> str:
    """A label that fits into a figure."""
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1] + "…"
