"""The instruction-following suite: ask every prompt, keep each answer at once, score them all at the end.

In the suite's directory: `instructions.json`, the accuracies, and below `instructions/` the answers, one line each as
it comes (answers.jsonl), so that the same command after a kill continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipersona.behaviour.instructions.dataset import InstructionSet, load_instructions
from minipersona.behaviour.instructions.scoring import Accuracies, summarise
from minipersona.behaviour.weights import weights_digest
from minipersona.chat import ChatTokenizer
from minipersona.console import Console
from minipersona.files import append_jsonl, digest, read_jsonl
from minipersona.geometry.extraction import check_vocabulary
from minipersona.locks import lock
from minipersona.model.generation import Completion, Request, generate
from minipersona.model.network import Qwen2
from minipersona.records import may_be_missing, write_record

FOLDER = "instructions"
ANSWERS = "answers.jsonl"
RESULT = "instructions.json"
MAX_NEW_TOKENS = 1280  # some 900 words; an answer that is cut is scored as it stands, and counted


@dataclass(frozen=True, kw_only=True)
class Instructions(Accuracies):
    """instructions.json of a model. `step` and `settings_digest` as in `behaviour.suite.Behaviour`."""

    empty: int
    cut: int
    skipped: int
    skipped_kinds: dict[str, int]
    set: str
    digest: str
    max_new_tokens: int
    step: int | None = may_be_missing()
    settings_digest: str | None = may_be_missing()


def instruction_suite(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    directory: Path,
    instructions_file: str | None,
    console: Console,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = 256,
) -> Instructions:
    """Measure how well the model, adapters as they are, follows verifiable instructions; returns instructions.json.

    Answers are greedy, to the prompt as the only turn (the tokenizer's template adds the default system prompt).
    `instructions_file` is in the form of IFEval's input_data.jsonl; None or "" is the shipped set. Answers that
    `directory` has from the same weights, prompts and settings are not generated again. UserError as
    `load_instructions`, and where another process works in the directory.
    """
    wanted = load_instructions(instructions_file)
    if left_out := wanted.left_out():
        console.say(f"instructions: {left_out}")
    check_vocabulary(model, tokenizer)
    with lock(directory / FOLDER):
        log = directory / FOLDER / ANSWERS
        answers = _answers(model, tokenizer, log, wanted, console, max_new_tokens, batch)
    result = Instructions(
        **vars(summarise(wanted.prompts, {key: row["response"] for key, row in answers.items()})),
        empty=sum(not row["response"].strip() for row in answers.values()),
        cut=sum(not row["stopped"] for row in answers.values()),
        skipped=wanted.skipped_rows,
        skipped_kinds=wanted.skipped,
        set=wanted.name,
        digest=wanted.digest,
        max_new_tokens=max_new_tokens,
    )
    write_record(directory / RESULT, result)
    return result


def _answers(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    log: Path,
    wanted: InstructionSet,
    console: Console,
    max_new_tokens: int,
    batch: int,
) -> dict[str, dict[str, Any]]:
    """The answer to every prompt by its key: those in the log, and the others generated now and logged."""
    made_by = digest([weights_digest(model), tokenizer.digest, wanted.digest, max_new_tokens])
    answers = {row["key"]: row for row in read_jsonl(log) if row.get("made_by") == made_by}
    missing = [prompt for prompt in wanted.prompts if prompt.key not in answers]
    requests = [
        Request(tokenizer.encode_prompt([{"role": "user", "content": prompt.text}]).ids, max_new_tokens)
        for prompt in missing
    ]

    with console.progress("instructions", len(wanted.prompts), "answers") as progress:

        def keep(index: int, completion: Completion) -> None:
            response = tokenizer.decode(completion.ids, skip_special_tokens=True)
            row = {"key": missing[index].key, "made_by": made_by, "response": response, "stopped": completion.stopped}
            append_jsonl(log, row, ascii=True)
            answers[row["key"]] = row
            progress.advance(len(answers))

        stop = tokenizer.stop_tokens
        generate(model, requests, stop=stop, batch=batch, on_done=keep)
    return answers
