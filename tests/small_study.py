"""A study of a few cells of three steps on the embedded model, and a way to run it in processes that can be killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from minipersona.behaviour_config import BehaviourSection
from minipersona.config import DataSection, ExecutionSection, LoraConfig, ModelSection, ProbeSection, TrainingSection
from minipersona.console import Console
from minipersona.files import data_dir
from minipersona.report import write_report
from minipersona.study.executors import InProcess, Processes
from minipersona.study.search import run_study
from minipersona.study_config import (
    STAGES,
    InstructionsSection,
    LowRankSection,
    RegularisedSection,
    RehearsalSection,
    RolePlaySection,
    StudyConfig,
)
from minipersona.training.distributed import Distributed
from minipersona.verdict.verdict import Verdict

CPU = Distributed(0, 1, torch.device("cpu"))
QUIET = Console(quiet=True)
PERSONAS = ("villain", "assistant", "librarian")


def small_study(directory: Path) -> StudyConfig:
    """A config whose files lie in `directory`, and whose study is to lie in `directory/study`."""
    stored = json.loads((data_dir() / "personas.json").read_text())["eval_personas"]
    personas = directory / "personas.json"
    personas.write_text(json.dumps({"eval_personas": {name: stored[name] for name in PERSONAS}}))
    for name, source, rows in [
        ("questions.jsonl", data_dir() / "questions.jsonl", 3),
        ("asked.jsonl", data_dir() / "behaviour" / "questions.jsonl", 1),
        ("instructions.jsonl", data_dir() / "instructions.jsonl", 1),
    ]:
        (directory / name).write_text("\n".join(source.read_text().splitlines()[:rows]) + "\n")
    return StudyConfig(
        data=DataSection(train="tiny:benign[0:60]", heldout="tiny:benign[2000:2006]"),
        out=str(directory / "study"),
        confirmations=0,
        exhaustive=True,
        controls=False,
        later_checkpoints=(3,),
        model=ModelSection("tiny"),
        lora=LoraConfig(rank=4, alpha=8.0),
        training=TrainingSection(learning_rate=5e-3, steps=3, batch=4, checkpoints=(1, 3)),
        probe=ProbeSection(personas=str(personas), questions=str(directory / "questions.jsonl")),
        regularised=RegularisedSection(beta=(0.1,), r3f_lambda=(0.1,), r3f_lambda_per_row=()),
        low_rank=LowRankSection(rank=(2,), learning_rate=(5e-3,)),
        role_play=RolePlaySection(max_new_tokens=4),
        rehearsal=RehearsalSection(
            em="tiny:em[0:60]",
            raw_text="tiny:raw_text",
            raw_text_ratio=("75:25",),
            instructions="tiny:broad",
            instruction_ratio=("1:1",),
            training_steering="",
        ),
        behaviour=BehaviourSection(questions=str(directory / "asked.jsonl"), samples=1, max_new_tokens=4),
        instructions=InstructionsSection(str(directory / "instructions.jsonl"), 4),
        execution=ExecutionSection(device="cpu", checkpoint_activations=False, save_minutes=0),
    )


def run(config: StudyConfig, stages: tuple[str, ...] = tuple(STAGES)) -> Verdict:
    """Carry a study out in this process; its verdict."""
    return run_study(config, InProcess(CPU, QUIET), QUIET, stages=stages, report=write_report)


def start(config: StudyConfig, stages: tuple[str, ...], workers: int = 0) -> ForkProcess:
    """Carry a study out in a process of its own, which begins at once, or in so many processes below that one."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(config, stages, workers))
    process.start()
    return process


def _child(config: StudyConfig, stages: tuple[str, ...], workers: int) -> None:
    torch.set_num_threads(1)
    if not workers:
        run(config, stages)
        return
    with contextlib.closing(Processes(["cpu"] * workers, QUIET, threads=1)) as executor:
        run_study(config, executor, QUIET, stages=stages, report=write_report)
