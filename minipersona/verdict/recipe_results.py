"""The recipes of a study: the rows of each, whether it passes, is confirmed and counts, and what is still open.

A recipe stands over all of its seeds. In phase 1 every checkpoint of the baseline is one; elsewhere a cell is judged
at its last step. A recipe passes where every seed passes, and fails where one fails; in phase 5 a pass also needs
consistency (`consistency.py`). The unmixed harmful cell is the baseline of phase 5 and not a recipe.

A pass is *confirmed* where the recipe also passes with every fresh seed, each against the baseline with that seed. What
was selected as the best of some thirty recipes is not evidence until then.

    references, controls   are compared with: they never pass, and bear no witness
    ineffective, inert     the recipe's own ingredient had no effect: neither named as a pass nor a witness for H_null
    leaks                  made from what is measured: not named as a pass. It may bear witness for H_null, since it
                           had the easier task
    confirmations          the fresh seeds of a recipe, and not recipes of their own
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from minipersona.run.judgement import LEAST_LEARNED, all_of
from minipersona.run.result import Checkpoint
from minipersona.significance import Interval
from minipersona.verdict.cells import CellResult, bare_name
from minipersona.verdict.consistency import REHEARSAL, Consistency, consistency_of
from minipersona.verdict.files import Role, step_of
from minipersona.verdict.results import UNMIXED, StudyResults

INEFFECTIVE = "ineffective"  # the label of an R3F cell whose noise is lost in the rounding of the embeddings
INERT = "inert"  # of a cell whose penalty has less than this share of the gradient of cross-entropy
LEAST_PENALTY_RATIO = 0.01
LEAKS = "leaks"  # of a cell that was made from measured personas or questions, as the registered 5C is
NOT_IGNITED = "not ignited"  # `consistency.py`
Rule = Literal["registered", "substantive"]


@dataclass(frozen=True, kw_only=True)
class RecipeSummary:
    """A recipe in verdict.json. Numbers are means over its seeds."""

    cell: str
    phase: str
    name: str
    step: int | None
    role: Role
    hashes: tuple[str, ...]
    seeds: tuple[int, ...]
    m1: float
    m1_spread: float | None  # the largest less the smallest over seeds, where there are several
    m1_ci95: Interval | None  # over questions, where there is one seed
    m1_ci95_personas: Interval | None  # over personas, likewise
    separation: float | None
    eval_loss: float | None
    learned: float | None
    learned_personas: float | None
    discriminability: float | None
    spread: float | None
    registered_pass: bool | None
    substantive_pass: bool | None
    shortfalls: tuple[str, ...]
    trade_off: bool
    confirmed: bool | None
    fresh_seeds: tuple[int, ...]  # with which it was run again
    consistent: bool | None  # None too in a phase that does not ask for it
    consistency: tuple[str, ...]  # the reason of each seed
    labels: tuple[str, ...]


@dataclass(frozen=True)
class RecipeResult:
    """One recipe with all of its seeds measured: of each its cell, its judged row and its `consistency`."""

    phase: str
    name: str
    step: int | None  # the checkpoint, in phase 1; None elsewhere: the last step
    cells: tuple[CellResult, ...]
    rows: tuple[Checkpoint, ...]
    consistency: tuple[Consistency, ...]
    confirmation: RecipeResult | None = None  # the same with fresh seeds, as far as they are done
    fresh_wanted: int = 0  # how many of them confirm it; 0: it is not to be confirmed

    @property
    def id(self) -> str:
        """``2A beta=0.01`` or ``1 baseline step 25``."""
        return f"{self.phase} {self.name}" + ("" if self.step is None else f" step {self.step}")

    @property
    def role(self) -> Role:
        """Why it was run."""
        return self.cells[0].role

    @property
    def m1(self) -> float:
        """M1, the mean over seeds."""
        return sum(row.m1 for row in self.rows) / len(self.rows)

    @property
    def learned(self) -> float | None:
        """The share of the baseline's loss reduction, the mean over seeds; None where a seed has none."""
        return self.mean("learned")

    def mean(self, name: str) -> float | None:
        """The mean over seeds of a number of the rows; None where a seed has none."""
        values = [getattr(row, name) for row in self.rows]
        return None if None in values else float(sum(values) / len(values))

    # -------------------------------------------------------- what it counts as

    @property
    def labels(self) -> tuple[str, ...]:
        """What is to be said of its cells besides numbers."""
        said = {label for cell in self.cells for label in cell.labels}
        return tuple(sorted(said | {NOT_IGNITED for answers in self.consistency if answers.not_ignited}))

    @property
    def effective(self) -> bool:
        """Whether the recipe's own ingredient had an effect with every seed."""
        return not {INEFFECTIVE, INERT} & set(self.labels)

    @property
    def may_be_named(self) -> bool:
        """Whether a pass of it counts."""
        return self.role in ("registered", "beyond") and self.effective and LEAKS not in self.labels

    @property
    def is_witness(self) -> bool:
        """Whether it shows what becomes of the geometry where a recipe other than the baseline teaches the task."""
        return self.role in ("registered", "beyond") and self.phase != "1" and self.effective and bool(self.taught_rows)

    @property
    def taught_rows(self) -> list[Checkpoint]:
        """The rows, of all seeds and fresh ones, that learned at least 0.9 of what the baseline did."""
        rows = [*self.rows, *(() if self.confirmation is None else self.confirmation.rows)]
        return [row for row in rows if row.learned is not None and row.learned >= LEAST_LEARNED]

    @property
    def teaches(self) -> bool:
        """Whether it learned at least 0.9 of what the baseline did."""
        return self.learned is not None and self.learned >= LEAST_LEARNED

    @property
    def trade_off(self) -> bool:
        """Whether it keeps M1 below the bound with every seed, and learned between 0.5 and 0.9."""
        return all(row.trade_off for row in self.rows)

    @property
    def merit(self) -> tuple[float, float]:
        """The key that ranks passers: the higher learned, then the lower M1."""
        return (-math.inf if self.learned is None else self.learned, -self.m1)

    # -------------------------------------------------------- whether it passes

    def passes_by_numbers(self, rule: Rule) -> bool | None:
        """Whether every seed passes the rule by its numbers; None where that is open."""
        return all_of(row.registered_pass if rule == "registered" else row.substantive_pass for row in self.rows)

    def passes(self, rule: Rule) -> bool | None:
        """Whether every seed passes the rule and, where its phase asks for it, is consistent; None where it is open."""
        if self.role in ("reference", "control"):
            return False
        return all_of([self.passes_by_numbers(rule), self.consistent])

    @property
    def consistent(self) -> bool | None:
        """Phase 5's additional condition, over all seeds; True where the phase does not ask for it."""
        return all_of(answers.consistent for answers in self.consistency)

    @property
    def confirmed(self) -> bool | None:
        """Whether it passes with every fresh seed; None while one is missing, failed or open, and where none is due."""
        passes = None if self.confirmation is None else self.confirmation.passes("substantive")
        fresh = 0 if self.confirmation is None else len(self.confirmation.cells)
        return passes if passes is False or 0 < self.fresh_wanted <= fresh else None

    @property
    def needs_answers(self) -> bool:
        """Whether its numbers pass in a phase that also asks for the answers of the multi-prompt evaluation."""
        numbers = (self.passes_by_numbers("registered"), self.passes_by_numbers("substantive"))
        return self.phase in REHEARSAL and self.role in ("registered", "beyond", "confirmation") and True in numbers

    def awaits_behaviour(self, rule: Rule) -> bool:
        """Whether the pass, or its confirmation, is open only for want of answers of the multi-prompt evaluation."""
        own = self._open_by_answers(rule) and any(answers.awaited for answers in self.consistency)
        return own or (self.confirmation is not None and self.confirmation.awaits_behaviour("substantive"))

    def undecided(self, rule: Rule) -> str | None:
        """Why its pass is open, though nothing is awaited: by its answers, or by a number that was not measured."""
        if self.passes(rule) is not None or self.awaits_behaviour(rule):
            return None
        if self._open_by_answers(rule):
            return next(a.reason for a in self.consistency if a.consistent is None)
        if rule == "registered":
            return "its loss or the baseline's is not known"
        return next(said for row in self.rows if row.substantive_pass is None for said in row.shortfalls)

    def _open_by_answers(self, rule: Rule) -> bool:
        return self.passes_by_numbers(rule) is True and self.passes(rule) is None

    def summary(self) -> RecipeSummary:
        """The recipe in verdict.json."""
        m1s, alone = [row.m1 for row in self.rows], len(self.rows) == 1
        asked = self.phase in REHEARSAL
        return RecipeSummary(
            cell=self.id,
            phase=self.phase,
            name=self.name,
            step=self.step,
            role=self.role,
            hashes=tuple(cell.hash for cell in self.cells),
            seeds=tuple(cell.seed for cell in self.cells),
            m1=self.m1,
            m1_spread=None if alone else max(m1s) - min(m1s),
            m1_ci95=self.rows[0].m1_ci95 if alone else None,
            m1_ci95_personas=self.rows[0].m1_ci95_personas if alone else None,
            separation=self.mean("separation"),
            eval_loss=self.mean("eval_loss"),
            learned=self.learned,
            learned_personas=self.mean("learned_personas"),
            discriminability=self.mean("discriminability"),
            spread=self.mean("spread"),
            registered_pass=self.passes("registered"),
            substantive_pass=self.passes("substantive"),
            shortfalls=tuple(dict.fromkeys(said for row in self.rows for said in row.shortfalls)),
            trade_off=self.trade_off,
            confirmed=self.confirmed,
            fresh_seeds=() if self.confirmation is None else tuple(cell.seed for cell in self.confirmation.cells),
            consistent=self.consistent if asked else None,
            consistency=tuple(answers.reason for answers in self.consistency) if asked else (),
            labels=self.labels,
        )


