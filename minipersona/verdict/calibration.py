"""The calibration gate: does this tool measure on the untouched 7B what the predecessor measured?

The predecessor's code, attention and precision differ from ours; only where the base's M1 agrees are later numbers
comparable. Layers 20 and 21 differ by 0.0003, so they would not reveal a layer counted one too high; 14 and 27 do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minipersona.config import DEFAULT_MODEL
from minipersona.errors import UserError
from minipersona.geometry.prompts import REGISTERED
from minipersona.run.judgement import is_registered
from minipersona.run.result import MeasurementProtocol
from minipersona.study_config import StudyConfig
from minipersona.verdict.cells import CellResult

# M1 of Qwen2.5-7B-Instruct by Method A on the registered personas and questions, by layer.
PREDECESSOR = {
    7: 0.9874667525291443,
    14: 0.9375467300415039,
    20: 0.8995915651321411,
    21: 0.8992618322372437,
    27: 0.8052456378936768,
}
TOLERANCE = 0.003
PREDECESSOR_RECIPE = 0.973  # layer 20 after the predecessor's own recipe: rank 32 at a learning rate of 1e-4
RECIPE_TOLERANCE = 0.01


@dataclass(frozen=True)
class CalibratedLayer:
    """M1 of the base at one layer beside the predecessor's."""

    m1: float
    reference: float
    difference: float
    within: bool  # the tolerance


@dataclass(frozen=True)
class Calibration:
    """calibration.json. `passed` is None where it is not due, `baseline` the hash of the study's baseline."""

    due: bool
    passed: bool | None
    reason: str
    layers: dict[str, CalibratedLayer]
    baseline: str


def calibrate(protocol: MeasurementProtocol, m1_by_layer: dict[str, float], baseline: str) -> Calibration:
    """Compare the base's M1 at each layer with the predecessor's; `baseline` is the hash that the record carries."""
    if not is_registered(protocol):
        reason = "not due: the predecessor measured only the pinned 7B with the registered sets"
        return Calibration(False, None, reason, {}, baseline)
    layers = {}
    for layer, reference in PREDECESSOR.items():
        m1 = m1_by_layer[str(layer)]
        layers[str(layer)] = CalibratedLayer(m1, reference, m1 - reference, abs(m1 - reference) <= TOLERANCE)
    off = [layer for layer, row in layers.items() if not row.within]
    reason = (
        f"the base's M1 differs from the predecessor's by more than {TOLERANCE} at layers {', '.join(off)}"
        if off
        else f"the base's M1 is within {TOLERANCE} of the predecessor's at layers {', '.join(layers)}"
    )
    return Calibration(True, not off, reason, layers, baseline)


def reproduced_recipe(cells: Iterable[CellResult]) -> CalibratedLayer | None:
    """M1 after the predecessor's own recipe, a reference of phase 3, beside the predecessor's.

    None where it is not done, or another model or set is measured.
    """
    for cell in cells:
        own = (cell.role, cell.knobs.get("rank"), cell.knobs.get("learning_rate")) == ("reference", 32, 1e-4)
        if own and cell.result is not None and is_registered(cell.result.protocol):
            off = cell.final.m1 - PREDECESSOR_RECIPE
            return CalibratedLayer(cell.final.m1, PREDECESSOR_RECIPE, off, abs(off) <= RECIPE_TOLERANCE)
    return None


def check_layers_measured(study: StudyConfig) -> None:
    """UserError where the calibration will be due and a layer that it needs is not measured."""
    missing = sorted(set(PREDECESSOR) - set(study.probe.layers))
    sets = (study.probe.personas, study.probe.questions)
    if missing and study.model.name == DEFAULT_MODEL and sets == (REGISTERED, REGISTERED):
        raise UserError(f"probe.layers lacks {missing[0]}; the calibration needs {', '.join(map(str, PREDECESSOR))}")
