"""What the records of a study's files refuse, and what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipersona.errors import UserError
from minipersona.verdict.files import ModelOnSet, PlanEntry, SetTransfer, matched_file, same_hash


@pytest.mark.parametrize("layer, known", [("0", True), ("20", True), ("123456789", True), ("1234567890", False),
                                          ("", False), ("-1", False), ("2.0", False), ("last", False)])  # fmt: skip
def test_a_layer_is_named_by_its_number(layer: str, known: bool) -> None:
    if known:
        assert ModelOnSet({layer: 0.9}, 1.0, 1.0).m1 == {layer: 0.9}
    else:
        with pytest.raises(UserError, match="is not the number of a layer"):
            ModelOnSet({"3": 0.9, layer: 0.9}, 1.0, 1.0)


def test_three_models_on_a_set_are_measured_at_the_same_layers() -> None:
    base, baseline, recipe = (ModelOnSet({"3": m1, "5": m1 - 0.2}, 1.0, 1.0) for m1 in (0.90, 0.98, 0.94))
    transfer = SetTransfer("shipped", "p", "shipped", "q", base, baseline, recipe)
    assert transfer.separation("3") == pytest.approx(0.6) and transfer.separation("5") == pytest.approx(0.26 / 0.3)
    less = ModelOnSet({"3": 0.9}, 1.0, 1.0)
    for models in ((less, baseline, recipe), (base, less, recipe), (base, baseline, less)):
        with pytest.raises(UserError, match="at the same layers"):
            SetTransfer("shipped", "p", "shipped", "q", *models)


def test_hashes_agree_as_far_as_both_go() -> None:
    assert same_hash("0123", "0123456") and same_hash("0123456", "0123") and same_hash("01", "01")
    assert not same_hash("0123", "0124456") and not same_hash("0123456", "0124")


def test_a_planned_cell_has_a_phase_and_names_that_fit_into_a_path(tmp_path: Path) -> None:
    assert PlanEntry("2A", "n" * 199, 42, {}, "c" * 199).role == "registered"
    for phase, name, cell in (("9", "n", "c"), ("2A", "n" * 200, "c"), ("2A", "n", "c" * 200)):
        with pytest.raises(UserError, match="is not a planned cell"):
            PlanEntry(phase, name, 42, {}, cell)
    assert matched_file(tmp_path, "2A-beta-0", 25).name == "2A-beta-0-step-000025.json"
