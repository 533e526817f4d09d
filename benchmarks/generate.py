"""Greedy generation beside transformers, and Method B's seconds:

    python -m benchmarks.generate [--new 256] [--tokenizer DIR] [--out FILE]

Every completion runs to its full length, so that both generate as many tokens. Prompts are of 60 to 120 tokens, and
computing them is part of the time, but for "token steps alone": the tokens beyond the 64th over the time they add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    GIB,
    Sitting,
    free,
    in_words,
    profile,
    report,
    sit,
    table,
    timed,
)
from minipersona.chat import load_tokenizer
from minipersona.geometry.extraction import extract
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.generation import Request, generate
from minipersona.model.network import Qwen2

SHORT = 64  # new tokens a prompt in the comparison


def ours(model: Qwen2, prompts: Sequence[np.ndarray], new: int, batch: int) -> np.ndarray:
    """(prompts, new) tokens."""
    requests = [Request(prompt, new) for prompt in prompts]
    return np.stack([c.ids for c in generate(model, requests, stop=(), batch=batch)])


@torch.no_grad()
def peer(model: Any, prompts: Sequence[np.ndarray], new: int) -> np.ndarray:
    """transformers' generate with its dynamic cache, left-padded."""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.from_numpy(prompt), 1
    out = model.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=new, min_new_tokens=new,
                         do_sample=False, pad_token_id=0)  # fmt: skip
    return out[:, longest:].cpu().numpy()


def diverged(a: np.ndarray, b: np.ndarray) -> float:
    """The share of tokens at and after the first that differs, in each row."""
    return float((np.cumsum(a != b, axis=1) > 0).mean())


OPTIONS = {"new": 256, "tokenizer": "tiny", "personas": "shipped", "questions": "shipped", "no_peers": False}


def run(sitting: Sitting) -> None:
    """Measure ours and theirs, and print the table."""
    given, model, about = sitting.given, sitting.model, sitting.about
    tokenizer = load_tokenizer(given.tokenizer)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.config.vocab_size, int(n)) for n in rng.integers(60, 120, 512)]
    theirs = None if given.no_peers else sitting.theirs()
    found: dict[str, dict[str, Any]] = {}
    for batch in (64, 256, 512):
        free()
        part = prompts[:batch]
        ours(model, part, 2 * SHORT, batch)  # compiles
        short, _ = timed(ours, model, part, SHORT, batch)
        whole, tokens = timed(ours, model, part, given.new, batch)
        row: dict[str, Any] = {
            "short": batch * SHORT / short,
            "whole": tokens.size / whole,
            "steps": batch * (given.new - SHORT) / (whole - short),
            "gib": torch.cuda.max_memory_allocated() / GIB - sitting.beside,
        }
        if theirs is not None:
            free()
            took, said = timed(peer, theirs, part, SHORT)
            row["theirs"] = said.size / took
            row["diverged_from_theirs"] = diverged(tokens[:, :SHORT], said)
        if batch == 256:
            row["diverged_from_batch_64"] = diverged(tokens[:64], ours(model, prompts[:64], given.new, 64))
            row["profile"] = profile(ours, model, part, given.new, batch)
        found[str(batch)] = row
        print(batch, row, flush=True)
    personas, questions = load_personas(given.personas).prompts, load_questions(given.questions).questions
    method_b, vectors = timed(extract, model, tokenizer, personas, questions, [20], "B")
    mean = float(vectors.response_tokens.double().mean()) if vectors.response_tokens is not None else 0.0
    weights = 2 * model.config.matmul_parameters  # bytes to read a step, and operations a token
    rows = []
    for batch, row in found.items():
        limit = int(batch) / max(
            weights / (about["copy_tb_per_s"] * 1e12), weights * int(batch) / (about["matmul_tflops"] * 1e12)
        )
        shown = [f"{row[key]:,.0f}" if key in row else "-" for key in ("theirs", "short", "whole", "steps")]
        rows.append([batch, *shown, f"{limit:,.0f}", f"{row['gib']:.1f}"])
    columns = ["batch", f"transformers, {SHORT} new", f"minipersona, {SHORT} new", f"{given.new} new",
               "token steps alone", "limit", "GiB"]  # fmt: skip
    text = f"Tokens a second.\n\n{table(columns, rows)}\n\n"
    text += f"Method B, {len(personas)} x {len(questions)}: {method_b:.1f} s, responses of {mean:.0f} tokens\n"
    text += f"batch 256: {in_words(found['256']['profile'])}"
    report("generate", text, {**about, "rows": found, "method_b_seconds": method_b}, given.out)


if __name__ == "__main__":
    run(sit(__doc__, OPTIONS))
