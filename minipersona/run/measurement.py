"""All that is measured of one model: its geometry and its held-out loss.

P = personas, Q = questions, D = width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from minipersona.chat import ChatTokenizer, Document
from minipersona.chat.tokenizer import Supervise
from minipersona.config import LARGE_PASS
from minipersona.console import Console
from minipersona.corpus.sources import Rows, read_source, tokenize
from minipersona.files import digest
from minipersona.geometry.extraction import check_layers, check_vocabulary, extract, render_prompts
from minipersona.geometry.measures import all_measures, m1
from minipersona.geometry.prompts import PersonaSet, QuestionSet, load_personas, load_questions
from minipersona.geometry.statistics import bootstrap_m1, noise_floor
from minipersona.geometry.vectors import PersonaVectors
from minipersona.model.network import Qwen2
from minipersona.run.result import LayerMeasures, Metrics, Protocol
from minipersona.training.heldout import heldout_loss


@dataclass(frozen=True)
class Instruments:
    """What a measurement is made with; equal instruments make comparable numbers."""

    tokenizer: ChatTokenizer
    personas: PersonaSet
    questions: QuestionSet
    layers: list[int]  # the first decides
    heldout: list[Document] | None
    heldout_rows: Rows | None
    max_tokens: int
    pack_tokens: int
    compiled: bool

    @cached_property
    def prompts(self) -> list[Document]:
        """Those of all personas at all questions. A measurement of a small model would take longer to render them."""
        return render_prompts(self.tokenizer, self.personas.prompts, self.questions.questions)

    def protocol(self, model: Qwen2) -> Protocol:
        """The record of a measurement of this model, or of what is trained from it, with these instruments."""
        rows = self.heldout_rows
        return Protocol(
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
    compiled: bool = False,
) -> Instruments:
    """Read and check everything that a measurement needs. Of `layers` the first decides."""
    check_vocabulary(model, tokenizer)
    rows = read_source(heldout) if heldout else None
    return Instruments(
        tokenizer=tokenizer,
        personas=load_personas(personas),
        questions=load_questions(questions),
        layers=check_layers(model, layers),
        heldout=None if rows is None else tokenize(rows, tokenizer, supervise=supervise, max_tokens=max_tokens),
        heldout_rows=rows,
        max_tokens=max_tokens,
        pack_tokens=pack_tokens,
        compiled=compiled,
    )


def measure(model: Qwen2, instruments: Instruments, console: Console) -> tuple[Metrics, PersonaVectors]:
    """The metrics of a model as it stands (adapters as they are), and the vectors that they come from."""
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
    loss = None
    if instruments.heldout is not None:
        loss = heldout_loss(model, instruments.heldout, instruments.pack_tokens, instruments.compiled)
    metrics = Metrics(
        **vars(measures),
        layer=instruments.layers[0],
        m1_low=low,
        m1_high=high,
        m1_noise_floor=noise_floor(deciding),
        m1_by_layer={str(layer): m1(vectors.mean(layer)) for layer in instruments.layers},
        eval_loss=loss,
    )
    return metrics, vectors


def layer_measures(samples: Tensor) -> LayerMeasures:
    """All that is measured of one layer's samples, (P, Q, D)."""
    return LayerMeasures(
        **vars(all_measures(samples)), m1_ci95=bootstrap_m1(samples), m1_noise_floor=noise_floor(samples)
    )
