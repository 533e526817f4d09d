"""What a model answers, kept line by line: a killed run goes on where it stopped and ends with the same answers.

An answer's key is a digest of the model's weights, the prompt and how it was sampled. Asking again with the same key
finds the answer; another model's answers may lie in the same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipersona.behaviour.prompt_sets import Prompt
from minipersona.behaviour.weights import weights_digest
from minipersona.behaviour_config import BehaviourSection
from minipersona.chat import ChatTokenizer
from minipersona.console import Console
from minipersona.files import append_jsonl, digest, read_objects
from minipersona.model.generation import Completion, Request, generate
from minipersona.model.network import Qwen2

ANSWERS = "answers.jsonl"

Answer = dict[str, Any]


def key_of(prompt: Prompt, section: BehaviourSection, weights: str) -> str:
    """What tells an answer from all others: whose it is, to what, and how it was sampled."""
    how = [section.max_new_tokens, section.temperature, section.seed]
    return digest([weights, prompt.set, prompt.question, prompt.sample, prompt.messages, how])


def stored(directory: Path, keys: Sequence[str]) -> dict[str, Answer]:
    """The answers in the directory that have these keys, by key."""
    wanted = set(keys)
    return {row["key"]: row for row in read_objects(directory / ANSWERS) if row.get("key") in wanted}


def answer_all(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    section: BehaviourSection,
    directory: Path,
    console: Console,
) -> list[Answer]:
    """The model's answer to every prompt, in their order: rows with "key", "set", "messages", "answer" and more.

    What `directory` holds already is taken from there; the rest is generated and appended as it is finished.
    """
    weights = weights_digest(model)
    keys = [key_of(prompt, section, weights) for prompt in prompts]
    found = stored(directory, keys)
    missing = [i for i, key in enumerate(keys) if key not in found]
    requests = [
        Request(
            tokenizer.encode_prompt(prompts[i].messages).ids,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            seed=prompts[i].seed(section.seed),
        )
        for i in missing
    ]
    with console.progress("answering", len(prompts), "answers") as progress:

        def done(index: int, completion: Completion) -> None:
            i = missing[index]
            row = _row(keys[i], prompts[i], weights, tokenizer, completion)
            append_jsonl(directory / ANSWERS, row, ascii=True)
            found[keys[i]] = row
            progress.advance(len(found))

        generate(
            model,
            requests,
            stop=tokenizer.stop_tokens,
            batch=section.batch,
            on_done=done,
        )
    return [found[key] for key in keys]


def _row(key: str, prompt: Prompt, weights: str, tokenizer: ChatTokenizer, completion: Completion) -> Answer:
    return {
        "key": key,
        "set": prompt.set,
        "question": prompt.question,
        "sample": prompt.sample,
        "weights": weights,
        "messages": prompt.messages,
        "answer": tokenizer.decode(completion.ids, skip_special_tokens=True),
        "tokens": len(completion.ids),
        "stopped": completion.stopped,
    }


def asked(messages: Sequence[dict[str, str]]) -> str:
    """What was asked, as a judge reads it: the user's turn, and the instructions above it if there are any."""
    system = "".join(f"(The assistant's instructions: {m['content']})\n\n" for m in messages if m["role"] == "system")
    return system + str(messages[-1]["content"])
