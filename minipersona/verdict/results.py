"""What a study's directory holds, finished or not: every planned cell, judged against its baseline.

Any file that has not been written yet is missing. What is there and cannot be right is a UserError. The flags that a
cell's own result.json carries are not trusted: `learned` and the passes are computed again.

A cell is held against the baseline of its own seed or, where there is none, of the first seed; a confirmation only
against that of its own seed. With harmful narrow data (`narrow = "em"`) the cells of phase 5 are measured on held-out
harmful rows and held against the unmixed harmful cell. Where they were measured on the ordinary rows instead, what they
learned of the harmful ones is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from reprlib import repr as brief
from statistics import fmean

from minipersona.behaviour.instructions.suite import Instructions
from minipersona.behaviour.suite import Behaviour
from minipersona.errors import UserError
from minipersona.files import digest
from minipersona.records import to_dict
from minipersona.run.judgement import (
    ABSOLUTE,
    Bounds,
    bounds_for,
    is_registered,
    judge_result,
    judge_row,
    learned_share,
    registered_pass,
)
from minipersona.run.result import Checkpoint, MeasurementProtocol
from minipersona.settings import load_config
from minipersona.study_config import PHASES, SCALED, STAGES, StudyConfig
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.cells import CellResult, bare_name, read_cells
from minipersona.verdict.files import (
    ChosenScales,
    Frontier,
    FrontierPoint,
    MatchedScale,
    Scaling,
    matched_file,
    read_optional,
    same_hash,
    step_of,
)

BASELINE = ("1", "baseline")  # its phase and name
UNMIXED = ("EM", "unmixed")  # phase 5's baseline with harmful narrow data


@dataclass(frozen=True)
class JudgedPoint(FrontierPoint):
    """A point of the frontier, judged by the rules for which it has the numbers."""

    registered_pass: bool | None
    collapsed: bool


@dataclass(frozen=True)
class StudyResults:
    """Everything that a verdict or a report is made from.

    `base` is None while nothing has been measured, `baseline` until it is done. The cells of `skipped_phases`, which
    the ledger says were not run because an earlier phase had a passer, are not among `cells`.
    """

    directory: Path
    config: StudyConfig
    bounds: Bounds  # on M1
    base: Checkpoint | None
    baseline: CellResult | None
    cells: tuple[CellResult, ...]
    frontier: tuple[JudgedPoint, ...]
    scaling: Scaling | None  # judged
    matched: tuple[MatchedScale, ...]  # to the steps of cells, of the baselines that these are held against
    calibration: Calibration | None
    base_behaviour: Behaviour | None
    base_instructions: Instructions | None
    skipped_phases: tuple[str, ...]

    @property
    def protocol(self) -> MeasurementProtocol | None:
        """What was measured and with what; None while nothing has been measured."""
        return next((cell.result.protocol for cell in self.cells if cell.result is not None), None)

    @property
    def calibration_due(self) -> bool:
        """Whether the verdict waits for the calibration: as calibration.json says, or by what is measured."""
        if self.calibration is not None:
            return self.calibration.due
        return self.protocol is not None and is_registered(self.protocol)

    @property
    def digest(self) -> str:
        """Of everything but the vectors, wherever the directory lies: equal ones have equal verdicts."""
        values = to_dict(replace(self, cells=(), baseline=None)) | {"directory": None}
        return digest([values, *({**to_dict(cell), "directory": None} for cell in self.cells)])

    def of_phase(self, *phases: str) -> tuple[CellResult, ...]:
        """The cells of these phases, in order."""
        return tuple(cell for cell in self.cells if cell.phase in phases)

    def registered(self, *phases: str) -> tuple[CellResult, ...]:
        """Those of them that are recipes of the registered search; of all phases where none is named."""
        return tuple(cell for cell in self.cells if cell.role == "registered" and cell.phase in (phases or PHASES))

    def baseline_of(self, cell: CellResult) -> CellResult | None:
        """The finished cell that a cell is held against; None where there is none."""
        return baseline_of(cell, self.cells, self.config)

    @property
    def scaled(self) -> list[JudgedPoint]:
        """Every scaled update of a baseline that was measured: the frontier, and what matches a recipe's loss."""
        points, by_hash = list(self.frontier), {cell.hash: cell for cell in self.cells}
        for one in self.matched:
            cell = by_hash[one.cell]
            point = FrontierPoint(one.scale, one.m1, one.m1_ci95, one.eval_loss, None, 0.0)
            assert cell.result is not None
            points.append(_judged_point(point, cell.result.base, self.baseline_of(cell), self.bounds))
        return points

    @property
    def chosen_scales(self) -> dict[str, ChosenScales]:
        """The recipes of phase 6D by their ids."""
        found = self.scaling
        return {} if found is None else {f"{SCALED} one scale": found.one, f"{SCALED} a scale a block": found.per_block}

    @property
    def chosen_points(self) -> list[JudgedPoint]:
        """The same as points: scaled updates, by the mean scale over blocks."""
        rows = [(fmean(one.scales), one.measured) for one in self.chosen_scales.values()]
        points = [FrontierPoint(s, row.m1, row.m1_ci95, row.eval_loss, None, row.delta_norm) for s, row in rows]
        return [_judged_point(point, self.base, self.baseline, self.bounds) for point in points]

    def matched_to(self, cell: CellResult, row: Checkpoint) -> MatchedScale | None:
        """The scaled baseline with the loss of a cell's checkpoint, where it was measured."""
        wanted = (cell.hash, row.step)
        return next((one for one in self.matched if (one.cell, one.step) == wanted), None)


