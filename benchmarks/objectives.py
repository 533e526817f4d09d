"""The registered recipe's step under every objective of the study, with activation checkpointing or without it:

python -m benchmarks.objectives --tokenizer DIR [--objectives "Gram anchor,KL on prompts"] [--objective-steps 20]
    [--no-checkpointing] [--out FILE]

An anchor's prompts are as long as the tokenizer makes them. Take the model's own: the embedded model's, which is the
default, makes a fifth more tokens of them than Qwen2.5's.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import Sitting, documents, in_words, report, sit, table
from benchmarks.sft import BATCH, ours
from minipersona.chat import load_tokenizer
from minipersona.config import ObjectiveSection

LAYER = 20
MOST = {"cross-entropy": 1.0, "KL to base": 1.6, "R3F": 2.2, "steering": 1.03, "feature anchor": 1.2,
        "Gram anchor": 1.2, "KL on prompts": 1.2, "features and KL": 1.2}  # times cross-entropy's step  # fmt: skip


OPTIONS = {"objective_steps": 20, "no_checkpointing": False, "tokenizer": "tiny", "objectives": ",".join(MOST)}


def run(sitting: Sitting) -> None:
    """Measure every objective and print the table."""
    given, model, about = sitting.given, sitting.model, sitting.about
    docs = documents(given.objective_steps * BATCH, model.config.vocab_size)
    direction = torch.randn(model.config.hidden_size)
    found: dict[str, dict[str, Any]] = {}
    for name, section, steering in (
        ("cross-entropy", None, None),
        ("KL to base", ObjectiveSection("kl_to_base", 0.01), None),
        ("R3F", ObjectiveSection("r3f", 0.01), None),
        ("steering", None, {LAYER: direction}),
        ("feature anchor", ObjectiveSection("feature_anchor", 1.0), None),
        ("Gram anchor", ObjectiveSection("gram_anchor", 1.0), None),
        ("KL on prompts", ObjectiveSection("kl_on_prompts", 1.0), None),
        ("features and KL", ObjectiveSection("feature_and_kl", 1.0, contexts=8, anchor_responses=64), None),  # phase 6K
    ):
        if name not in ("cross-entropy", *given.objectives.split(",")):
            continue
        found[name] = ours(
            model, docs, given.objective_steps, not given.no_checkpointing, section, steering,
            tokenizer=load_tokenizer(given.tokenizer),
        )  # fmt: skip
        found[name]["gib"] -= sitting.beside
        print(name, found[name]["median_step"], found[name]["gib"], in_words(found[name]["profile"]), flush=True)
    plain = found["cross-entropy"]
    rows = [
        [
            name,
            f"{row['median_step'] * 1e3:.0f}",
            f"{plain['tokens_per_second'] / row['tokens_per_second']:.2f}",
            f"{MOST[name]:.2f}",
            f"{row['gib']:.1f}",
            f"{row['gib'] - plain['gib']:+.1f}",
        ]
        for name, row in found.items()
    ]
    columns = ["objective", "ms, median", "times cross-entropy, by tokens/s", "at most", "GiB", "beyond it"]
    report("objectives", table(columns, rows), {**about, "rows": found}, given.out)


if __name__ == "__main__":
    run(sit(__doc__, OPTIONS))
