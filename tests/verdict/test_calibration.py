"""The calibration gate: the predecessor's numbers pass, a layer counted one off does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic_study import PROTOCOL

from minipersona.errors import UserError
from minipersona.settings import load_config, override
from minipersona.study_config import StudyConfig
from minipersona.verdict.calibration import PREDECESSOR, calibrate, check_layers_measured

REGISTERED = replace(
    PROTOCOL,
    model="Qwen/Qwen2.5-7B-Instruct",
    revision="a09a35458c702b33eeacc393d103063234e8bc28",
    persona_set="registered",
    question_set="registered",
)
BASE = {str(layer): m1 for layer, m1 in PREDECESSOR.items()}


def test_the_calibration_passes_on_the_predecessor_s_numbers_and_fails_one_layer_off() -> None:
    assert calibrate(REGISTERED, {layer: m1 + 0.0029 for layer, m1 in BASE.items()}, "hash").passed is True
    found = calibrate(REGISTERED, {**BASE, "27": BASE["27"] - 0.0031}, "hash")
    assert found.passed is False and "at layers 27" in found.reason and found.baseline == "hash"
    assert [layer for layer, row in found.layers.items() if not row.within] == ["27"]
    # Layers counted one too high: layer 20 alone would not have noticed.
    shifted = calibrate(REGISTERED, {**BASE, "20": BASE["21"], "14": 0.945}, "hash")
    assert shifted.layers["20"].within and shifted.passed is False


@pytest.mark.parametrize("layer", BASE)
@pytest.mark.parametrize(
    "off, within", [(0.0, True), (0.0029, True), (-0.0029, True), (0.0031, False), (-0.0031, False)]
)
def test_every_layer_is_held_against_its_own_number_in_both_directions(layer: str, off: float, within: bool) -> None:
    found = calibrate(REGISTERED, {**BASE, layer: BASE[layer] + off}, "hash")
    assert (found.due, found.passed) == (True, within) and list(found.layers) == list(BASE)
    row = found.layers[layer]
    assert (row.m1, row.reference, row.within) == (BASE[layer] + off, BASE[layer], within)
    assert row.difference == pytest.approx(off, abs=1e-12)


@pytest.mark.parametrize(
    "key, value", [("model", "tiny"), ("method", "B"), ("question_set", "shipped"), ("revision", "x")]
)
def test_the_calibration_is_due_only_where_the_predecessor_measured(key: str, value: str) -> None:
    found = calibrate(replace(REGISTERED, **{key: value}), {"6": 0.9}, "hash")
    assert (found.due, found.passed, found.layers) == (False, None, {})


@pytest.mark.parametrize("setting", [None, "model.name=tiny", "probe.personas=shipped", "probe.questions=shipped"])
def test_a_study_whose_calibration_will_be_due_measures_its_layers(setting: str | None) -> None:
    config = load_config("study", StudyConfig)
    check_layers_measured(config)  # the registered one
    lacking = override(config, ["probe.layers=[7, 20, 21, 27]", *([] if setting is None else [setting])])
    if setting is None:
        with pytest.raises(UserError, match=r"probe.layers lacks 14; the calibration needs 7, 14, 20, 21, 27"):
            check_layers_measured(lacking)
    else:
        check_layers_measured(lacking)