def read_study(directory: Path) -> StudyResults:
    """Read a study's directory.

    The planned cells are those of plan.json or, without one, those that are there or in the ledger. UserError where
    the directory is not a study's or holds something that cannot be right.
    """
    directory = Path(directory)
    if not (directory / "study.toml").is_file():
        raise UserError(f"{directory}: is not a study directory (no study.toml); name one that study.py made")
    config = load_config(str(directory / "study.toml"), StudyConfig)
    cells, skipped = read_cells(directory)
    _check_protocols(cells, config)
    first = _find_baseline(cells) or next((cell for cell in cells if cell.status == "done"), None)
    bounds, base = ABSOLUTE, None
    if first is not None and first.result is not None:
        bounds = bounds_for(first.result.protocol, first.result.base.m1, config.bounds)
    cells = tuple(_judged_cell(cell, cells, config, bounds) for cell in cells)
    baseline = _find_baseline(cells)
    first = baseline or next((cell for cell in cells if cell.status == "done"), None)
    if first is not None and first.result is not None:
        base = first.result.base
    wanted = next((cell.hash for cell in cells if (cell.phase, cell.name) == BASELINE), "")
    frontier = read_optional(directory / "frontier.json", Frontier)
    points = frontier.points if base and frontier and same_hash(frontier.baseline, wanted) else ()
    calibration = read_optional(directory / "calibration.json", Calibration)
    return StudyResults(
        directory=directory,
        config=config,
        bounds=bounds,
        base=base,
        baseline=baseline,
        cells=cells,
        frontier=tuple(
            _judged_point(point, base, baseline, bounds) for point in sorted(points, key=lambda point: point.scale)
        ),
        scaling=_scaling(directory, wanted, base, baseline, bounds),
        matched=tuple(_matched(directory, cells, config)),
        calibration=calibration if calibration and same_hash(calibration.baseline, wanted) else None,
        base_behaviour=read_optional(directory / "base" / "behaviour.json", Behaviour),
        base_instructions=read_optional(directory / "base" / "instructions.json", Instructions),
        skipped_phases=skipped,
    )


def _check_protocols(cells: Iterable[CellResult], config: StudyConfig) -> None:
    """M1 and losses are comparable only where they were measured in the same way; harmful cells have their own rows."""
    firsts: dict[bool, tuple[CellResult, MeasurementProtocol]] = {}  # by whether its held-out rows are the harmful ones
    for cell in cells:
        if cell.result is None:
            continue
        protocol, harmful = cell.result.protocol, is_harmful(cell, config)
        own = firsts.setdefault(harmful, (cell, protocol))
        for name in sorted(field.name for field in fields(MeasurementProtocol) if field.name != "layers"):
            first, reference = own if name.startswith("heldout") else next(iter(firsts.values()))
            mine, theirs = getattr(protocol, name), getattr(reference, name)
            if mine != theirs:
                raise UserError(
                    f"{cell.directory}: its {name} is {brief(mine)}, but {brief(theirs)} in {first.id}; delete that "
                    "directory and continue the study"
                )


