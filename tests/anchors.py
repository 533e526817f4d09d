"""Contexts of random tokens, and anchored objectives on them: KL over prompts, over responses, and with features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from conftest import SIZES
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import ObjectiveSection
from minipersona.corpus.batch import Batch, make_batch
from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Anchored, Contexts, base_states, predicting_states
from minipersona.objective.feature_anchor import FeatureAnchor, scales
from minipersona.objective.feature_and_kl import FeatureAndKL
from minipersona.objective.gram_anchor import GramAnchor
from minipersona.objective.kl_on_prompts import KLOnPrompts

RESPONSES = "kl_on_responses"  # kind = "kl_on_prompts" with `anchor_responses`
BOTH = "feature_and_kl"  # over responses, with states relative to their spread
KINDS = ("feature_anchor", "kl_on_prompts", RESPONSES, BOTH, "gram_anchor")
KL = ("kl_on_prompts", RESPONSES, BOTH)  # a part of these at least
KL_FACTOR = 1.5
PERSONAS, QUESTIONS, PER_STEP = 4, 6, 9  # the Gram anchor takes two questions a step
LAYERS = (0, 1)


def section(kind: str, weight: float) -> ObjectiveSection:
    """The config's, for a kind of this file or without an anchor."""
    if kind == RESPONSES:
        return ObjectiveSection("kl_on_prompts", weight, anchor_responses=5)
    if kind == BOTH:
        return ObjectiveSection(BOTH, weight, anchor_responses=5, anchor_scale="spread", kl_factor=KL_FACTOR)
    return ObjectiveSection(kind, weight)  # type: ignore[arg-type]


def kind_of(objective: ObjectiveSection) -> str:
    """The inverse."""
    return RESPONSES if objective.anchor_responses and objective.kind == "kl_on_prompts" else objective.kind


def random_contexts(kind: str, seed: int = 42) -> Contexts:
    """Prompts of 3 to 11 tokens, without states of the base. With responses, their last 1 to 5 tokens are these."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, 12, PERSONAS * QUESTIONS)
    ids = [rng.integers(0, SIZES.vocab_size, n).astype(np.int32) for n in lengths]
    contexts = Contexts(ids, PERSONAS, PER_STEP, seed, by_question=kind == "gram_anchor")
    if kind not in (RESPONSES, BOTH):
        return contexts
    return replace(contexts, responses=[np.arange(n) >= n - min(n - 1, 1 + k % 5) for k, n in enumerate(lengths)])


def held_rows(contexts: Contexts, context: int) -> slice:
    """Of a context's rows, those whose predictions KL compares."""
    if not contexts.responses:
        return slice(None)
    response = np.flatnonzero(contexts.responses[context])
    return slice(int(response[0]) - 1, int(response[-1]))


def with_base(contexts: Contexts, base: Qwen2, layers: Sequence[int] = LAYERS, steps: int = 9) -> Contexts:
    """The same with the states of `base`, which is a model without adapters, at the prompts."""
    prompts = contexts
    if contexts.responses:
        prompts = replace(contexts, ids=[ids[~r] for ids, r in zip(contexts.ids, contexts.responses, strict=True)])
    states = base_states(base, replace(prompts, responses=()), layers, steps, pack_tokens=60)
    return replace(contexts, base=states, scale=scales(states, "spread" if contexts.responses else "state"))


def with_predictions(contexts: Contexts, base: Qwen2, steps: int = 9) -> Contexts:
    """The same with what the predictions of `base` follow from."""
    return replace(contexts, predicting=predicting_states(base, contexts, steps, pack_tokens=60))


def contexts_of(kind: str, base: Qwen2, steps: int = 9) -> Contexts:
    """Random contexts with what an objective of this kind reads of `base`."""
    contexts = random_contexts(kind)
    if kind in KL:
        contexts = with_predictions(contexts, base, steps)
    return with_base(contexts, base, steps=steps) if kind == BOTH or kind not in KL else contexts


def anchored(kind: str, weight: float, base: Qwen2, head: Tensor | None = None) -> Anchored:
    """An objective that holds a model near `base`; `head` is the base's where all weights learn."""
    contexts = contexts_of(kind, base)
    if kind == BOTH:
        return FeatureAndKL(weight, contexts, head, KL_FACTOR)
    if kind in KL:
        return KLOnPrompts(weight, contexts, head)
    return (FeatureAnchor if kind == "feature_anchor" else GramAnchor)(weight, contexts)


def step_batch(
    objective: Anchored, documents: Sequence[Document], step: int = 7, pack_tokens: int = 10_000, rank: int = 0,
    size: int = 1,
) -> Batch:  # fmt: skip
    """All documents and the contexts of a step."""
    rows = make_batch(documents, range(len(documents)), pack_tokens, rank, size)
    return objective.contexts.join(rows, step, pack_tokens, rank, size)
