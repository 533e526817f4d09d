"""The persona set and the question set that are measured, read from files of one form each.

personas   {"eval_personas": {name: system prompt}, "eval_persona_order": [names]}
questions  one {"question": ..., "id": ...} a line
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minipersona.config import SHIPPED
from minipersona.errors import UserError
from minipersona.files import data_dir, read_json, read_jsonl, sha256


@dataclass(frozen=True)
class PersonaSet:
    """System prompts by persona name, in the order of the set."""

    name: str
    prompts: dict[str, str]
    digest: str


@dataclass(frozen=True)
class QuestionSet:
    """The questions that every persona is asked."""

    name: str
    questions: list[str]
    digest: str


def load_personas(source: str = SHIPPED) -> PersonaSet:
    """The shipped personas, or a file in the same form. UserErrors name the file and the entry."""
    path = data_dir() / "personas.json" if source == SHIPPED else Path(source)
    raw = read_json(path)
    prompts = raw.get("eval_personas") if isinstance(raw, dict) else None
    if not isinstance(prompts, dict):
        raise UserError(f'{path}: has no "eval_personas"; write {{"eval_personas": {{"name": "system prompt"}}}}')
    order = raw.get("eval_persona_order", list(prompts))
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(prompts):
        raise UserError(f"{path}: eval_persona_order does not list every persona of eval_personas once")
    for name in order:
        if not isinstance(prompts[name], str) or not prompts[name].strip():
            raise UserError(f"{path}: persona {name!r} has no system prompt; write it as a string")
    if len(order) < 2:
        raise UserError(f"{path}: holds {len(order)} persona; similarities need at least two")
    return PersonaSet(source, {name: prompts[name] for name in order}, sha256(path))


def load_questions(source: str = SHIPPED) -> QuestionSet:
    """The shipped questions, or a JSONL file in the same form. UserErrors name the file and the line."""
    path = data_dir() / "questions.jsonl" if source == SHIPPED else Path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the questions")
    questions = []
    for number, row in enumerate(read_jsonl(path), 1):
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise UserError(f'{path}: row {number} has no "question"; write {{"question": "..."}}')
        questions.append(question)
    if not questions:
        raise UserError(f'{path}: holds no questions; write one {{"question": "..."}} a line')
    return QuestionSet(source, questions, sha256(path))
