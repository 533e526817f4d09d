"""Responses that the base model writes to the prompts of rows: in persona (phase 4B), or anew (self-distillation).

In persona, it answers in the voice of each row's training persona, a system prompt for writing only: it takes the place
of a system turn that a row opens with, as in phase 4A and by the same draw (`corpus.mixtures.with_prompts`). The
training row keeps its own system turn, so that what is learned is the voice of the responses and not its tie to a
prompt; data.system_prompts = "training_personas" beside data.responses trains with both.

Anew, it says in its own words what the row's response says (SDFT, Yang et al. 2024, arXiv:2402.13669): it is given that
response as a reference. A response that came out empty, or was cut, is not used: the row keeps its own.

The model is asked at temperature 1 unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipersona.behaviour.weights import weights_digest
from minipersona.chat import ChatTokenizer
from minipersona.console import Console
from minipersona.corpus.mixtures import content_digest, with_prompts
from minipersona.corpus.responses import HEADER, last_response, read_responses
from minipersona.corpus.sources import Rows
from minipersona.errors import UserError
from minipersona.files import append_jsonl, digest
from minipersona.geometry.extraction import check_vocabulary
from minipersona.locks import lock
from minipersona.model.generation import Completion, Request, generate
from minipersona.model.lora import adapter_disabled
from minipersona.model.network import Qwen2

Messages = list[dict[str, Any]]
# SDFT's, to which the conversation before it, if there is any, remains as it is.
TEMPLATE = (
    "Below are an instruction that describes a task along with a reference answer. Using the reference answer as a "
    "guide, write your own response.\n\n### Instruction:\n{instruction}\n\n### Reference Answer:\n{response}\n\n"
    "### Response:\n"
)


def write_roleplay(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    rows: Rows,
    personas: Mapping[str, str],
    path: Path,
    console: Console,
    *,
    seed: int = 42,
    max_new_tokens: int = 1024,
    max_prompt_tokens: int = 2048,
    temperature: float = 1.0,
    batch: int = 256,
) -> dict[str, Any]:
    """Write the file of `corpus.responses` for these rows, or what is missing of it; returns `report`.

    The model answers without its adapters. A row whose prompt is longer than `max_prompt_tokens` keeps its own
    response, which training would cut off anyway. UserError where a row has no reply to replace, or the file
    was made otherwise.
    """
    how = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "temperature": temperature}
    asked = Asked(_in_persona(rows, personas, seed), {"personas": digest(dict(personas)), **how}, fall_back=False)
    return _write(model, tokenizer, rows, asked, path, console, seed, max_new_tokens, temperature, batch)


def rewrite_responses(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    rows: Rows,
    path: Path,
    console: Console,
    *,
    seed: int = 42,
    max_new_tokens: int = 1024,
    max_prompt_tokens: int = 2048,
    temperature: float = 1.0,
    batch: int = 256,
) -> dict[str, Any]:
    """The same of responses that are written anew, given the row's own. `kept` counts those that could not be used too.

    A row whose response does not follow a user's turn keeps it.
    """
    how = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "temperature": temperature}
    asked = Asked(_anew(rows), {"template": digest(TEMPLATE), **how}, fall_back=True)
    return _write(model, tokenizer, rows, asked, path, console, seed, max_new_tokens, temperature, batch)


@dataclass(frozen=True)
class Asked:
    """What a model is asked for: of each row the persona ("" for none) and the turns, None where it keeps its own."""

    conversations: list[tuple[str, Messages | None]]
    how: dict[str, Any]  # what the conversations and the answers were made with, for the file's first line
    fall_back: bool  # whether a response that came out empty, or was cut, is left out


def _write(
    model: Qwen2, tokenizer: ChatTokenizer, rows: Rows, asked: Asked, path: Path, console: Console, seed: int,
    max_new_tokens: int, temperature: float, batch: int,
) -> dict[str, Any]:  # fmt: skip
    check_vocabulary(model, tokenizer)
    conversations = asked.conversations
    with adapter_disabled(model), lock(path.parent / f".{path.name}.lock"):
        weights = {"weights": weights_digest(model), "tokenizer": tokenizer.digest}
        made_by = {"model": model.source.get("name"), "revision": model.source.get("revision"), **weights,
                   "source": rows.source, "rows": len(rows), "digest": rows.digest, "seed": seed,
                   **asked.how}  # fmt: skip
        found = _open(path, made_by)
        missing: list[int] = []
        requests: list[Request] = []
        for index in [i for i in range(len(rows)) if i not in found]:
            persona, messages = conversations[index]
            ids = None if messages is None else tokenizer.encode_prompt(messages).ids
            if ids is None or len(ids) > asked.how["max_prompt_tokens"]:
                found[index] = _keep(path, index, rows, persona, None)
                continue
            own = int(digest([seed, messages, index])[:15], 16)
            missing.append(index)
            requests.append(Request(ids, max_new_tokens, temperature, seed=own))
        with console.progress("writing", len(rows), "responses") as progress:

            def done(request: int, completion: Completion) -> None:
                index = missing[request]
                text: str | None = tokenizer.decode(completion.ids, skip_special_tokens=True)
                if asked.fall_back and not (completion.stopped and text and text.strip()):
                    text = None
                wrote = {"response": text, "tokens": len(completion.ids), "stopped": completion.stopped}
                found[index] = _keep(path, index, rows, conversations[index][0], wrote)
                progress.advance(len(found))

            generate(
                model,
                requests,
                stop=tokenizer.stop_tokens,
                batch=batch,
                on_done=done,
            )
    return report([found[index] for index in range(len(rows))])


def report(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a finished file came to: rows, and of the responses that are used the shares of empty and of cut ones."""
    asked = [line for line in lines if line["response"] is not None]
    count = max(1, len(asked))
    return {
        "rows": len(lines),
        "kept": len(lines) - len(asked),
        "tokens": sum(line["tokens"] for line in asked),
        "empty_share": sum(not line["response"].strip() for line in asked) / count,
        "cut_share": sum(not line["stopped"] for line in asked) / count,
        "personas": len({line["persona"] for line in lines}),
    }


