"""From conversations to token ids and the mask of supervised tokens.

Shapes: n = tokens of a document.

The ids come from tokenising the whole rendered conversation at once, so they are the official tokenizer's,
also where content holds special-token text. The mask comes from where the template wrote each response
(`Rendered`) and from the tokens' character offsets, never from searching ids: a user who writes
``<|im_start|>assistant\\n`` makes special tokens but no turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from minipersona.chat.messages import Message, check_text, is_learned
from minipersona.chat.template import Template, named_template
from minipersona.chat.vocabulary import FILES, read_template, read_tokenizer
from minipersona.errors import UserError
from minipersona.hub import locate

Supervise = Literal["last", "all"]
Span = tuple[int, int]  # characters [start, stop) of the rendered text

# Rows tokenised at a time: enough to keep every core busy, few enough that their encodings take little memory.
BATCH = 1024

MOST_IDS = 10_000_000  # more than any embedding has rows; Qwen2.5's tokenizer has 151,665


@dataclass(frozen=True, eq=False)
class Document:
    """A tokenised text. `supervised[t]` says that token t is a prediction target; token 0 never is."""

    ids: npt.NDArray[np.int32]  # (n,)
    supervised: npt.NDArray[np.bool_]  # (n,)
    truncated: bool

    def __post_init__(self) -> None:
        assert self.ids.dtype == np.int32 and self.supervised.dtype == np.bool_
        assert self.ids.ndim == 1 and self.ids.shape == self.supervised.shape
        assert not self.supervised[:1].any()  # nothing comes before it to predict it from

    def __len__(self) -> int:
        return len(self.ids)


# The template whose results were recorded by the digest of the tokenizer's files alone.
UNNAMED = "chatml-qwen2.5"


class ChatTokenizer:
    """A tokenizer together with its model's chat template. Make one with `load_tokenizer`.

    template     which one
    digest       SHA-256 (hex) of the files that it was read from, and of the template's name
    vocab_size   all ids are below it; a model's embedding may have more rows (Qwen2.5 pads to a round number)
    special      the id of each special token of the template
    stop_tokens  the ids at which a reply ends; the first one ends every turn
    endoftext    the id that separates documents in pre-training
    """

    def __init__(self, tokenizer: Tokenizer, digest: str, template: Template, name: str = "tokenizer") -> None:
        self._tokenizer = tokenizer
        self.name = name
        self.template = template
        unnamed = template.name == UNNAMED
        self.digest = digest if unnamed else hashlib.sha256(f"{digest} {template.name}".encode()).hexdigest()
        self.vocab_size = max(tokenizer.get_vocab().values(), default=0) + 1
        if self.vocab_size > MOST_IDS:
            raise UserError(f"{name}: has ids up to {self.vocab_size - 1:,}; check that it is a model's tokenizer")
        self.special = {token: self._special(token) for token in template.special}
        self.stop_tokens = tuple(self.special[token] for token in template.stop)
        self.endoftext = self.special[template.end_of_text]

    def _special(self, token: str) -> int:
        # Between line ends: a token that strips white space would swallow them, and with them part of the
        # mask.
        token_id = self._tokenizer.token_to_id(token)
        ids = self._tokenizer.encode(f"\n{token}\n", add_special_tokens=False).ids
        if token_id is None or ids[1:-1] != [token_id] or ids[0] != ids[-1]:
            raise UserError(
                f"{self.name}: {token} is not a token of its own, as the template {self.template.name} needs; "
                "use the model's own tokenizer, or another --template"
            )
        return int(token_id)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text: see `minipersona.chat.template.Template.render`."""
        return self.template.render(messages, add_generation_prompt)

    def encode(self, messages: Sequence[Message], supervise: Supervise = "last", max_tokens: int = 2048) -> Document:
        """A conversation for training: its first `max_tokens` tokens, and which of them are supervised.

        Supervised are, of the last assistant turn ("last") or of each ("all"), the tokens after the turn's header, up
        to and including its end (ChatML: ``<|im_end|>\\n``, two tokens), unless the turn has a weight of 0. Where
        truncation took them all the document teaches nothing, and its caller counts it. UserError for a row without an
        assistant turn, and as `render`.
        """
        _check_options(supervise, max_tokens)
        text, spans = self._text_and_spans(messages, supervise)
        return _document(self._encode(text), spans, max_tokens)

    def encode_many(
        self,
        conversations: Sequence[Sequence[Message]],
        supervise: Supervise = "last",
        max_tokens: int = 2048,
    ) -> list[Document]:
        """`encode` of each conversation, on all cores. UserErrors name the row, counted from 0."""
        _check_options(supervise, max_tokens)

        def batch(first: int) -> list[Document]:
            rows: list[tuple[str, list[Span]]] = []
            for row, messages in enumerate(conversations[first : first + BATCH], first):
                try:
                    rows.append(self._text_and_spans(messages, supervise))
                except UserError as error:
                    raise UserError(f"rows[{row}]: {error}") from None
            encodings = self._tokenizer.encode_batch([text for text, _ in rows], add_special_tokens=False)
            return [
                _document(encoding, spans, max_tokens) for encoding, (_, spans) in zip(encodings, rows, strict=True)
            ]

        # The library takes all cores for a batch, but rendering and masks are Python's: two batches overlap them.
        with ThreadPoolExecutor(2) as pool:
            batches = list(pool.map(batch, range(0, len(conversations), BATCH)))
        return [document for documents in batches for document in documents]

    def encode_prompt(self, messages: Sequence[Message]) -> Document:
        """A conversation that awaits its reply (generation prompt added). Nothing is supervised or cut."""
        return _document(self._encode(self.render(messages, add_generation_prompt=True)), [], None)

    def encode_prompts(self, conversations: Sequence[Sequence[Message]]) -> list[Document]:
        """`encode_prompt` of each conversation, on all cores."""
        texts = [self.render(messages, add_generation_prompt=True) for messages in conversations]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # without offsets
        return [_document(encoding, [], None) for encoding in encodings]

    def encode_text(self, text: str, max_tokens: int) -> Document:
        """Raw text, without turns: its first `max_tokens` tokens, all but the very first supervised.

        Where the template begins with a special token (Llama 3's ``<|begin_of_text|>``) raw text does too, as in
        pre-training.
        """
        _check_options("all", max_tokens)
        check_text(text, "text")
        return _text_document(self._encode(self.template.start + text), max_tokens)

    def encode_texts(self, texts: Sequence[str], max_tokens: int) -> list[Document]:
        """`encode_text` of each text, on all cores. UserErrors name the row, counted from 0."""
        _check_options("all", max_tokens)
        documents: list[Document] = []
        for first in range(0, len(texts), BATCH):
            batch = texts[first : first + BATCH]
            for row, text in enumerate(batch, first):
                check_text(text, f"rows[{row}]: text")
            started = [self.template.start + text for text in batch]
            encodings = self._tokenizer.encode_batch_fast(started, add_special_tokens=False)  # without offsets
            documents += [_text_document(encoding, max_tokens) for encoding in encodings]
        return documents

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids (a list, an array or a CPU tensor). Part of a character becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def _encode(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _text_and_spans(self, messages: Sequence[Message], supervise: Supervise) -> tuple[str, list[Span]]:
        text, responses = self.template.render_with_responses(messages)
        if not responses:
            raise UserError("row has no assistant turn, so nothing to learn from; add a reply, or drop the row")
        turns = [message for message in messages if message["role"] == "assistant"]
        if supervise == "last":
            turns, responses = turns[-1:], responses[-1:]
        return text, [span for turn, span in zip(turns, responses, strict=True) if is_learned(turn)]


def load_tokenizer(name_or_path: str, *, revision: str | None = None, template: str | None = None) -> ChatTokenizer:
    """The tokenizer of a directory in Hugging Face layout, a hub id, `tiny` (embedded) or `random:...`.

    A model of random weights has no vocabulary of its own and takes the tiny one. `revision` is a commit,
    branch or tag on the hub. `template` is a name of `minipersona.chat.template.TEMPLATES`; by default the one whose
    Jinja text the model brings along, which is recognised by its SHA-256 and never executed.
    UserError where the name leads nowhere, files or special tokens are missing, or the model's template is not known.
    """
    name = "tiny" if name_or_path.startswith("random:") else name_or_path
    chosen = named_template(template) if template else None
    directory = locate(name, FILES, revision=revision)
    tokenizer, digest = read_tokenizer(directory)
    return ChatTokenizer(tokenizer, digest, chosen or read_template(directory), name)


def _check_options(supervise: str, max_tokens: int) -> None:
    if supervise not in ("last", "all"):
        raise UserError(f"supervise is {supervise!r}; use last or all")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; give 1 or more")


def _document(encoding: Encoding, spans: list[Span], max_tokens: int | None) -> Document:
    """The first `max_tokens` tokens (None: all), of which those that end inside a span are supervised.

    Spans begin and end beside a special token or a line end, and so do tokens, with one exception: a response
    that opens with a line end may merge with its header ("\\n" and "\\nHi" become "\\n\\n" and "Hi"). The
    merged token holds text of the response which no other token would teach. Hence a token belongs to where
    it ends. Offsets count the characters before NFC. That moves no token out of its span: text is normalised
    between special tokens only, and no line end composes with what follows it. Only the two line ends around a
    response are looked up, since a list of all offsets takes longer to make than all else here together.
    """
    ids = np.array(encoding.ids[:max_tokens], dtype=np.int32)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in spans:
        header, last = encoding.char_to_token(start - 1), encoding.char_to_token(stop - 1)
        assert header is not None and last is not None  # every line end is in some token
        _, end = encoding.token_to_chars(header) or (0, 0)
        supervised[header if end > start else header + 1 : last + 1] = True
    return Document(ids, supervised, truncated=len(encoding) > len(ids))


def _text_document(encoding: Encoding, max_tokens: int) -> Document:
    ids = np.array(encoding.ids[:max_tokens], dtype=np.int32)
    supervised = np.ones(len(ids), dtype=np.bool_)
    supervised[:1] = False  # nothing comes before it to predict it from
    return Document(ids, supervised, truncated=len(encoding) > len(ids))
