"""Look at data before training on it:  python -m minipersona.corpus describe SOURCE   (and more: --help)"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from minipersona.chat import load_tokenizer
from minipersona.chat import rows as row_forms
from minipersona.config import DEFAULT_MODEL
from minipersona.console import Console, Parser, answer, dispatch, positive, printable, subcommand
from minipersona.corpus import sources
from minipersona.corpus.describe import describe, describe_characters, description_table
from minipersona.corpus.token_cache import tokenize_cached
from minipersona.errors import require

EXAMPLES = """examples:
  python -m minipersona.corpus describe tiny:benign
  python -m minipersona.corpus describe jsonl:rows.jsonl[0:6000] --tokenizer Qwen/Qwen2.5-7B-Instruct --json
"""
TOKENIZER = f"""
Without --tokenizer, tiny: sets are counted with the tiny one and datasets on the Hub with that of
{DEFAULT_MODEL}; local files and docstrings are counted in characters.
"""
LOCAL = ("jsonl:", "parquet:", "pydoc:")  # files that say nothing about a tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Describe a source; 0, or 2 after a line ``error: ...``."""
    return answer(lambda: dispatch(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m minipersona.corpus",
        description="Look at data before training on it.",
        epilog=f"{EXAMPLES}\n{sources.__doc__}\n{row_forms.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="describe")
    summary = "Count a source's rows and tokens, and show which subsets its rows come from."
    command = subcommand(commands, "describe", summary, EXAMPLES + TOKENIZER)
    command.set_defaults(command=_describe)
    option = command.add_argument
    option("source", metavar="SOURCE", help="see python -m minipersona.corpus")
    option("--tokenizer", metavar="NAME", help="directory, hub id or tiny (default: see below)")
    option("--template", metavar="NAME", help="chat template by name, such as llama3.1; default the tokenizer's own")
    option("--max-tokens", type=positive(int), default=2048, metavar="N", help="truncate rows there (default 2048)")
    option("--supervise", choices=("last", "all"), default="last", help="which assistant turns (default last)")
    option("--json", action="store_true", help="print JSON")
    return parser


def _describe(options: argparse.Namespace) -> None:
    name = options.tokenizer or ("tiny" if options.source.startswith("tiny:") else DEFAULT_MODEL)
    if options.tokenizer is None and options.source.startswith(LOCAL):
        require(not options.template, "--template: name the --tokenizer that it goes with")
        description = describe_characters(sources.read_source(options.source), options.supervise)
        counted = "counted in characters; for tokens name --tokenizer, a directory, a hub id or tiny"
    else:
        tokenizer = load_tokenizer(name, template=options.template)
        rows = sources.read_source(options.source)
        documents = tokenize_cached(
            rows, tokenizer, supervise=options.supervise, max_tokens=options.max_tokens, console=Console()
        )
        made_with = {"tokenizer": name, "template": tokenizer.template.name, "max_tokens": options.max_tokens}
        description = {**describe(rows, documents), **made_with, "supervise": options.supervise}
        counted = f"tokenizer {name}, template {tokenizer.template.name}, rows cut at {options.max_tokens:,} tokens"
    if options.json:
        print(json.dumps(description, indent=2))  # ASCII, which steers no terminal
    else:
        print(printable(f"{description_table(description)}\n\n{counted}"))


if __name__ == "__main__":
    sys.exit(main())