# ---------------------------------------------------------------- from the cells


def recipe_results(results: StudyResults) -> list[RecipeResult]:
    """Every recipe, in whatever role, all of whose seeds are done, in the order of the phases; one for each checkpoint
    of phase 1. The unmixed cell is only what others are judged against, and fresh seeds are part of what they confirm.
    """
    cells_of: dict[tuple[str, str], list[CellResult]] = {}
    fresh_of: dict[tuple[str, str], list[CellResult]] = {}
    for cell in results.cells:
        if cell.phase != UNMIXED[0]:
            group = fresh_of if cell.role == "confirmation" else cells_of
            group.setdefault((cell.phase, bare_name(cell)), []).append(cell)
    return [
        recipe
        for key, cells in cells_of.items()
        if all(cell.status == "done" for cell in cells)
        for recipe in _of_cells(*key, cells, fresh_of.get(key, []), results)
    ]


def _of_cells(
    phase: str, name: str, cells: Sequence[CellResult], fresh: Sequence[CellResult], results: StudyResults
) -> Iterable[RecipeResult]:
    own = {cell.seed for cell in cells}
    fresh = [cell for cell in fresh if cell.status == "done" and cell.seed not in own]
    wanted = results.config.confirmations
    for step in _steps(phase, cells):
        again = [cell for cell in fresh if _row(cell, step) is not None]
        confirmation = _recipe(phase, name, step, again, results) if again else None
        yield _recipe(phase, name, step, cells, results, confirmation, wanted)


