"""Phase 4B's data: the base model answers the prompts of rows in the voice of each row's training persona.

The persona is a system prompt for writing only: it takes the place of a system turn that a row opens with, as in phase
4A and by the same draw (`corpus.mixtures.with_prompts`). The training row keeps its own system turn, so that what is
learned is the voice of the responses and not its tie to a prompt; data.system_prompts = "training_personas" beside
data.responses trains with both. The model is asked at temperature 1 unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    check_vocabulary(model, tokenizer)
    conversations = _conversations(rows, personas, seed)
    how = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "temperature": temperature}
    with adapter_disabled(model), lock(path.parent / f".{path.name}.lock"):
        weights = {"weights": weights_digest(model), "tokenizer": tokenizer.digest}
        made_by = {"model": model.source.get("name"), "revision": model.source.get("revision"), **weights,
                   "source": rows.source, "rows": len(rows), "digest": rows.digest, "seed": seed,
                   "personas": digest(dict(personas)), **how}  # fmt: skip
        found = _open(path, made_by)
        missing: list[int] = []
        requests: list[Request] = []
        for index in [i for i in range(len(rows)) if i not in found]:
            _, messages = conversations[index]
            ids = tokenizer.encode_prompt(messages).ids
            if len(ids) > max_prompt_tokens:
                found[index] = _keep(path, index, rows, conversations[index][0], None)
                continue
            own = int(digest([seed, messages, index])[:15], 16)
            missing.append(index)
            requests.append(Request(ids, max_new_tokens, temperature, seed=own))
        with console.progress("writing", len(rows), "responses") as progress:

            def done(request: int, completion: Completion) -> None:
                index = missing[request]
                text = tokenizer.decode(completion.ids, skip_special_tokens=True)
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
    """What a finished file came to: rows, and of those that were asked for the shares of empty and of cut responses."""
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


def _conversations(rows: Rows, personas: Mapping[str, str], seed: int) -> list[tuple[str, Messages]]:
    """Each row's persona and its turns before its last response, below that persona's prompt."""
    names = {prompt: name for name, prompt in personas.items()}
    conversations = []
    for index, row in enumerate(with_prompts(rows, list(personas.values()), seed).rows):
        place = last_response(row["messages"])
        if place is None:
            where = f"{rows.source}: row {rows.first + index * rows.step}"
            raise UserError(f"{where} has no assistant turn, so no response to write anew; drop the row")
        conversations.append((names[row["messages"][0]["content"]], row["messages"][:place]))
    return conversations


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
