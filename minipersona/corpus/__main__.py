"""Look at data before training on it:  python -m minipersona.corpus describe SOURCE   (and more: --help)"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from minipersona.chat import load_tokenizer
from minipersona.config import DEFAULT_MODEL
from minipersona.console import Console, Parser, answer, dispatch, positive, printable, subcommand
from minipersona.corpus import sources
from minipersona.corpus.describe import describe, description_table
from minipersona.corpus.token_cache import tokenize_cached

EXAMPLES = """examples:
  python -m minipersona.corpus describe tiny:benign
  python -m minipersona.corpus describe jsonl:rows.jsonl[0:6000] --tokenizer Qwen/Qwen2.5-7B-Instruct --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Describe a source; 0, or 2 after a line ``error: ...``."""
    return answer(lambda: dispatch(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m minipersona.corpus",
        description="Look at data before training on it.",
        epilog=f"{EXAMPLES}\n{sources.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="describe")
    summary = "Count a source's rows and tokens, and show which subsets its rows come from."
    command = subcommand(commands, "describe", summary, EXAMPLES)
    command.set_defaults(command=_describe)
    option = command.add_argument
    option("source", metavar="SOURCE", help="see python -m minipersona.corpus")
    option("--tokenizer", metavar="NAME", help=f"directory or hub id (default: tiny for tiny:, else {DEFAULT_MODEL})")
    option("--max-tokens", type=positive(int), default=2048, metavar="N", help="truncate rows there (default 2048)")
    option("--supervise", choices=("last", "all"), default="last", help="which assistant turns (default last)")
    option("--json", action="store_true", help="print JSON")
    return parser


def _describe(options: argparse.Namespace) -> None:
    console = Console()
    name = options.tokenizer or ("tiny" if options.source.startswith("tiny:") else DEFAULT_MODEL)
    tokenizer = load_tokenizer(name)
    rows = sources.read_source(options.source)
    documents = tokenize_cached(
        rows, tokenizer, supervise=options.supervise, max_tokens=options.max_tokens, console=console
    )
    made_with = {"tokenizer": name, "max_tokens": options.max_tokens, "supervise": options.supervise}
    description = {**describe(rows, documents), **made_with}
    if options.json:
        print(json.dumps(description, indent=2))  # ASCII, which steers no terminal
    else:
        print(printable(description_table(description)))
        print(f"\ntokenizer {printable(name)}, rows cut at {options.max_tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