def _recipe(
    phase: str,
    name: str,
    step: int | None,
    cells: Sequence[CellResult],
    results: StudyResults,
    confirmation: RecipeResult | None = None,
    wanted: int = 0,
) -> RecipeResult:
    rows = tuple(row for cell in cells if (row := _row(cell, step)) is not None)
    consistent = tuple(consistency_of(cell, row, results) for cell, row in zip(cells, rows, strict=True))
    return RecipeResult(phase, name, step, tuple(cells), rows, consistent, confirmation, wanted)


def _steps(phase: str, cells: Sequence[CellResult]) -> list[int | None]:
    """The checkpoints at which a recipe is judged: those of every seed in phase 1, else the last alone."""
    if phase != "1":
        return [None]
    return [*sorted(set.intersection(*({step_of(row) for row in cell.checkpoints} for cell in cells)))]


def _row(cell: CellResult, step: int | None) -> Checkpoint | None:
    """A cell's row at a step, None for its last; None where it was not measured there."""
    return cell.final if step is None else next((row for row in cell.checkpoints if row.step == step), None)


def mixtures_reference(results: StudyResults) -> CellResult | None:
    """The recipe with nothing mixed in: the baseline or, with EM as the narrow data, the EM cell. None until done."""
    if results.config.narrow != "em":
        return results.baseline
    return next((cell for cell in results.registered(UNMIXED[0]) if cell.status == "done"), None)
