"""What a judge makes of the answers, kept line by line beside them.

scores.jsonl has a line a score, {"key", "measure", "judge", "score", "mass"}, and judges.jsonl says who each judge is.
The scores of several judges may lie in one file; a judge is asked only for those of its own that are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipersona.behaviour.answers import Answer, asked
from minipersona.behaviour.judge import MEASURES, Case, Judge, Score
from minipersona.console import Console
from minipersona.files import append_jsonl, digest, read_objects

SCORES = "scores.jsonl"
JUDGES = "judges.jsonl"

Scores = dict[tuple[str, str], Score]  # by the answer's key and the measure


def judge_id(judge: Judge) -> str:
    """The short name of a judge in scores.jsonl."""
    return digest(judge.identity)[:16]


def stored_scores(directory: Path, judge: Judge) -> Scores:
    """The scores that the directory has from this judge."""
    rows = [row for row in read_objects(directory / SCORES) if row.get("judge") == judge_id(judge)]
    return {(row["key"], row["measure"]): Score(row["score"], row["mass"]) for row in rows}


def keep_score(directory: Path, judge: Judge, key: str, measure: str, score: Score) -> None:
    """Append one score."""
    row: dict[str, Any] = {"key": key, "measure": measure, "judge": judge_id(judge)}
    append_jsonl(directory / SCORES, {**row, "score": score.value, "mass": score.mass}, durable=False)


def introduce(directory: Path, judge: Judge) -> None:
    """Write down who a judge is, once."""
    row = {"judge": judge_id(judge), **judge.identity}
    if row not in read_objects(directory / JUDGES):
        append_jsonl(directory / JUDGES, row, ascii=True)


def score_all(judge: Judge, answers: Sequence[Answer], directory: Path, console: Console) -> Scores:
    """The judge's scores of the answers by both measures, as far as it gives them."""
    introduce(directory, judge)
    scores = stored_scores(directory, judge)
    cases = [
        Case(answer["key"], measure, asked(answer["messages"]), answer["answer"])
        for answer in answers
        for measure in MEASURES
    ]
    missing = [case for case in cases if (case.key, case.measure) not in scores]
    finished = len(cases) - len(missing)
    with console.progress("judging", len(cases), "scores") as progress:

        def done(index: int, score: Score) -> None:
            nonlocal finished
            case = missing[index]
            keep_score(directory, judge, case.key, case.measure, score)
            scores[case.key, case.measure] = score
            finished += 1
            progress.advance(finished)

        if missing:
            judge.score(missing, done)
    return scores
