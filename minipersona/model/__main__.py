"""Hand a fine-tuned model to other tools: its adapter merged into the weights, as a Hugging Face directory.

python -m minipersona.model merge --adapter DIR --out DIR   (and more: --help)
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from minipersona.console import Console, Parser, answer, dispatch, positive
from minipersona.errors import UserError

EXAMPLE = """example:
  python -m minipersona.model merge --adapter runs/phase1/step-000375 --out merged
  python -m minipersona.model merge --model tiny --adapter runs/tiny_phase1/step-000040 --out merged --dtype float32
"""

# What a model directory holds beside weights and config.json, as far as the base has it.
BESIDE = (
    "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


PROMPT = "What is the most important thing to know about you?"


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; 0, or 2 after a line ``error: ...``."""
    return answer(lambda: dispatch(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m minipersona.model",
        description="Hand a fine-tuned model to other tools.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="merge")
    summary = "Merge a LoRA adapter into its base model and write a Hugging Face directory."
    command = commands.add_parser(
        "merge",
        help=summary,
        description=f"{summary} The sum is made in fp32. transformers loads the result.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=_merge)
    option = command.add_argument
    option("--model", metavar="M", help="directory, hub id or tiny (default: the base that the adapter names)")
    option("--revision", metavar="R", help="a hub revision (default: the adapter's, or the pinned one)")
    option(
        "--adapter", required=True, metavar="A", help="a PEFT adapter: a directory, such as step-000375, or a hub id"
    )
    option("--out", required=True, metavar="DIR", help="where to write; must not exist, or be empty")
    dtypes = "of the weights: bfloat16 (default), which rounds small updates away, or float32, which keeps them"
    option("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=dtypes)
    option("--shard-gb", type=positive(float), default=5.0, metavar="G", help="most gigabytes of one file (default 5)")
    return parser


def _merge(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; name a new directory, or empty it")

    # Imported here: --help and a misspelt option answer at once.
    import torch

    from minipersona.hub import locate
    from minipersona.model.adapter_files import choose_base, load_adapter
    from minipersona.model.load import RANDOM, load_model
    from minipersona.model.lora import merge_adapter, merge_and_compare
    from minipersona.model.save import save_model

    console = Console()
    name, revision = choose_base(options.adapter, options.model, options.revision, console.say)
    console.say(f"loading {name}")
    model = load_model(name, dtype=getattr(torch, options.dtype), device="cpu", revision=revision)
    load_adapter(model, options.adapter)
    beside = locate("tiny" if name.startswith(RANDOM) else name, BESIDE, revision=revision)
    if options.dtype == "float32":
        merge_adapter(model)
    else:
        prompt = _prompt(beside / "tokenizer.json", model.config.vocab_size)
        share = merge_and_compare(model, torch.tensor([prompt]))
        console.say(
            f"rounding to {options.dtype} changed the adapter's effect on the logits of a prompt by {share:.0%}"
            + ("; --dtype float32 keeps it" if share >= 0.005 else "")
        )
    extra = [beside / file for file in BESIDE if (beside / file).is_file()]
    save_model(model, out, extra_files=extra, shard_bytes=max(1, int(options.shard_gb * 1e9)))
    weights = list(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights)
    console.say(f"wrote {out}: {size / 1e9:.2f} GB of {options.dtype} weights in {len(weights)} file(s)")


def _prompt(tokenizer: Path, vocabulary: int) -> list[int]:
    """The ids of a prompt; where the base has no tokenizer, or not this model's, the first ids of the vocabulary."""
    from tokenizers import Tokenizer

    ids: list[int] = []
    with contextlib.suppress(Exception):  # tokenizers raises nothing narrower
        ids = Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids
    return ids if ids and max(ids) < vocabulary else list(range(min(vocabulary, 32)))


if __name__ == "__main__":
    sys.exit(main())
