"""H1: is the collapse monotone in training steps, is M1 still below its bound at step 25, and where does it saturate?

It saturates at the first checkpoint from which on every M1's interval overlaps that of the last step.
"""

from __future__ import annotations

from collections.abc import Sequence

from minipersona.run.result import Checkpoint
from minipersona.verdict.files import step_of
from minipersona.verdict.findings import Answer, DoseNumbers, Finding
from minipersona.verdict.results import StudyResults

EARLY = 25 / 375  # of the steps: the registered step 25, on any schedule


def dose(results: StudyResults) -> Finding:
    """The verdict on H1."""
    bound = results.bounds.passing
    claim = (
        f"Collapse is monotone in training steps, and M1 is still below {bound:.4g} at step 25 of 375 (the same share "
        "of another schedule)."
    )
    if results.baseline is None:
        return Finding(claim, "not tested", "The baseline is not done.", "None yet.")
    rows = results.baseline.curve
    early = [row for row in rows[1:] if step_of(row) <= EARLY * step_of(rows[-1])]
    rises = rows[-1].m1_ci95[0] > rows[0].m1_ci95[1]
    falls = [
        (step_of(before), step_of(after))
        for number, before in enumerate(rows)
        for after in rows[number + 1 :]
        if after.m1_ci95[1] < before.m1_ci95[0]
    ]
    saturated = saturation(rows) if rises else None
    evidence = f"M1 is {', '.join(f'{row.m1:.4f} at step {row.step}' for row in rows)}."
    if falls:
        evidence += f" From step {falls[0][0]} to step {falls[0][1]} it falls by more than the 95% intervals."
    elif rises:
        evidence += " No later interval lies below an earlier one."
    if saturated is not None:
        evidence += f" From step {saturated} on it cannot be told from its last value."
    numbers = DoseNumbers(
        steps=tuple(map(step_of, rows)),
        m1=tuple(row.m1 for row in rows),
        learned=tuple(row.learned for row in rows),
        falls=tuple(falls),
        early_steps=tuple(map(step_of, early)),
        saturated_at=saturated,
    )
    verdict, implication = _verdict(rises, bool(falls), early, bound)
    return Finding(claim, verdict, evidence, implication, numbers)


def saturation(rows: Sequence[Checkpoint]) -> int:
    """The first step from which on every interval overlaps the last one's."""
    low, high = rows[-1].m1_ci95
    first = rows[-1]
    for row in reversed(rows):
        if row.m1_ci95[1] < low or row.m1_ci95[0] > high:
            break
        first = row
    return step_of(first)


def _verdict(rises: bool, falls: bool, early: Sequence[Checkpoint], bound: float) -> tuple[Answer, str]:
    """The verdict and what it implies."""
    if not rises:
        return "refuted", "Ordinary fine-tuning did not raise M1 here, so there is no collapse to avoid."
    if falls:
        return "refuted", "More training does not always mean more collapse: choose a checkpoint by measuring it."
    if any(row.m1 >= bound for row in early):
        return "refuted", "The personas are lost within the first steps, so stopping early does not save them."
    if not early:
        return "undecided", "Measure a checkpoint within the first fifteenth of the schedule."
    last = early[-1]
    share = "an undefined share" if last.learned is None else f"{last.learned:.2f}"
    return "supported", f"Stopping early limits the collapse, but at step {last.step} learned is {share}."
