"""Contexts of random tokens, and the three anchored objectives on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from conftest import SIZES

from minipersona.chat import Document
from minipersona.corpus.batch import Batch, make_batch
from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Anchored, Contexts, base_states
from minipersona.objective.feature_anchor import FeatureAnchor
from minipersona.objective.gram_anchor import GramAnchor
from minipersona.objective.kl_on_prompts import KLOnPrompts

KINDS = ("feature_anchor", "kl_on_prompts", "gram_anchor")
PERSONAS, QUESTIONS, PER_STEP = 4, 6, 9  # the Gram anchor takes two questions a step
LAYERS = (0, 1)


def random_contexts(kind: str, seed: int = 42) -> Contexts:
    """Prompts of 3 to 11 tokens, without states of the base."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, 12, PERSONAS * QUESTIONS)
    ids = [rng.integers(0, SIZES.vocab_size, n).astype(np.int32) for n in lengths]
    return Contexts(ids, PERSONAS, PER_STEP, seed, by_question=kind == "gram_anchor")


def with_base(contexts: Contexts, base: Qwen2, layers: Sequence[int] = LAYERS, steps: int = 9) -> Contexts:
    """The same with the states of `base`, which is a model without adapters."""
    return replace(contexts, base=base_states(base, contexts, layers, steps, pack_tokens=60))


def anchored(kind: str, weight: float, base: Qwen2, frozen: Qwen2 | None = None) -> Anchored:
    """An objective that holds a model near `base`; `frozen` is what KL applies in its place where all weights learn."""
    contexts = random_contexts(kind)
    if kind == "kl_on_prompts":
        return KLOnPrompts(weight, contexts, frozen)
    return (FeatureAnchor if kind == "feature_anchor" else GramAnchor)(weight, with_base(contexts, base))


def step_batch(
    objective: Anchored, documents: Sequence[Document], step: int = 7, pack_tokens: int = 10_000, rank: int = 0,
    size: int = 1,
) -> Batch:  # fmt: skip
    """All documents and the contexts of a step."""
    rows = make_batch(documents, range(len(documents)), pack_tokens, rank, size)
    return objective.contexts.join(rows, step, pack_tokens, rank, size)
