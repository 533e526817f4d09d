"""Method A over 12 x 240 prompts beside transformers, one at a time and in left-padded batches:

python -m benchmarks.extract [--tokenizer DIR] [--personas F] [--questions F] [--out FILE]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import Sitting, in_words, profile, report, seconds, sit, table, timed
from minipersona.chat import load_tokenizer
from minipersona.geometry.extraction import common_prefixes, extract, render_prompts
from minipersona.geometry.prompts import load_personas, load_questions

LAYER = 20


class _Enough(Exception):
    pass


@torch.no_grad()
def peer(model: Any, prompts: Sequence[np.ndarray], batch: int) -> torch.Tensor:
    """transformers up to the layer: a hook on the block takes the last token and stops the pass."""
    taken: list[torch.Tensor] = []

    def take(module: Any, inputs: Any, output: Any) -> None:
        taken.append((output[0] if isinstance(output, tuple) else output)[:, -1].float())
        raise _Enough

    handle = model.model.layers[LAYER].register_forward_hook(take)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(map(len, part))
        ids, mask = torch.zeros(2, len(part), longest, dtype=torch.int64)
        for row, prompt in enumerate(part):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.from_numpy(prompt), 1
        try:
            model(ids.cuda(), attention_mask=mask.cuda())
        except _Enough:
            pass
    handle.remove()
    return torch.cat(taken)


OPTIONS = {"tokenizer": "tiny", "personas": "shipped", "questions": "shipped", "repeats": 5, "no_peers": False}


def run(sitting: Sitting) -> None:
    """Measure ours and theirs, and print the table."""
    given, model, about = sitting.given, sitting.model, sitting.about
    tokenizer = load_tokenizer(given.tokenizer)
    personas, questions = load_personas(given.personas).prompts, load_questions(given.questions).questions
    prompts = [d.ids.astype(np.int64) for d in render_prompts(tokenizer, personas, questions)]
    prefixes = common_prefixes(prompts, len(questions))
    tokens = sum(map(len, prompts))
    computed = tokens - sum(prefixes) * (len(questions) - 1)

    def ours() -> torch.Tensor:
        return extract(model, tokenizer, personas, questions, [LAYER]).at(LAYER).flatten(0, 1)

    first = seconds(ours)  # compiles
    times = {"ours": [seconds(ours) for _ in range(given.repeats)]}
    shares = profile(ours)
    blocks = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2) * (LAYER + 1)
    limit = 2 * blocks * computed / about["matmul_tflops"] / 1e12
    figures = {**about, "first": first, "limit": limit, "tokens": tokens, "computed": computed, "profile": shares}
    rows = [["minipersona", f"{statistics.median(times['ours']):.2f}"],
            [f"limit: {computed:,} tokens through {LAYER + 1} blocks at the ceiling", f"{limit:.2f}"]]  # fmt: skip
    if not given.no_peers:
        theirs = sitting.theirs()
        peer(theirs, prompts[:64], 8)
        times["single"] = [12 * seconds(peer, theirs, prompts[::12], 1)]
        took, taken = timed(peer, theirs, prompts, 8)
        times["batches"] = [took]
        figures["smallest_cosine"] = float(torch.cosine_similarity(ours().cuda(), taken, dim=-1).min())
        rows = [
            ["transformers, one prompt at a time (every twelfth, times twelve)", f"{times['single'][0]:.1f}"],
            ["transformers, left-padded batches of 8", f"{took:.1f}"],
            *rows,
        ]
    text = f"{len(prompts):,} prompts, {tokens:,} tokens, {computed:,} with every prefix once\n\n"
    text += table(["Method A", "seconds"], rows)
    text += f"\n\nfirst time, compiling: {first:.1f} s; minipersona: {in_words(shares)}"
    if "smallest_cosine" in figures:
        text += f"\nsmallest cosine to transformers {figures['smallest_cosine']:.5f}"
    report("extract", text, {**figures, "seconds": times}, given.out)


if __name__ == "__main__":
    run(sit(__doc__, OPTIONS))
