"""The suites of answers for evaluate.py: a model's behaviour and how well it follows instructions, beside its base.

Below a directory: behaviour.json and instructions.json of the model, the same of its untouched base in base/, and with
each the answers that they were made of. The same command after a kill continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipersona.behaviour.hidden import consistency
from minipersona.behaviour.instructions.suite import instruction_suite
from minipersona.behaviour.prompt_sets import Which
from minipersona.behaviour.suite import behaviour_suite
from minipersona.behaviour.table import behaviour_table
from minipersona.chat import ChatTokenizer
from minipersona.config import BehaviourSection, RunConfig
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.model.adapter_files import load_adapter
from minipersona.model.load import load_model
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.records import from_dict
from minipersona.run.evaluate import checkpoint_steps
from minipersona.run.resources import DTYPES, load_run_model, load_run_tokenizer
from minipersona.run.train import step_name
from minipersona.settings import read_toml

Result = dict[str, Any]
BASE, TRAINED = "base", "trained"


@dataclass(frozen=True)
class Suites:
    """Which suites are wanted, and how."""

    names: Sequence[str]  # of behaviour, instructions
    behaviour: BehaviourSection
    prompt_sets: Which = "all"
    instructions_file: str | None = None  # None is the shipped set


def run_suites(directory: Path, device: torch.device, console: Console, suites: Suites) -> Result:
    """The suites for the base of a run and for its last checkpoint. UserError where it has none."""
    if not (directory / "config.toml").is_file():
        raise UserError(f"{directory}: is no run's directory (config.toml); name one that train.py made")
    config = from_dict(RunConfig, read_toml(directory / "config.toml"))
    steps = checkpoint_steps(directory)
    if not steps:
        raise UserError(f"{directory}: has no checkpoint to ask yet; let train.py reach its first")
    model, tokenizer = load_run_model(config, device), load_run_tokenizer(config.model)
    checkpoint = directory / step_name(steps[-1])

    def trained() -> Qwen2:
        if config.training.method == "lora":
            load_adapter(model, checkpoint)
            return model
        return load_model(str(checkpoint), dtype=DTYPES[config.model.dtype], device=device)

    found = [(directory / BASE, BASE, lambda: model), (directory, TRAINED, trained)]
    return {"step": steps[-1], **_collect(model, tokenizer, found, console, suites)}


def model_suites(
    model: Qwen2, tokenizer: ChatTokenizer, directory: Path, console: Console, suites: Suites, adapter: str = ""
) -> Result:
    """The suites for a model as it stands; with an adapter, for the model without it and with it."""

    def adapted() -> Qwen2:
        load_adapter(model, adapter)
        return model

    found = [(directory / BASE if adapter else directory, BASE, lambda: remove_lora(model))]
    return _collect(model, tokenizer, [*found, (directory, TRAINED, adapted)] if adapter else found, console, suites)


def _collect(
    base: Qwen2, tokenizer: ChatTokenizer, found: Sequence[tuple[Path, str, Any]], console: Console, suites: Suites
) -> Result:
    """{"behaviour": {"base", "trained", "consistency"}, "instructions": {"base", "trained"}}, as far as wanted."""
    result: Result = {name: {} for name in suites.names}
    for directory, name, make in found:
        model = make()
        if "behaviour" in suites.names:
            console.say(f"behaviour of the {name} model")
            sets = suites.prompt_sets
            result["behaviour"][name] = behaviour_suite(
                model, tokenizer, directory, suites.behaviour, console, prompt_sets=sets, base=base
            )
        if "instructions" in suites.names:
            console.say(f"instructions followed by the {name} model")
            result["instructions"][name] = instruction_suite(
                model,
                tokenizer,
                directory,
                suites.instructions_file,
                console,
                batch=suites.behaviour.batch,
            )
    if TRAINED in result.get("behaviour", {}):
        result["behaviour"]["consistency"] = consistency(result["behaviour"][TRAINED], result["behaviour"][BASE])
    return result


def suites_table(result: Result) -> str:
    """The same for reading."""
    return "\n".join(_lines(result))


def _lines(result: Result) -> Iterator[str]:
    behaviour = result.get("behaviour", {})
    measured = {name: behaviour[name] for name in (BASE, TRAINED) if name in behaviour}
    if measured:
        yield behaviour_table(measured)
    if "consistency" in behaviour:
        verdict = behaviour["consistency"]
        words = {True: "consistent with the base", False: "NOT consistent with the base", None: "undecided"}
        yield f"{words[verdict['consistent']]}: {verdict['reason']}"
    if result.get("instructions"):
        keys = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
        yield f"\n{'':<9}{'prompts':>8}" + "".join(f"{key.replace('_', ' '):>20}" for key in keys)
        for name, row in result["instructions"].items():
            yield f"{name:<9}{row['prompts']:>8,}" + "".join(f"{row[key]:>20.1%}" for key in keys)
