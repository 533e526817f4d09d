"""What a study asks models: which model answers, which one judges, and when an answer is stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from small_study import CPU, QUIET, small_study

from minipersona.behaviour.local import LocalJudge
from minipersona.behaviour.weights import weights_digest
from minipersona.chat import ChatTokenizer
from minipersona.files import read_json, write_json
from minipersona.model.network import Qwen2
from minipersona.run.directory import checkpoint_directory
from minipersona.run.train import tokenizer_files
from minipersona.study import model_jobs
from minipersona.study.cell import Study, hash_cells
from minipersona.study.model_jobs import AskSuite
from minipersona.study.recipes import planned
from minipersona.study.worker import Worker
from minipersona.study_config import LowRankSection, RecipeSection
from minipersona.training.parameters import make_trainable, save_checkpoint

Method = Literal["lora", "full"]


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

    model = worker.resources.model(config)
    base = weights_digest(model)
    learned = make_trainable(model, config, CPU)
    with torch.no_grad():
        for weight in learned.values():
            weight.add_(0.1)
    trained = weights_digest(model)
    checkpoint, stop = checkpoint_directory(study.cell_directory(cell), 3), worker.resources.tokenizer(config)
    save_checkpoint(model, config, checkpoint, tokenizer_files(config.model), stop.stop_tokens, CPU)
    worker = Worker(CPU, QUIET)

    def suite(model: Qwen2, tokenizer: ChatTokenizer, directory: Path, *more: Any, base: Qwen2 | None) -> None:
        judge = LocalJudge(base or model, tokenizer).identity["weights"]
        write_json(directory / "behaviour.json", {"answered": weights_digest(model), "judged": judge})

    monkeypatch.setattr(model_jobs, "behaviour_suite", suite)
    for job, answered in ((AskSuite(study, "behaviour"), base), (AskSuite(study, "behaviour", cell), trained)):
        job.carry_out(worker)
        found = read_json(job.directory / "behaviour.json")
        assert (found["answered"], found["judged"]) == (answered, base) and job.done()
    assert trained != base  # the control
