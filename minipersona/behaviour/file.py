"""The file judge: people or programs of one's own give the scores. Prompts go out as JSONL, and scores come in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from minipersona.behaviour.answers import ANSWERS
from minipersona.behaviour.judge import MEASURES, Case, Score, prompts_digest
from minipersona.behaviour.scores import introduce, keep_score, stored_scores
from minipersona.console import Console, command_line
from minipersona.errors import UserError
from minipersona.files import read_jsonl, write_text

TO_SCORE = "to_score.jsonl"


class FileJudge:
    """Whoever answers the prompts in to_score.jsonl; `name` says who."""

    def __init__(self, name: str, directory: Path, console: Console | None = None) -> None:
        self.name, self.directory = name, directory
        self.console = console or Console(quiet=True)

    @property
    def identity(self) -> dict[str, str | None]:
        """The name that the user gave."""
        return {"kind": "file", "model": self.name, "prompts": prompts_digest()}

    def score(self, cases: Sequence[Case], done: Callable[[int, Score], None]) -> None:
        """Write down what is to be scored, and leave it at that."""
        path = self.directory / TO_SCORE
        lines = (json.dumps({"key": case.key, "measure": case.measure, "prompt": case.prompt}) for case in cases)
        write_text(path, "".join(f"{line}\n" for line in lines))
        score = command_line("minipersona.behaviour", "score", self.directory.parent, "--scores", "FILE")
        self.console.say(
            f"{path}: {len(cases):,} prompts await a score; answer them with lines of key, measure and score, then "
            f"`{score}`, and run this again"
        )


def import_scores(directory: Path, source: Path, name: str) -> int:
    """Add the scores of a JSONL file, {"key", "measure", "score"} a line; returns how many were new.

    UserError names the line that is amiss; then nothing is added.
    """
    known = {row["key"] for row in read_jsonl(directory / ANSWERS)}
    if not known:
        raise UserError(f"{directory}: holds no answers; run evaluate.py --suite behaviour first")
    if not source.is_file():
        raise UserError(f"{source}: no such file; name the JSONL file of scores")
    judge = FileJudge(name, directory)
    new: list[tuple[str, str, Score]] = []
    for number, row in enumerate(read_jsonl(source, torn=False), 1):
        new.append(_score(row, known, f"{source}: row {number}"))
    introduce(directory, judge)
    before = stored_scores(directory, judge)
    changed = {(key, measure): score for key, measure, score in new if before.get((key, measure)) != score}
    for (key, measure), score in changed.items():
        keep_score(directory, judge, key, measure, score)
    return len(changed)


def _score(row: Any, known: set[str], where: str) -> tuple[str, str, Score]:
    if not isinstance(row, dict) or not {"key", "measure", "score"} <= row.keys():
        raise UserError(f'{where}: write {{"key": ..., "measure": ..., "score": ...}}')
    if not isinstance(row["key"], str) or row["key"] not in known:
        raise UserError(f"{where}: no answer has the key {brief(row['key'])}; copy it from {TO_SCORE}")
    if row["measure"] not in MEASURES:
        raise UserError(f"{where}: measure is {brief(row['measure'])}; use {' or '.join(MEASURES)}")
    value = row["score"]
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100):
        raise UserError(f"{where}: score is {brief(value)}; give a number from 0 to 100, or null for none")
    return row["key"], row["measure"], Score(None if value is None else float(value), None)
