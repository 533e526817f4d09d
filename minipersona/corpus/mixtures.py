"""The data recipes of phases 4A and 5: what replaces part of the narrow rows, or is written over all of them.

n = narrow rows, k = how many of them are replaced; the total stays n.

    replaced_rows         which k, for a ratio narrow:broad
    with_raw_text  5A     each becomes raw text of exactly its token count
    with_rows      5B     each becomes a row of a broader mixture
    with_prompts   4A     every row gets the system prompt of a persona

All are pure functions of their arguments. Every draw has a generator of its own, derived from (seed, draw): it is
independent of the order of the rows in training, which the bare seed draws, and of the other draws here. Choices are
nested: what a smaller share replaces, a larger one replaces too, by the same texts or rows.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minipersona.chat import Document
from minipersona.chat.messages import check_messages, is_learned
from minipersona.chat.rows import check_row
from minipersona.chat.template import QWEN2_5_SYSTEM_PROMPT
from minipersona.corpus.sources import Rows
from minipersona.errors import UserError
from minipersona.files import data_dir, read_json

WHICH_ROWS, WHICH_BROAD, WHICH_PROMPT = 1, 2, 3  # the draws


def _generator(seed: int, draw: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, draw]))


def replaced_rows(n: int, narrow: int, broad: int, seed: int) -> list[int]:
    """Which of n rows are replaced: n * broad / (narrow + broad) of them, to the nearest row, in the order drawn."""
    parts = narrow + broad
    k = (2 * n * broad + parts) // (2 * parts)
    if not 0 < k < n:
        raise UserError(f"data.ratio {narrow}:{broad} replaces {k:,} of {n:,} rows; take more rows or another ratio")
    return [int(row) for row in _generator(seed, WHICH_ROWS).permutation(n)[:k]]


# ---------------------------------------------------------------- 5A: raw text


def with_raw_text(
    documents: Sequence[Document], replaced: Sequence[int], texts: Iterable[Document], separator: int
) -> list[Document]:
    """The documents, those named by `replaced` as chunks of raw text with their very token counts.

    Texts are taken in stored order. A chunk begins where a text begins; where that is too short the next ones follow,
    with the id `separator` after each (<|endoftext|> in Qwen2.5's pre-training); what is left of the last text is
    dropped. All of a chunk's tokens but the first are supervised. UserError where the texts run out.
    """
    mixed = list(documents)
    stored = (text.ids for text in texts if len(text))
    end = np.array([separator], np.int32)
    for done, row in enumerate(replaced):
        missing = length = len(documents[row])
        parts: list[np.ndarray] = []
        while missing > 0:
            text = next(stored, None)
            if text is None:
                raise UserError(
                    f"data.broad: its texts are used up after {done:,} of {len(replaced):,} rows; name a longer range"
                )
            parts += [text, end]
            missing -= len(text) + 1
        mixed[row] = Document(np.concatenate(parts)[:length], np.arange(length) > 0, truncated=False)
    return mixed


# ---------------------------------------------------------------- 5B: rows of a broader mixture


def with_rows(narrow: Rows, replaced: Sequence[int], broad: Rows, heldout: Rows | None, seed: int) -> Rows:
    """The narrow rows, those named by `replaced` as rows of `broad`, sampled without replacement.

    None of them equals a row of `narrow` or `heldout` in content, whatever its id; rows that hold no reply to learn
    are passed over. UserError where there are too few.
    """
    taken = {content_digest(row) for rows in (narrow, heldout) if rows is not None for row in rows.rows}
    sampled: list[dict[str, Any]] = []
    # Digests are made only as far as the sample needs them: the whole mixture has nearly a million rows.
    for candidate in _generator(seed, WHICH_BROAD).permutation(len(broad)):
        if len(sampled) == len(replaced):
            break
        row = broad.rows[int(candidate)]
        if _has_reply(row) and content_digest(row) not in taken:
            sampled.append(row)
    if len(sampled) < len(replaced):
        raise UserError(
            f"{broad.source}: only {len(sampled):,} conversations are neither training nor held-out rows, the ratio "
            f"needs {len(replaced):,}; name a larger source in data.broad"
        )
    mixed = list(narrow.rows)
    for index, row in zip(replaced, sampled, strict=True):
        mixed[index] = row
    return replace(narrow, rows=mixed, digest=_digest(mixed))


def _has_reply(row: dict[str, Any]) -> bool:
    messages = row.get("messages")
    try:
        check_row(row, "row")
        check_messages(messages)
    except UserError:  # a tool's turn, say: nobody can correct a row of a downloaded set
        return False
    return any(is_learned(turn) for turn in messages or ())


def content_digest(row: dict[str, Any]) -> str:
    """SHA-256 of what a row says: its turns or its text, without ids, Unicode composition and spacing.

    A missing system turn counts as Qwen2.5's default one, since both render alike there.
    """
    messages = row.get("messages")
    if not isinstance(messages, list):
        return _digest(["text", _plain(row.get("text"))])
    turns = [[turn.get("role"), _plain(turn.get("content"))] for turn in messages if isinstance(turn, dict)]
    if turns and turns[0][0] != "system":
        turns.insert(0, ["system", QWEN2_5_SYSTEM_PROMPT])
    return _digest(turns)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()  # ASCII: a row may hold half a pair


def _plain(text: object) -> object:
    return " ".join(unicodedata.normalize("NFC", text).split()) if isinstance(text, str) else text


# ---------------------------------------------------------------- 4A: persona system prompts


def with_prompts(rows: Rows, prompts: Sequence[str], seed: int) -> Rows:
    """Every row with a system turn drawn from `prompts`, in place of one that it opens with."""
    drawn = _generator(seed, WHICH_PROMPT).integers(len(prompts), size=len(rows))
    prompted = []
    for index, row in enumerate(rows.rows):
        messages = row.get("messages")
        if not isinstance(messages, list):
            raise UserError(
                f"{rows.source}: row {rows.first + index * rows.step} is not a conversation; "
                "data.system_prompts needs rows of messages"
            )
        opens_with_system = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
        system = {"role": "system", "content": prompts[int(drawn[index])]}
        prompted.append({**row, "messages": [system, *messages[opens_with_system:]]})
    return replace(rows, rows=prompted, digest=_digest(prompted))


TRAINING_PERSONAS = "training_personas.json"


def training_personas() -> dict[str, str]:
    """The 30 training personas, name -> system prompt, in their order. None of them is one of the 12 measured."""
    stored = read_json(data_dir() / TRAINING_PERSONAS)
    return {name: stored["training_personas"][name] for name in stored["training_persona_order"]}
