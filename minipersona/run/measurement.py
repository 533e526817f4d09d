"""All that is measured of one model: its geometry, and its loss on held-out rows as they are and under personas.

P = personas, Q = questions, D = width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from minipersona.chat import ChatTokenizer, Document
from minipersona.chat.tokenizer import Supervise
from minipersona.config import LARGE_PASS
from minipersona.console import Console
from minipersona.corpus.mixtures import with_prompt
from minipersona.corpus.sources import Rows, read_source, tokenize
from minipersona.files import digest
from minipersona.geometry.extraction import check_layers, check_vocabulary, extract, render_prompts
from minipersona.geometry.measures import all_measures, m1, m1_by_persona, m1_without
from minipersona.geometry.prompts import PersonaSet, QuestionSet, load_personas, load_questions
from minipersona.geometry.statistics import bootstrap_m1, noise_floor
from minipersona.geometry.vectors import PersonaVectors
from minipersona.model.network import Qwen2
from minipersona.run.losses import HeldoutLosses
from minipersona.run.result import LayerMeasures, MeasurementProtocol, Metrics
from minipersona.training.heldout import document_losses


@dataclass(frozen=True)
class Instruments:
    """What a measurement is made with; equal instruments make comparable numbers."""

    tokenizer: ChatTokenizer
    personas: PersonaSet
    questions: QuestionSet
    layers: list[int]  # the first decides
    heldout: list[Document] | None
    heldout_under_personas: list[Document] | None  # row i with the system prompt of persona i mod P
    heldout_rows: Rows | None
    max_tokens: int
    supervise: Supervise
    pack_tokens: int

    @cached_property
    def prompts(self) -> list[Document]:
        """Those of all personas at all questions. A measurement of a small model would take longer to render them."""
        return render_prompts(self.tokenizer, self.personas.prompts, self.questions.questions)

    def protocol(self, model: Qwen2) -> MeasurementProtocol:
        """The record of a measurement of this model, or of what is trained from it, with these instruments."""
        rows = self.heldout_rows
        return MeasurementProtocol(
            model=model.source.get("name"),
            revision=model.source.get("revision"),
            compute_dtype=str(model.compute_dtype).removeprefix("torch."),
            layer=self.layers[0],
            layers=tuple(self.layers),
            layer_convention="residual stream leaving decoder block, counted from 0 (hidden_states[layer + 1])",
            method="A",
            persona_set=self.personas.name,
            persona_digest=self.personas.digest,
            question_set=self.questions.name,
            question_digest=self.questions.digest,
            heldout=None if rows is None else rows.source,
            heldout_digest=None if rows is None else digest(rows.rows),
            max_tokens=self.max_tokens,
            tokenizer_digest=self.tokenizer.digest,
            supervise=self.supervise,
            weights=model.source.get("weights"),
        )


def make_instruments(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    *,
    personas: str,
    questions: str,
    layers: Sequence[int],
    heldout: str | None,
    max_tokens: int = 2048,
    supervise: Supervise = "last",
    pack_tokens: int = LARGE_PASS,
) -> Instruments:
    """Read and check everything that a measurement needs. Of `layers` the first decides."""
    check_vocabulary(model, tokenizer)
    rows, persona_set = read_source(heldout) if heldout else None, load_personas(personas)

    def tokenized(rows: Rows) -> list[Document]:
        return tokenize(rows, tokenizer, supervise=supervise, max_tokens=max_tokens)

    return Instruments(
        tokenizer=tokenizer,
        personas=persona_set,
        questions=load_questions(questions),
        layers=check_layers(model, layers),
        heldout=None if rows is None else tokenized(rows),
        heldout_under_personas=None if rows is None else under_personas(rows, persona_set, tokenized),
        heldout_rows=rows,
        max_tokens=max_tokens,
        supervise=supervise,
        pack_tokens=pack_tokens,
    )


def under_personas(rows: Rows, personas: PersonaSet, tokenized: Callable[[Rows], list[Document]]) -> list[Document]:
    """Row i with the system prompt of persona i mod P, in place of its own; raw text, which has none, is empty."""
    prompts = list(personas.prompts.values())
    chats = [i for i, row in enumerate(rows.rows) if "messages" in row]
    documents = [Document(np.empty(0, np.int32), np.empty(0, np.bool_), truncated=False)] * len(rows)
    prompted = replace(rows, rows=[with_prompt(rows.rows[i], prompts[i % len(prompts)]) for i in chats])
    for i, document in zip(chats, tokenized(prompted), strict=True):
        documents[i] = document
    return documents


def measure(
    model: Qwen2, instruments: Instruments, console: Console
) -> tuple[Metrics, PersonaVectors, HeldoutLosses | None]:
    """The metrics of a model as it stands (adapters as they are), and the vectors and losses that they come from."""
    prompts = len(instruments.personas.prompts) * len(instruments.questions.questions)
    with console.progress("extracting", prompts, "prompts") as progress:
        vectors = extract(
            model,
            instruments.tokenizer,
            instruments.personas.prompts,
            instruments.questions.questions,
            instruments.layers,
            pack_tokens=instruments.pack_tokens,
            progress=lambda done, total: progress.advance(done),
            prompts=instruments.prompts,
        )
    deciding = vectors.samples[instruments.layers[0]]  # (P, Q, D)
    measures = all_measures(deciding)  # before the loss: UserError where the model has diverged
    low, high = bootstrap_m1(deciding)
    losses = heldout_losses(model, instruments)
    vectors_there = vectors.mean(instruments.layers[0])  # (P, D)
    metrics = Metrics(
        **vars(measures),
        layer=instruments.layers[0],
        m1_low=low,
        m1_high=high,
        m1_noise_floor=noise_floor(deciding),
        m1_by_layer={str(layer): m1(vectors.mean(layer)) for layer in instruments.layers},
        m1_by_persona=by_name(instruments.personas, m1_by_persona(vectors_there)),
        m1_without=by_name(instruments.personas, m1_without(vectors_there)),
        eval_loss=None if losses is None else losses.eval_loss,
        persona_loss=None if losses is None else losses.persona_loss,
    )
    return metrics, vectors, losses


def heldout_losses(model: Qwen2, instruments: Instruments) -> HeldoutLosses | None:
    """The loss of every held-out row, as it is and under its persona; None without such rows."""
    plain, prompted = instruments.heldout, instruments.heldout_under_personas
    if plain is None or prompted is None:
        return None
    nats, tokens = document_losses(model, [*plain, *prompted], instruments.pack_tokens)  # one set of packs
    rows = len(plain)
    return HeldoutLosses(nats[:rows], tokens[:rows], nats[rows:], tokens[rows:])


def by_name(personas: PersonaSet, values: Tensor | None) -> dict[str, float] | None:
    """(P,) values by the personas' names."""
    return None if values is None else dict(zip(personas.prompts, values.tolist(), strict=True))


def layer_measures(samples: Tensor) -> LayerMeasures:
    """All that is measured of one layer's samples, (P, Q, D)."""
    return LayerMeasures(
        **vars(all_measures(samples)), m1_ci95=bootstrap_m1(samples), m1_noise_floor=noise_floor(samples)
    )
