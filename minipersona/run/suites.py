"""The suites of evaluate.py that generate answers: behaviour and instruction following, of a model beside its base.

Below a directory: behaviour.json and instructions.json of the model, the same of its untouched base in base/, and with
each the answers that they were made of. The same command after a kill continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipersona.behaviour.hidden import BehaviourComparison, consistency
from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.instructions.suite import Instructions, instruction_suite
from minipersona.behaviour.prompt_sets import Which
from minipersona.behaviour.suite import Behaviour, behaviour_suite
from minipersona.behaviour.table import behaviour_table
from minipersona.behaviour_config import BehaviourSection
from minipersona.chat import ChatTokenizer
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.model.adapter_files import load_adapter
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.records import to_dict
from minipersona.run.directory import checkpoint_steps, read_config
from minipersona.run.resources import load_checkpoint, load_run_model, load_run_tokenizer

BASE, TRAINED = "base", "trained"


@dataclass(frozen=True)
class Suites:
    """Which suites are wanted, and how."""

    names: Sequence[str]  # of behaviour, instructions
    behaviour: BehaviourSection
    prompt_sets: Which = "all"
    instructions_file: str | None = None  # None is the shipped set


@dataclass(frozen=True)
class SuiteResults:
    """What the suites found, by model: "base" and, where there is one, "trained". A suite not asked for is None."""

    step: int | None = None  # of a run: that of the trained model
    behaviour: dict[str, Behaviour] | None = None
    consistency: BehaviourComparison | None = None  # of the trained model's behaviour with the base's
    instructions: dict[str, Instructions] | None = None

    def to_json(self) -> dict[str, Any]:
        """As evaluate.py prints it."""
        found: dict[str, Any] = {} if self.step is None else {"step": self.step}
        if self.behaviour is not None:
            found["behaviour"] = {name: to_dict(row) for name, row in self.behaviour.items()}
        if self.consistency is not None:
            found["behaviour"]["consistency"] = to_dict(self.consistency)
        if self.instructions is not None:
            found["instructions"] = {name: to_dict(row) for name, row in self.instructions.items()}
        return found


@dataclass(frozen=True)
class _Asked:
    """A model that answers: its name in the results, where its files go, and how it is made when its turn comes."""

    name: str
    directory: Path
    model: Callable[[], Qwen2]


def run_suites(directory: Path, device: torch.device, console: Console, suites: Suites) -> SuiteResults:
    """The suites for the base of a run and for its last checkpoint. UserError where it has none."""
    config, steps = read_config(directory), checkpoint_steps(directory)
    if not steps:
        raise UserError(f"{directory}: has no checkpoint yet; let train.py reach the first one")
    base, tokenizer = load_run_model(config, device), load_run_tokenizer(config.model)
    asked = [
        _Asked(BASE, directory / BASE, lambda: base),
        _Asked(TRAINED, directory, lambda: load_checkpoint(base, config, directory, steps[-1])),
    ]
    return replace(_collect(base, tokenizer, asked, console, suites), step=steps[-1])


def model_suites(
    model: Qwen2, tokenizer: ChatTokenizer, directory: Path, console: Console, suites: Suites, adapter: str = ""
) -> SuiteResults:
    """The suites for a model as it stands; with an adapter, for the model without it and with it."""

    def adapted() -> Qwen2:
        load_adapter(model, adapter)
        return model

    asked = [_Asked(BASE, directory / BASE if adapter else directory, lambda: remove_lora(model))]
    if adapter:
        asked.append(_Asked(TRAINED, directory, adapted))
    return _collect(model, tokenizer, asked, console, suites)


def _collect(
    base: Qwen2, tokenizer: ChatTokenizer, asked: Sequence[_Asked], console: Console, suites: Suites
) -> SuiteResults:
    """Ask one model after the other, the base first: an adapter may turn it into the trained one."""
    if "instructions" in suites.names:
        load_instructions(suites.instructions_file)  # UserError before the first answer, not after those of behaviour
    behaviour: dict[str, Behaviour] = {}
    instructions: dict[str, Instructions] = {}
    for one in asked:
        model = one.model()
        if "behaviour" in suites.names:
            console.say(f"behaviour of the {one.name} model")
            behaviour[one.name] = behaviour_suite(
                model, tokenizer, one.directory, suites.behaviour, console, prompt_sets=suites.prompt_sets, base=base
            )
        if "instructions" in suites.names:
            console.say(f"instruction following of the {one.name} model")
            instructions[one.name] = instruction_suite(
                model, tokenizer, one.directory, suites.instructions_file, console, batch=suites.behaviour.batch
            )
    return SuiteResults(
        behaviour=behaviour if "behaviour" in suites.names else None,
        consistency=consistency(behaviour[TRAINED], behaviour[BASE]) if TRAINED in behaviour else None,
        instructions=instructions if "instructions" in suites.names else None,
    )


def suites_table(results: SuiteResults) -> str:
    """The same for reading."""
    return "\n".join(_lines(results))


def _lines(results: SuiteResults) -> Iterator[str]:
    if results.behaviour:
        yield behaviour_table(results.behaviour)
    if results.consistency:
        words = {True: "consistent with the base", False: "NOT consistent with the base", None: "undecided"}
        yield f"{words[results.consistency.consistent]}: {results.consistency.reason}"
    if results.instructions:
        keys = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
        yield f"\n{'':<9}{'prompts':>8}" + "".join(f"{key.replace('_', ' '):>20}" for key in keys)
        for name, row in results.instructions.items():
            yield f"{name:<9}{row.prompts:>8,}" + "".join(f"{getattr(row, key):>20.1%}" for key in keys)