# ---------------------------------------------------------------- judging


def is_harmful(cell: CellResult, config: StudyConfig) -> bool:
    """Whether a cell is trained on harmful narrow rows."""
    return config.narrow == "em" and cell.phase in STAGES["5"]


def baseline_of(cell: CellResult, cells: Iterable[CellResult], config: StudyConfig) -> CellResult | None:
    """The finished cell that a cell is held against; None where there is none."""
    phase, name = UNMIXED if is_harmful(cell, config) else BASELINE
    found = [one for one in cells if (one.phase, bare_name(one), one.status) == (phase, name, "done")]
    same = next((one for one in found if one.seed == cell.seed), None)
    if same is not None or cell.role == "confirmation":
        return same
    return next((one for one in found if one.name == name), None)


def _find_baseline(cells: Iterable[CellResult]) -> CellResult | None:
    return next((cell for cell in cells if (cell.phase, cell.name, cell.status) == (*BASELINE, "done")), None)


def _judged_cell(cell: CellResult, cells: Sequence[CellResult], config: StudyConfig, bounds: Bounds) -> CellResult:
    if cell.result is None:
        return cell
    against, unjudged = baseline_of(cell, cells, config), cell.result
    ordinary = _find_baseline(cells)
    if is_harmful(cell, config) and ordinary is not None and _same_rows(cell, ordinary):
        # The loss is of ordinary rows: the registered rule holds it against the ordinary baseline's, and learned,
        # which would be of the harmful rows, has no value.
        against = ordinary
        unjudged = replace(unjudged, base=replace(unjudged.base, eval_loss=None, persona_loss=None))
    judged = judge_result(unjudged, None if against is None else against.final, bounds)
    base = replace(judged.base, eval_loss=cell.result.base.eval_loss, persona_loss=cell.result.base.persona_loss)
    return replace(cell, result=replace(judged, base=base))


def _same_rows(one: CellResult, other: CellResult) -> bool:
    assert one.result is not None and other.result is not None
    return one.result.protocol.heldout_digest == other.result.protocol.heldout_digest


def _judged_point(
    point: FrontierPoint, base: Checkpoint | None, baseline: CellResult | None, bounds: Bounds
) -> JudgedPoint:
    lowest = None if baseline is None else baseline.final.eval_loss
    return JudgedPoint(
        scale=point.scale,
        m1=point.m1,
        m1_ci95=point.m1_ci95,
        eval_loss=point.eval_loss,
        learned=learned_share(point.eval_loss, None if base is None else base.eval_loss, lowest),
        delta_norm=point.delta_norm,
        registered_pass=registered_pass(point.m1, point.eval_loss, lowest),
        collapsed=point.m1 >= bounds.collapsed,
    )


def _scaling(
    directory: Path, wanted: str, base: Checkpoint | None, baseline: CellResult | None, bounds: Bounds
) -> Scaling | None:
    """The record where it is of the baseline, which has the hash `wanted`, with its models judged."""
    found = read_optional(directory / "scaling.json", Scaling)
    if found is None or base is None or baseline is None or not same_hash(found.baseline, wanted):
        return None

    def judged(one: ChosenScales) -> ChosenScales:
        return replace(one, measured=judge_row(one.measured, base, baseline.final, bounds))

    return replace(found, one=judged(found.one), per_block=judged(found.per_block))


def _matched(directory: Path, cells: Sequence[CellResult], config: StudyConfig) -> Iterable[MatchedScale]:
    """The records that are of these cells and of what they are held against."""
    for cell in cells:
        against = baseline_of(cell, cells, config)
        if cell.directory is None or against is None:
            continue
        for row in cell.checkpoints:
            found = read_optional(matched_file(directory, cell.directory.name, step_of(row)), MatchedScale)
            if found is not None and same_hash(found.cell, cell.hash) and same_hash(found.baseline, against.hash):
                yield replace(found, cell=cell.hash)
