"""The jobs of a study that ask a model something: suites of answers, and its voice. `jobs.py` has the others."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.instructions.suite import Instructions, instruction_suite
from minipersona.behaviour.questions import load_questions
from minipersona.behaviour.suite import Behaviour, behaviour_suite
from minipersona.behaviour.voice import RESPONSES, VOICE, asked, base_responses, measure_voice
from minipersona.config import RunConfig
from minipersona.files import digest
from minipersona.model.network import Qwen2
from minipersona.records import to_dict, write_record
from minipersona.study.cell import Cell
from minipersona.study.worker import Job, Title, Worker
from minipersona.verdict.files import read_optional, read_voice


class AskModel(Job):
    """What is asked of a cell's model at a step (None: its last), or of the base, where `cell` is None."""

    cell: Cell | None
    step: int | None

    @property
    @abc.abstractmethod
    def what(self) -> str:
        """What is asked for."""

    @property
    def title(self) -> Title:
        if self.cell is None:
            return Title(f"base+{self.what}-0", "1", f"{self.what} of the base")
        step = "" if self.step is None else f" step {self.step}"
        name = f"{self.what} of {self.cell.recipe.name}{step}"
        return Title(f"{self.cell.id}+{self.what}-{self.at}", self.cell.recipe.phase, name)

    @property
    def directory(self) -> Path:
        """Where the answers and what they come to are written."""
        return self.study.base if self.cell is None else self.study.cell_directory(self.cell)

    @property
    def at(self) -> int:
        """The step that is meant; 0 is the base."""
        return 0 if self.cell is None else self.step or self.cell.recipe.config.training.steps

    @property
    def owner(self) -> Cell:
        """The cell that is asked; for the base the baseline, by whose hash is told whether an answer is stale."""
        return self.cell or self.study.baseline

    @property
    def config(self) -> RunConfig:
        """The config that the model was trained by, or begins with."""
        return self.study.placed_config(self.owner)

    def model(self, worker: Worker) -> Qwen2:
        """The model that is asked."""
        if self.cell is None:
            return worker.resources.base(self.config)
        return worker.trained_model(self.config, self.directory, self.at)


@dataclass(frozen=True)
class AskSuite(AskModel):
    """A suite of answers.

    Done where it was asked of this cell at this step, the same things by the same settings. Else it is carried out
    again, but answers that are kept are not asked for again: they are those of equal weights to equal prompts.
    """

    suite: Literal["behaviour", "instructions"]
    cell: Cell | None = None
    step: int | None = None

    @property
    def what(self) -> str:
        return self.suite

    @property
    def _file(self) -> Path:
        return self.directory / f"{self.suite}.json"

    @property
    def _settings_digest(self) -> str:
        settings = to_dict(getattr(self.study.config, self.suite))
        if self.suite == "behaviour":
            asked_for = load_questions(self.study.config.behaviour.questions).digest
        else:
            asked_for = load_instructions(self.study.config.instructions.file).digest
        return digest([self.owner.hash, settings, asked_for])

    def done(self) -> bool:
        kind: type[Behaviour | Instructions] = Behaviour if self.suite == "behaviour" else Instructions
        stored = read_optional(self._file, kind)
        return stored is not None and (stored.step, stored.settings_digest) == (self.at, self._settings_digest)

    def carry_out(self, worker: Worker) -> None:
        study, config = self.study.config, self.config
        model, tokenizer = self.model(worker), worker.resources.tokenizer(config)
        found: Behaviour | Instructions
        if self.suite == "behaviour":
            # An adapter is attached to the base, and to ask for the base would detach it.
            base = None if config.training.method == "lora" else worker.resources.base(config)
            found = behaviour_suite(model, tokenizer, self.directory, study.behaviour, worker.console, base=base)
        else:
            found = instruction_suite(
                model,
                tokenizer,
                self.directory,
                study.instructions.file or None,
                worker.console,
                max_new_tokens=study.instructions.max_new_tokens,
                batch=study.behaviour.batch,
            )
        write_record(self._file, replace(found, step=self.at, settings_digest=self._settings_digest))


@dataclass(frozen=True)
class AskVoice(AskModel):
    """Writes voice.json.

    The base's responses are kept in base/voice_responses.jsonl; whoever finds some missing generates them.
    """

    cell: Cell | None = None
    step: int | None = None

    @property
    def what(self) -> str:
        return "voice"

    def done(self) -> bool:
        stored, base = read_voice(self.directory), read_voice(self.study.base)
        if stored is None or base is None or stored.responses != base.responses:
            return False  # voices are compared over the same responses
        return (stored.cell, stored.step) == (self.owner.hash, self.at)

    def carry_out(self, worker: Worker) -> None:
        config, study = self.study.baseline.recipe.config, self.study
        instruments = worker.resources.instruments(config)
        responses = base_responses(
            worker.resources.base(config),
            instruments.tokenizer,
            instruments.personas.prompts,
            asked(instruments.questions.questions),
            study.base / RESPONSES,
            worker.console,
            batch=study.config.behaviour.batch,
        )
        model = self.model(worker)
        voice = measure_voice(model, responses, worker.console, pack_tokens=instruments.pack_tokens)
        write_record(self.directory / VOICE, replace(voice, cell=self.owner.hash, step=self.at))
