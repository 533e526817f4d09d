"""The persona sets that a recipe is measured on: which there are, and when a measurement lacks one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_study import CPU, QUIET, small_study

from minipersona.files import data_dir, read_json
from minipersona.geometry import prompts
from minipersona.hub import PinnedFile
from minipersona.study import transfer
from minipersona.study.cell import Study, hash_cells
from minipersona.study.jobs import MeasureTransfer
from minipersona.study.recipes import planned
from minipersona.study.worker import Worker
from minipersona.study_config import TransferSection
from minipersona.verdict.files import ModelOnSet


@pytest.fixture
def study(tmp_path: Path) -> Study:
    config = small_study(tmp_path)
    return Study(config, Path(config.out), hash_cells(planned(config)))


def test_a_set_that_is_new_or_has_changed_is_measured_in_a_finished_study(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "on_set", lambda *of: ModelOnSet({"6": 0.9}, 1.0, 1.0))
    monkeypatch.setattr(Worker, "trained_model", lambda worker, config, *at: worker.resources.base(config))
    worker, more = Worker(CPU, QUIET), tmp_path / "more.json"

    def measured(study: Study) -> list[str]:
        job = MeasureTransfer(study, study.cells[1], 3)
        assert not job.done()
        job.carry_out(worker)
        assert job.done()
        return sorted(read_json(job.path)["sets"])

    assert measured(study) == ["shipped", "study"]  # the registered set cannot be fetched, which is not held against it
    named = replace(study, config=replace(study.config, transfer=TransferSection((str(more),))))
    more.write_text('{"eval_personas": {"a": "You are a.", "b": "You are b."}}')
    assert measured(named) == ["more", "shipped", "study"]
    more.write_text(more.read_text().replace("You are b", "You are c"))
    assert measured(named) == ["more", "shipped", "study"]
    assert not MeasureTransfer(named, study.cells[1], 2).done() and MeasureTransfer(study, study.cells[1], 3).done()
    there = tmp_path / "registered.json"  # and then it can be
    there.write_bytes((data_dir() / "personas.json").read_bytes() + b"\n")

    def fetched(file: PinnedFile) -> Path:
        return there if file == prompts.REGISTERED_PERSONAS else data_dir() / "questions.jsonl"

    monkeypatch.setattr(prompts, "fetch_pinned", fetched)
    assert measured(named) == ["more", "registered", "shipped", "study"]
