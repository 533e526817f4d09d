"""The persona set and the question set that are measured, read from files.

personas   .json: {"eval_personas": {name: system prompt}, "eval_persona_order": [names]}; the order may be left out
questions  .jsonl: one {"question": ...} a line; .json: a list of texts or of such objects; any other name: a text file
           with one question a line

``shipped`` and ``registered`` are names; everything else is the path of a file. The registered sets are not ours to
ship: they are fetched, pinned and verified to the bit, and a file of the user's with the same bytes is the registered
set too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipersona.config import SHIPPED
from minipersona.errors import UserError, require
from minipersona.files import data_dir, read_json, read_jsonl, sha256, user_path
from minipersona.hub import PinnedFile, fetch_pinned
from minipersona.text_rows import read_lines

REGISTERED = "registered"  # the sets of the pre-registered protocol
REGISTERED_PERSONAS = PinnedFile(
    "superkaiba/explore-persona-space",
    "3f71ce1eaaa410d9f09ac9245e91132729f155b8",
    "data/issue_205/personas.json",
    "00f81dc64d0123ad8a878d821f4dbe8db1376463318a06dd1bf92a2420845387",
)
REGISTERED_QUESTIONS = PinnedFile(
    "safety-research/assistant-axis",
    "a98961956072224eaf244eb289d6c01700b63795",
    "data/extraction_questions.jsonl",
    "31650b9a55d6b827d29ec2ee89034c7efd454672779b3ad9d7c8c4e9ea14f69e",
)


@dataclass(frozen=True)
class PersonaSet:
    """System prompts by persona name, in the order of the set."""

    name: str  # shipped, registered, or the path of the file
    prompts: dict[str, str]
    digest: str


@dataclass(frozen=True)
class QuestionSet:
    """The questions that every persona is asked."""

    name: str  # as a PersonaSet's
    questions: list[str]
    digest: str


def load_personas(source: str = SHIPPED, at_least: int = 2) -> PersonaSet:
    """The shipped personas, the registered ones, or a file in the same form. UserErrors name the file and the entry.

    at_least  how many there must be; similarities need two
    """
    path = _file(source, "personas.json", REGISTERED_PERSONAS)
    raw = read_json(path)
    prompts = raw.get("eval_personas") if isinstance(raw, dict) else None
    if not isinstance(prompts, dict):
        raise UserError(f'{path}: has no "eval_personas"; write {{"eval_personas": {{"name": "system prompt"}}}}')
    order = raw.get("eval_persona_order", list(prompts))
    if not isinstance(order, list) or not all(isinstance(p, str) for p in order) or sorted(order) != sorted(prompts):
        raise UserError(f"{path}: eval_persona_order does not list every persona of eval_personas once")
    for persona in order:
        if not isinstance(prompts[persona], str) or not prompts[persona].strip():
            raise UserError(f"{path}: persona {persona!r} has no system prompt; write it as a string")
        _encodable(f"{path}: persona {persona!r}", persona + prompts[persona])
    if len(set(prompts.values())) < len(prompts):
        raise UserError(f"{path}: two personas have the same system prompt; they could not differ")
    if len(order) < at_least:
        raise UserError(f"{path}: has {len(order)} personas; name at least {at_least}")
    digest = sha256(path)
    name = REGISTERED if digest == REGISTERED_PERSONAS.sha256 else source
    return PersonaSet(name, {persona: prompts[persona] for persona in order}, digest)


def load_questions(source: str = SHIPPED) -> QuestionSet:
    """The shipped questions, the registered ones, or a file of one's own. UserErrors name the file and the row."""
    path = _file(source, "questions.jsonl", REGISTERED_QUESTIONS)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the questions")
    questions = []
    for number, entry in enumerate(_entries(path), 1):
        question = entry.get("question") if isinstance(entry, dict) else entry
        if not isinstance(question, str) or not question.strip():
            raise UserError(f'{path}: row {number} has no question; write {{"question": "..."}}')
        _encodable(f"{path}: row {number}", question)
        questions.append(question)
    if len(questions) < 2:
        count = "one question" if questions else "no questions"
        raise UserError(f"{path}: has {count}; intervals need two at least")
    digest = sha256(path)
    return QuestionSet(REGISTERED if digest == REGISTERED_QUESTIONS.sha256 else source, questions, digest)


def _entries(path: Path) -> list[Any]:
    """The questions of a file as it has them: objects or texts."""
    if path.suffix == ".jsonl":
        return read_jsonl(path, torn=False)
    if path.suffix == ".json":
        entries = read_json(path)
        require(isinstance(entries, list), f"{path}: is not a JSON list; write a list of questions")
        return list(entries)
    try:
        with open(path, "rb") as file:
            lines = [line.strip() for _, line in read_lines(file, str(path))]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable text file") from None
    json_like = bool(lines) and lines[0].startswith(("{", "["))
    require(not json_like, f"{path}: begins like JSON; name it .jsonl (an object a line) or .json (a list)")
    return lines


def _encodable(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: has half of a surrogate pair, which is not text; correct the file") from None


def _file(source: str, shipped: str, registered: PinnedFile) -> Path:
    if source == REGISTERED:
        return fetch_pinned(registered)
    return data_dir() / shipped if source == SHIPPED else user_path(source)
