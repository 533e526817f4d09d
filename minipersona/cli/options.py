"""What several commands share: their options, loading the model that these name, and printing the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minipersona.config import DEFAULT_MODEL
from minipersona.console import Console, printable, subcommand
from minipersona.errors import UserError

if TYPE_CHECKING:
    from minipersona.chat import ChatTokenizer
    from minipersona.model.network import Qwen2

FORMS = """files for --personas and --questions:
  personas.json    {"eval_personas": {"pirate": "You are a pirate.", "poet": "You are a poet."}}
  questions.jsonl  {"question": "What is courage?"}, one a line; questions.json: a list of texts
  questions.txt    one question a line"""


def command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a command to what `add_subparsers` returned."""
    parser = subcommand(commands, name, summary, f"example:\n{example}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(parser=parser)
    return parser


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """UserError for the first of these options that was given, where it would have no effect."""
    for name in names:
        key = name.removeprefix("--").replace("-", "_")
        if getattr(options, key) != options.parser.get_default(key):
            raise UserError(f"{name}: {why}")


OF_A_MODEL = ("--model", "--revision", "--tokenizer", "--template", "--personas", "--questions", "--adapter")


def model_options(parser: argparse.ArgumentParser) -> None:
    """Which model is measured, and with what."""
    option = parser.add_argument
    default = f"the base that --adapter names, else {DEFAULT_MODEL}"
    option("--model", metavar="M", help=f"directory, hub id, tiny or random:<hub id> (default: {default})")
    option("--revision", metavar="R", help="a hub revision (default: the adapter's, or pinned for the 7B)")
    option("--tokenizer", metavar="DIR", help="another tokenizer than the model's")
    option("--template", metavar="NAME", help="chat template by name, such as llama3.1; default the model's own")
    option("--personas", default="", metavar="F", help="shipped (default), registered, or a file")
    option("--questions", default="", metavar="F", help="shipped (default), registered, or a file")
    option("--adapter", metavar="A", help="a PEFT adapter to attach to the model: a directory or a hub id")


def load(options: argparse.Namespace, console: Console) -> tuple[Qwen2, ChatTokenizer]:
    """The model that the options or else the adapter name, without the adapter, and its tokenizer."""
    from minipersona.chat import load_tokenizer
    from minipersona.model.adapter_files import choose_base
    from minipersona.model.load import load_model

    name, revision = options.model or DEFAULT_MODEL, options.revision
    if options.adapter:
        name, revision = choose_base(options.adapter, options.model, revision, console.say)
    console.say(f"loading {name}")
    of_tokenizer = None if options.tokenizer else revision
    tokenizer = load_tokenizer(options.tokenizer or name, revision=of_tokenizer, template=options.template)
    return load_model(name, revision=revision), tokenizer


def show(options: argparse.Namespace, value: dict[str, Any], text: str) -> None:
    """Print a result: `value` as JSON with --json, else the `text`."""
    print(json.dumps(value, indent=2) if options.json else printable(text))  # ASCII cannot steer a terminal