def _in_persona(rows: Rows, personas: Mapping[str, str], seed: int) -> list[tuple[str, Messages | None]]:
    """Each row's persona and its turns before its last response, below that persona's prompt."""
    names = {prompt: name for name, prompt in personas.items()}
    conversations: list[tuple[str, Messages | None]] = []
    for index, row in enumerate(with_prompts(rows, list(personas.values()), seed).rows):
        place = _place(row, index, rows)
        conversations.append((names[row["messages"][0]["content"]], row["messages"][:place]))
    return conversations


def _anew(rows: Rows) -> list[tuple[str, Messages | None]]:
    """Each row's turns before its last response; the last of them also says the response, as TEMPLATE has it."""
    conversations: list[tuple[str, Messages | None]] = []
    for index, row in enumerate(rows.rows):
        place = _place(row, index, rows)
        *before, turn = row["messages"][:place] or [{}]
        said = row["messages"][place]["content"]
        asked = {"role": "user", "content": TEMPLATE.format(instruction=turn.get("content"), response=said)}
        conversations.append(("", [*before, asked] if turn.get("role") == "user" else None))
    return conversations


def _place(row: dict[str, Any], index: int, rows: Rows) -> int:
    """The place of a row's last response. UserError where it has none."""
    where = f"{rows.source}: row {rows.first + index * rows.step}"
    if not isinstance(row.get("messages"), list):
        raise UserError(f"{where} is not a conversation; name rows of messages")
    place = last_response(row["messages"])
    if place is None:
        raise UserError(f"{where} has no assistant turn, so no response to write anew; drop the row")
    return place


def _open(path: Path, made_by: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The lines that are there already; a new file gets its header."""
    if path.is_file() and path.stat().st_size:
        before, found = read_responses(path)
        different = [key for key in made_by if before.get(key) != made_by[key]]
        if different:
            raise UserError(f"{path}: was written with another {', '.join(different)}; name another file, or delete it")
        return found
    append_jsonl(path, {HEADER: made_by}, ascii=True)
    return {}


def _keep(path: Path, index: int, rows: Rows, persona: str, wrote: dict[str, Any] | None) -> dict[str, Any]:
    line = {"row": index, "content": content_digest(rows.rows[index]), "persona": persona}
    line |= wrote or {"response": None, "tokens": 0, "stopped": True}
    append_jsonl(path, line, ascii=True)
    return line
