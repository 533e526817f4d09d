"""The behaviour suite: ask every prompt of every set, have the answers judged, and write the rates.

In the suite's directory: `behaviour.json`, the rates of each set; and below `behaviour/` every answer, score and judge,
line by line (answers.jsonl, scores.jsonl, judges.jsonl). The same command after a kill continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minipersona.behaviour.answers import ANSWERS, Answer, answer_all, asked, key_of, stored
from minipersona.behaviour.emergent import MisalignmentRates, by_set
from minipersona.behaviour.endpoint import EndpointJudge
from minipersona.behaviour.file import FileJudge
from minipersona.behaviour.judge import MEASURES, Case, Judge
from minipersona.behaviour.local import LocalJudge
from minipersona.behaviour.prompt_sets import Which, prompts
from minipersona.behaviour.questions import load_questions
from minipersona.behaviour.scores import score_all
from minipersona.behaviour_config import BehaviourSection
from minipersona.chat import ChatTokenizer
from minipersona.console import Console
from minipersona.errors import UserError, require
from minipersona.geometry.extraction import check_vocabulary
from minipersona.locks import lock
from minipersona.model.network import Qwen2
from minipersona.records import may_be_missing, read_record, write_record

FOLDER = "behaviour"
RESULT = "behaviour.json"
ASK_AGAIN = "run evaluate.py --suite behaviour again"


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """behaviour.json of a model. `step` and `settings_digest` are a study's own.

    The digest is of the settings, of what is asked, and of the cell's hash or, of the base, the baseline's.
    """

    sets: dict[str, MisalignmentRates]
    judge: dict[str, str | None]
    weights: str
    prompt_sets: Which
    questions: str
    questions_digest: str
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    cut: int
    empty: int
    step: int | None = may_be_missing()
    settings_digest: str | None = may_be_missing()

    def __post_init__(self) -> None:
        for name, row in self.sets.items():
            counts = [0, row.misaligned, row.coherent, row.scored, row.answers]
            require(
                counts == sorted(counts), f"sets.{name[:80]}: must have misaligned <= coherent <= scored <= answers"
            )


def behaviour_suite(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    directory: Path,
    section: BehaviourSection,
    console: Console,
    *,
    prompt_sets: Which = "all",
    base: Qwen2 | None = None,
) -> Behaviour:
    """Measure the model, adapters as they are; returns what it writes to behaviour.json.

    prompt_sets  "plain": the questions as they are written (plain, JSON, template); "all": the hidden sets too
    base         who the local judge is; by default the model without its adapters. Name it where every weight learned.

    UserError where questions, judge or endpoint are amiss, or another process works in the directory.
    """
    questions = load_questions(section.questions)
    wanted = prompts(questions.questions, section.samples, prompt_sets)
    check_vocabulary(model, tokenizer)
    folder = directory / FOLDER
    with lock(folder):
        judge = make_judge(section, base or model, tokenizer, folder, console)
        answers = answer_all(model, tokenizer, wanted, section, folder, console)
        scores = score_all(judge, answers, folder, console)
    result = Behaviour(
        sets=by_set(answers, scores),
        judge=judge.identity,
        weights=answers[0]["weights"],
        prompt_sets=prompt_sets,
        questions=questions.name,
        questions_digest=questions.digest,
        samples=section.samples,
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        seed=section.seed,
        cut=sum(not answer["stopped"] for answer in answers),
        empty=sum(not answer["answer"].strip() for answer in answers),
    )
    write_record(directory / RESULT, result)
    return result


def rejudge(directory: Path, section: BehaviourSection, console: Console) -> Behaviour:
    """Have the answers behind a behaviour.json judged by a server or a file; that file is written anew.

    UserError where there is none, or its answers are no longer there.
    """
    folder = directory / FOLDER
    before = read_record(directory / RESULT, Behaviour, ASK_AGAIN)
    with lock(folder):
        answers = _behind(before, folder)
        judge = outside_judge(section, folder, console)
        scores = score_all(judge, answers, folder, console)
        result = replace(before, sets=by_set(answers, scores), judge=judge.identity)
        write_record(directory / RESULT, result)
    return result


def _behind(result: Behaviour, folder: Path) -> list[Answer]:
    """The answers that a behaviour.json was made of."""
    how = ("questions", "samples", "max_new_tokens", "temperature", "seed")
    section = BehaviourSection(**{name: getattr(result, name) for name in how})
    questions = load_questions(section.questions)
    if questions.digest != result.questions_digest:
        raise UserError(f"{section.questions}: is not what was asked any more; put the questions of {folder} back")
    wanted = prompts(questions.questions, section.samples, result.prompt_sets)
    keys = [key_of(prompt, section, result.weights) for prompt in wanted]
    found = stored(folder, keys)
    if len(found) < len(keys):
        raise UserError(f"{folder / ANSWERS}: lacks answers of {RESULT}; {ASK_AGAIN}")
    return [found[key] for key in keys]


def make_judge(
    section: BehaviourSection, base: Qwen2, tokenizer: ChatTokenizer, folder: Path, console: Console
) -> Judge:
    """The judge that the section names."""
    return LocalJudge(base, tokenizer) if section.judge == "local" else outside_judge(section, folder, console)


def outside_judge(section: BehaviourSection, folder: Path, console: Console) -> Judge:
    """The judge that the section names, where it is none of our models."""
    assert section.judge != "local"
    return EndpointJudge(section) if section.judge == "endpoint" else FileJudge(section.judge_model, folder, console)


def forecast(section: BehaviourSection, tokenizer: ChatTokenizer, prompt_sets: Which = "all") -> dict[str, int]:
    """What a run of the suite would ask for, without asking: counts of requests and tokens.

    Answers are not known before they are written, so tokens that they make are upper bounds.
    """
    wanted = prompts(load_questions(section.questions).questions, section.samples, prompt_sets)
    first = {(p.set, p.question, str(p.messages)): p for p in wanted}  # samples repeat their prompts
    lengths = {key: _tokens(tokenizer, p.messages) for key, p in first.items()}
    judged = {
        key: sum(_tokens(tokenizer, _user(Case("", m, asked(p.messages), "").prompt)) for m in MEASURES)
        for key, p in first.items()
    }

    def total(by_prompt: dict[tuple[str, str, str], int]) -> int:
        return sum(by_prompt[p.set, p.question, str(p.messages)] for p in wanted)

    most = len(wanted) * section.max_new_tokens
    return {
        "sets": len({p.set for p in wanted}),
        "answers": len(wanted),
        "answer_prompt_tokens": total(lengths),
        "answer_tokens_at_most": most,
        "judge_requests": len(MEASURES) * len(wanted) + (section.judge == "endpoint"),
        "judge_prompt_tokens_at_most": total(judged) + len(MEASURES) * most,
    }


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _tokens(tokenizer: ChatTokenizer, messages: Sequence[dict[str, str]]) -> int:
    return len(tokenizer.encode_prompt(messages).ids)
