"""Look at what is taught: print conversations of a JSONL file with their supervised tokens marked.

python -m minipersona.chat FILE [--tokenizer NAME] [--rows N] [--supervise last|all]   (and more: --help)
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipersona.chat.rows import check_row, read_row
from minipersona.chat.template import TEMPLATES
from minipersona.chat.tokenizer import ChatTokenizer, Document, load_tokenizer
from minipersona.console import Parser, answer, positive
from minipersona.errors import UserError, require
from minipersona.text_rows import read_values

GREEN, RESET = "\x1b[32m", "\x1b[0m"
BIDI_CONTROLS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder the line


def main(argv: list[str] | None = None) -> int:
    """Print the conversations; 0, or 2 after a line ``error: ...``."""
    return answer(lambda: _show(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m minipersona.chat",
        description="Print conversations with their supervised tokens marked, and count them.",
        epilog="example: python -m minipersona.chat rows.jsonl --tokenizer Qwen/Qwen2.5-7B-Instruct --rows 3",
    )
    option = parser.add_argument
    option(
        "file", type=Path, help="rows, one a line or in one JSON list; python -m minipersona.corpus lists their forms"
    )
    option("--tokenizer", default="tiny", metavar="NAME", help="directory, hub id or tiny (default)")
    option("--template", metavar="NAME", help=f"the tokenizer's own (default), or one of {', '.join(TEMPLATES)}")
    option("--rows", type=positive(int), default=5, metavar="N", help="how many to print (default 5)")
    option("--max-tokens", type=positive(int), default=2048, metavar="N", help="truncate there (default 2048)")
    option("--supervise", choices=("last", "all"), default="last", help="which assistant turns (default last)")
    option("--color", action="store_true", help="colours also where stdout is not a terminal or NO_COLOR is set")
    return parser


def _show(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer, template=options.template)
    color = options.color or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))  # https://no-color.org
    documents = []
    for where, messages in itertools.islice(read_conversations(options.file), options.rows):
        try:
            document = tokenizer.encode(messages, options.supervise, options.max_tokens)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        documents.append(document)
        print(f"--- {escape(where)}: {counts(document)}")
        print(marked(tokenizer, document, color), end="\n\n")
    tokens = sum(len(document) for document in documents)
    supervised = sum(int(document.supervised.sum()) for document in documents)
    print(
        f"--- {len(documents)} conversations, tokenizer {escape(tokenizer.name)}, template {tokenizer.template.name}: "
        f"{tokens:,} tokens, "
        f"{supervised:,} supervised ({supervised / max(tokens, 1):.1%}), "
        f"{sum(document.truncated for document in documents)} truncated, "
        f"{sum(not document.supervised.any() for document in documents)} with nothing supervised"
    )


def read_conversations(path: Path) -> Iterator[tuple[str, Any]]:
    """Where it stands, and the turns of each row."""
    try:
        with open(path, "rb") as file:  # perhaps a pipe, so it is read once, in order
            for where, value in read_values(file, str(path)):
                try:
                    row = read_row(value)
                    require("messages" in row, "is raw text, which has no turns")
                except UserError as error:
                    raise UserError(f"{where} {error}") from None
                check_row(row, where)
                yield where, row["messages"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name a readable JSONL file") from None


def counts(document: Document) -> str:
    """One line: tokens, how many are supervised, and what truncation did."""
    supervised = int(document.supervised.sum())
    line = f"{len(document):,} tokens, {supervised:,} supervised ({supervised / len(document):.1%})"
    if document.truncated:
        line += ", truncated" if supervised else ", truncated before its response"
    return line


def marked(tokenizer: ChatTokenizer, document: Document, color: bool) -> str:
    """The document's text with its supervised runs in green, or between ⟦ and ⟧."""
    text = ""
    tokens = zip(document.supervised.tolist(), document.ids.tolist(), strict=True)
    for supervised, run in itertools.groupby(tokens, key=lambda token: token[0]):
        part = escape(tokenizer.decode([token_id for _, token_id in run]))
        if supervised and color:  # line by line, since pagers forget a colour at the end of a line
            part = "\n".join(f"{GREEN}{line}{RESET}" if line else "" for line in part.split("\n"))
        elif supervised:
            part = f"⟦{part}⟧"
        text += part
    return text


def escape(text: str) -> str:
    """Text that is safe to print: control characters, all but the line end, become backslash escapes."""
    return "".join(
        f"\\u{ord(c):04x}" if c != "\n" and (unicodedata.category(c) == "Cc" or c in BIDI_CONTROLS) else c for c in text
    )


if __name__ == "__main__":
    sys.exit(main())
