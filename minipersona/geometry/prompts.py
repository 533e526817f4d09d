"""The persona set and the question set that are measured, read from files of one form each.

personas   {"eval_personas": {name: system prompt}, "eval_persona_order": [names]}
questions  one {"question": ..., "id": ...} a line

The registered sets are not ours to ship. ``registered`` fetches them, pinned and verified to the bit; a file of the
user's with the same bytes is the registered set too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minipersona.config import SHIPPED
from minipersona.errors import UserError
from minipersona.files import data_dir, read_json, read_jsonl, sha256
from minipersona.hub import PinnedFile, fetch_pinned

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


def load_personas(source: str = SHIPPED) -> PersonaSet:
    """The shipped personas, the registered ones, or a file in the same form. UserErrors name the file and the entry."""
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
    if len(order) < 2:
        raise UserError(f"{path}: holds {len(order)} persona; similarities need at least two")
    digest = sha256(path)
    name = REGISTERED if digest == REGISTERED_PERSONAS.sha256 else source
    return PersonaSet(name, {persona: prompts[persona] for persona in order}, digest)


def load_questions(source: str = SHIPPED) -> QuestionSet:
    """The shipped questions, the registered ones, or a file in the same form. UserErrors name the file and the line."""
    path = _file(source, "questions.jsonl", REGISTERED_QUESTIONS)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the questions")
    questions = []
    for number, row in enumerate(read_jsonl(path, torn=False), 1):
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise UserError(f'{path}: row {number} has no "question"; write {{"question": "..."}}')
        _encodable(f"{path}: row {number}", question)
        questions.append(question)
    if len(questions) < 2:
        count = "one question" if questions else "no questions"
        raise UserError(f'{path}: holds {count}; intervals need two at least, a {{"question": "..."}} a line')
    digest = sha256(path)
    return QuestionSet(REGISTERED if digest == REGISTERED_QUESTIONS.sha256 else source, questions, digest)


def _encodable(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no text; mend the file") from None


def _file(source: str, shipped: str, registered: PinnedFile) -> Path:
    if source == REGISTERED:
        return fetch_pinned(registered)
    return data_dir() / shipped if source == SHIPPED else Path(source).expanduser()
