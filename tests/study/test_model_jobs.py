"""What a study asks models: which model answers, which one judges, and when an answer is stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from small_study import CPU, QUIET, small_study
from synthetic_study import behaviour

from minipersona.behaviour.instructions.suite import Instructions
from minipersona.behaviour.local import LocalJudge
from minipersona.behaviour.suite import Behaviour
from minipersona.behaviour.voice import Voice
from minipersona.behaviour.weights import weights_digest
from minipersona.chat import ChatTokenizer
from minipersona.errors import UserError
from minipersona.model.network import Qwen2
from minipersona.records import from_dict, read_record, write_record
from minipersona.run.directory import checkpoint_directory
from minipersona.run.train import tokenizer_files
from minipersona.study import model_jobs
from minipersona.study.cell import Study, hash_cells
from minipersona.study.model_jobs import AskSuite, AskVoice
from minipersona.study.recipes import planned
from minipersona.study.worker import Worker
from minipersona.study_config import LowRankSection, RecipeSection
from minipersona.training.parameters import make_trainable, save_checkpoint

Method = Literal["lora", "full"]
ANSWERS = from_dict(Behaviour, behaviour(0.0))
RATES = dict.fromkeys(("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"), 0.5)
FOLLOWED = Instructions(
    prompts=1, instructions=1, by_kind={}, empty=0, cut=0, skipped=0, skipped_kinds={}, set="shipped", digest="i",
    max_new_tokens=4, **RATES, **{f"{name}_ci95": (0.1, 0.9) for name in RATES},
)  # fmt: skip


def study_of(directory: Path, baseline: Method, recipe: Method) -> Study:
    """A study whose last cell trains by the method `recipe`, and all others by the method `baseline`."""
    config = small_study(directory)
    config = replace(
        config,
        training=replace(config.training, method=baseline),
        low_rank=LowRankSection(rank=()),
        recipe=(RecipeSection("6A", "other", {"training.method": recipe, "training.weight_decay": 0.02}),),
    )
    return Study(config, Path(config.out), hash_cells(planned(config)))


@pytest.mark.parametrize("baseline", ["lora", "full"])
@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_a_cell_s_model_answers_and_the_base_judges_however_each_is_trained(
    tmp_path: Path, baseline: Method, recipe: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, baseline, recipe)
    cell, worker = study.cells[-1], Worker(CPU, QUIET)
    config = study.placed_config(cell)

    model = worker.resources.base(config)
    base = weights_digest(model)
    learned = make_trainable(model, config, CPU)
    with torch.no_grad():
        for weight in learned.values():
            weight.add_(0.1)
    trained = weights_digest(model)
    checkpoint, stop = checkpoint_directory(study.cell_directory(cell), 3), worker.resources.tokenizer(config)
    save_checkpoint(model, config, checkpoint, tokenizer_files(config.model), stop.stop_tokens, CPU)
    worker = Worker(CPU, QUIET)

    def suite(model: Qwen2, tokenizer: ChatTokenizer, directory: Path, *more: Any, base: Qwen2 | None) -> Behaviour:
        return replace(ANSWERS, weights=weights_digest(model), judge=LocalJudge(base or model, tokenizer).identity)

    monkeypatch.setattr(model_jobs, "behaviour_suite", suite)
    for job, answered in ((AskSuite(study, "behaviour"), base), (AskSuite(study, "behaviour", cell), trained)):
        job.carry_out(worker)
        found = read_record(job.directory / "behaviour.json", Behaviour, "ask again")
        assert (found.weights, found.judge["weights"]) == (answered, base) and job.done()
        assert found.step == job.at
    assert trained != base  # the control


# ---------------------------------------------------------------- when an answer is stale


VOICE = Voice(value=1.0, ci95=(0.9, 1.1), by_persona={}, by_response={}, tokens=1, responses="r")


def of_another_version(study: Study) -> Study:
    """The study after a change of the code or the data: its cells have other hashes."""
    return replace(study, cells=tuple(replace(cell, hash=cell.hash[::-1]) for cell in study.cells))


def test_the_base_s_voice_is_measured_anew_where_cells_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, "lora", "full")
    monkeypatch.setattr(model_jobs, "measure_voice", lambda *of, **by: VOICE)
    monkeypatch.setattr(model_jobs, "base_responses", lambda *of, **by: None)
    monkeypatch.setattr(Worker, "trained_model", lambda worker, config, *at: worker.resources.base(config))
    worker = Worker(CPU, QUIET)
    for job in (AskVoice(study), AskVoice(study, study.cells[1], 1)):
        write_record(job.directory / "voice.json", replace(VOICE, step=job.at))
        assert not job.done()  # a file of an older version says nothing of cells
        job.carry_out(worker)
        assert job.done()
    assert AskVoice(study).done() and not AskVoice(of_another_version(study)).done()
    assert not AskVoice(study, study.cells[1], 3).done()
    write_record(study.base / "voice.json", replace(VOICE, cell=study.baseline.hash, step=0, responses="others"))
    assert AskVoice(study).done() and not AskVoice(study, study.cells[1], 1).done()  # voices of other responses


@pytest.mark.parametrize("suite, file", [("behaviour", "asked.jsonl"), ("instructions", "instructions.jsonl")])
def test_a_suite_is_carried_out_anew_where_cells_or_questions_are_others(
    tmp_path: Path, suite: Literal["behaviour", "instructions"], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, "lora", "full")

    monkeypatch.setattr(model_jobs, "behaviour_suite", lambda *of, **by: ANSWERS)
    monkeypatch.setattr(model_jobs, "instruction_suite", lambda *of, **by: FOLLOWED)
    job = AskSuite(study, suite)
    assert not job.done()
    write_record(job.directory / f"{suite}.json", ANSWERS if suite == "behaviour" else FOLLOWED)
    assert not job.done()  # evaluate.py's file says nothing of a study
    job.carry_out(Worker(CPU, QUIET))
    assert job.done() and not AskSuite(of_another_version(study), suite).done()
    path = tmp_path / file
    asked, key = path.read_text(), '"question": "' if suite == "behaviour" else '"prompt": "'
    path.write_text(asked.replace(key, key + "Please: "))
    assert path.read_text() != asked and not job.done()
    path.write_text(asked)
    assert job.done()
    kept = job.directory / f"{suite}.json"
    kept.write_text("{}")
    with pytest.raises(UserError, match=f"is missing; delete {kept} and continue the study"):
        job.done()
