"""What a run is trained on: the [data] section as documents, and what the mixture came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minipersona.chat import ChatTokenizer, Document
from minipersona.config import DataSection, parse_ratio
from minipersona.console import Console
from minipersona.corpus.mixtures import (
    replaced_rows,
    share_of,
    training_personas,
    with_prompts,
    with_raw_text,
    with_rows,
)
from minipersona.corpus.responses import with_responses, with_shuffled_responses
from minipersona.corpus.sources import Rows, read_source, tokenize
from minipersona.corpus.token_cache import tokenize_cached
from minipersona.errors import UserError
from minipersona.files import user_path

TEXTS_AT_A_TIME = 1024  # raw texts are tokenised only as far as they are needed


@dataclass(frozen=True)
class TrainingSet:
    """The training documents, in the order that row numbers count, and where they come from."""

    documents: list[Document]
    sources: list[dict[str, Any]]  # name, rows and digest of the narrow source, and of the broad one if there is one
    mixture: dict[str, Any]  # what was mixed and its realised shares, for the record; empty without a mixture

    def report(self) -> list[str]:
        """The same in words, a line each."""
        documents, mixed = self.documents, self.mixture
        lines = [
            f"{len(documents):,} training rows, {sum(map(len, documents)):,} tokens; "
            f"{sum(d.truncated for d in documents):,} truncated, "
            f"{sum(not d.supervised.any() for d in documents):,} teach nothing"
        ]
        if "broad" in mixed:
            lines.append(
                f"{mixed['ratio']} mixture: {mixed['rows']:,} rows ({mixed['row_share']:.2%}), "
                f"{mixed['token_share']:.2%} of the tokens and {mixed['supervised_share']:.2%} of the supervised ones "
                f"are {mixed['broad_kind'].replace('_', ' ')} of {mixed['broad']}"
            )
        if "responses" in mixed:
            lines.append(
                f"responses of {mixed['responses']} by {mixed['responses_by']}: {mixed['responses_empty']:,} empty, "
                f"{mixed['responses_cut']:,} cut; {mixed['responses_kept']:,} rows keep their own"
            )
        if "system_prompts" in mixed:
            lines.append(f"every row has one of the {mixed['prompts']} system prompts of {mixed['system_prompts']}")
        if "persona_share" in mixed:
            lines.append(f"so it is with {mixed['persona_share']:.2%} of the rows; the others are as they were")
        if "shuffled_responses" in mixed:
            lines.append("every row has the response of another row: a control")
        return lines


def training_set(
    section: DataSection, seed: int, tokenizer: ChatTokenizer, console: Console | None = None
) -> TrainingSet:
    """Read, mix and tokenise what a config's [data] section names. UserErrors name the source or key at fault."""
    narrow = read_source(section.train)
    sources = [narrow.identity()]
    mixture: dict[str, Any] = {}
    rows, broad, replaced = narrow, None, list[int]()
    if section.shuffle_responses:
        rows = with_shuffled_responses(rows, seed)
        mixture["shuffled_responses"] = len(rows)
    if section.responses:
        rows, written = with_responses(narrow, user_path(section.responses))
        mixture |= written
        if section.system_prompts and written["responses_seed"] != seed:
            raise UserError(
                f"data.responses {section.responses}: its personas were drawn by seed {written['responses_seed']}, "
                f"data.system_prompts are by {seed}; write the responses with --seed {seed}"
            )
    if section.broad:
        broad = read_source(section.broad)
        _check_kind(broad, section.broad_kind)
        sources.append(broad.identity())
        replaced = replaced_rows(len(narrow), *parse_ratio(section.ratio), seed)
        if section.broad_kind == "rows":
            heldout = read_source(section.heldout) if section.heldout else None
            rows = with_rows(rows, replaced, broad, heldout, seed)
    if section.system_prompts:
        prompts = training_personas()
        rows = with_prompts(rows, list(prompts.values()), seed)
        mixture |= {"system_prompts": section.system_prompts, "prompts": len(prompts)}
    if section.persona_share < 1:
        rows = share_of(rows, narrow, section.persona_share, seed)
        mixture["persona_share"] = section.persona_share
    documents = tokenize_cached(
        rows, tokenizer, supervise=section.supervise, max_tokens=section.max_tokens, console=console
    )
    if broad is not None:
        if section.broad_kind == "raw_text":
            texts = _texts(broad, tokenizer, section.max_tokens)
            documents = with_raw_text(documents, replaced, texts, tokenizer.endoftext)
        named = {"broad": broad.source, "broad_kind": section.broad_kind, "ratio": section.ratio}
        mixture |= {**named, **_shares(documents, replaced)}
    return TrainingSet(documents, sources, mixture)


def _check_kind(broad: Rows, kind: str) -> None:
    for index, row in enumerate(broad.rows):
        if ("messages" in row) != (kind == "rows"):
            found = "a conversation" if "messages" in row else "raw text"
            where = f"data.broad {broad.source}: row {broad.first + index * broad.step}"
            raise UserError(f'{where} is {found}; data.broad_kind = "{kind}" needs another source')


def _texts(broad: Rows, tokenizer: ChatTokenizer, max_tokens: int) -> Iterator[Document]:
    for start in range(0, len(broad), TEXTS_AT_A_TIME):
        rows = broad.rows[start : start + TEXTS_AT_A_TIME]
        piece = replace(broad, rows=rows, first=broad.first + start * broad.step)
        yield from tokenize(piece, tokenizer, max_tokens=max_tokens)


def _shares(documents: Sequence[Document], replaced: Sequence[int]) -> dict[str, Any]:
    """What the replaced rows are of all: rows, tokens, supervised tokens."""
    mixed = [documents[row] for row in replaced]
    tokens, supervised = sum(map(len, mixed)), sum(int(d.supervised.sum()) for d in mixed)
    return {
        "rows": len(mixed),
        "row_share": len(mixed) / len(documents),
        "tokens": tokens,
        "token_share": tokens / sum(map(len, documents)),
        "supervised_tokens": supervised,
        "supervised_share": supervised / max(1, sum(int(d.supervised.sum()) for d in documents)),
    }
