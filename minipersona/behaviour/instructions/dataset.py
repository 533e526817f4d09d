"""Prompts with their instructions, read from a file in the form of IFEval's input_data.jsonl.

    {"key": 7, "prompt": "...", "instruction_id_list": ["punctuation:no_comma", ...], "kwargs": [{}, ...]}

Hugging Face's copy gives every argument of every kind, those of other kinds as null; nulls are not there. A row is
scored whole or not at all: one with an instruction that nothing here can check is left out, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from minipersona.behaviour.instructions.languages import KNOWN
from minipersona.behaviour.instructions.registry import KINDS, LANGUAGE
from minipersona.config import SHIPPED
from minipersona.errors import UserError
from minipersona.files import data_dir, read_jsonl, sha256, user_path


@dataclass(frozen=True)
class Instruction:
    """One verifiable instruction: its kind, a key of `KINDS`, and the arguments of that kind."""

    kind: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, and the instructions in it that are checked."""

    key: str
    text: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class InstructionSet:
    """The prompts that are scored. `skipped` maps what could not be checked to the rows left out because of it."""

    name: str  # shipped, or the path of the file
    digest: str
    prompts: list[Prompt]
    skipped: dict[str, int]
    skipped_rows: int

    def left_out(self) -> str:
        """What to say of the rows that are not scored, empty where all are."""
        rows = self.skipped_rows + len(self.prompts)
        return f"{self.skipped_rows:,} of {rows:,} rows are left out: {_listed(self.skipped)}" if self.skipped else ""


def load_instructions(source: str | None = None) -> InstructionSet:
    """The shipped set (None, "" or its name), or a file in IFEval's form. UserErrors name the file and the row."""
    source = source or SHIPPED
    path = data_dir() / "instructions.jsonl" if source == SHIPPED else user_path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the instructions")
    prompts: list[Prompt] = []
    skipped: Counter[str] = Counter()
    skipped_rows = 0
    keys: set[str] = set()
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}: row {number}"
        prompt, unknown = _read_row(where, row)
        if prompt.key in keys:
            raise UserError(f"{where}: key {prompt.key} is there twice; give every row a key of its own")
        keys.add(prompt.key)
        if unknown:
            skipped.update(unknown)
            skipped_rows += 1
        else:
            prompts.append(prompt)
    if not prompts:
        reason = f"; unknown are {_listed(skipped)}" if skipped else ""
        raise UserError(
            f"{path}: holds no row that can be checked{reason}; write one in the form of IFEval's input_data.jsonl"
        )
    return InstructionSet(source, sha256(path), prompts, dict(skipped), skipped_rows)


def _listed(skipped: Mapping[str, int], most: int = 10) -> str:
    """What cannot be checked, each with its rows; what stands for most rows first."""
    first = sorted(skipped.items(), key=lambda item: -item[1])
    named = ", ".join(f"{kind[:80]!r} (rows: {rows:,})" for kind, rows in first[:most])
    return named + (f" and {len(first) - most:,} more" if len(first) > most else "")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path, torn=False)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as JSON lines in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable file of JSON lines") from None


def _read_row(where: str, row: Any) -> tuple[Prompt, set[str]]:
    """A row, and what in it cannot be checked."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write it in the form of IFEval's input_data.jsonl")
    key, text = row.get("key"), row.get("prompt")
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise UserError(f'{where} has no "key"; give it a number or a name')
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where} has no "prompt"; write what the model is asked')
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is not text; mend the row") from None
    kinds, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f'{where} has no "instruction_id_list"; list the kinds of its instructions')
    if not isinstance(arguments, list) or len(arguments) != len(kinds):
        raise UserError(f'{where}: "kwargs" must be a list of {len(kinds)}, one object for each instruction')
    instructions, unknown = [], set()
    for kind, given in zip(kinds, arguments, strict=True):
        if kind not in KINDS:
            unknown.add(kind)
            continue
        instruction = Instruction(kind, _read_arguments(f"{where}: {kind}", kind, given))
        instructions.append(instruction)
        if kind == LANGUAGE and instruction.arguments["language"] not in KNOWN:
            unknown.add(f"{LANGUAGE} ({instruction.arguments['language']})")
    return Prompt(str(key), text, tuple(instructions)), unknown


def _read_arguments(where: str, kind: str, given: Any) -> dict[str, Any]:
    """The arguments that are not null, if they are those that the kind takes."""
    if not isinstance(given, dict):
        raise UserError(f'{where}: its entry in "kwargs" is not an object; write {{}} where there are no arguments')
    present = {name: value for name, value in given.items() if value is not None}
    taken = KINDS[kind].arguments
    for name in present.keys() - taken.keys():
        wants = f"it takes {', '.join(taken)}" if taken else "it takes none"
        raise UserError(f"{where} has no argument {brief(name)}; {wants}")
    for name, argument in taken.items():
        if not argument.holds(present.get(name)):
            raise UserError(f"{where}: {name} is {brief(present.get(name))}; it must be {argument.rule}")
    return present
