"""Does a recipe keep the geometry of personas that it was not chosen by? M1 on every persona set, at every layer.

A recipe is chosen by M1 over twelve personas at one layer, and M1 differs more between sets of personas than by
anything else. So a confirmed recipe is measured on the study's own set, the shipped and the registered one and those
that the config names, beside base and baseline, with every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from minipersona.config import SHIPPED, ProbeSection
from minipersona.errors import UserError
from minipersona.geometry.extraction import extract
from minipersona.geometry.measures import m1, variances
from minipersona.geometry.prompts import REGISTERED, PersonaSet, QuestionSet, load_personas, load_questions
from minipersona.model.network import Qwen2
from minipersona.run.measurement import Instruments
from minipersona.study.cell import Cell, Study
from minipersona.study.worker import Worker
from minipersona.verdict.files import ModelOnSet, SetTransfer, Transfer

OWN = (
    "study"  # what the study's own set is called here; "shipped" and "registered" are left out where they are the same
)


class Sets(NamedTuple):
    """Personas and the questions that they are asked."""

    personas: PersonaSet
    questions: QuestionSet

    @property
    def digests(self) -> tuple[str, str]:
        """By which two are the same, whatever they are called."""
        return self.personas.digest, self.questions.digest


def measure_transfer(study: Study, cell: Cell, step: int, worker: Worker) -> Transfer:
    """Base, baseline and a cell at a step on every set that there is."""
    config, baseline = study.baseline.recipe.config, study.scaled_for(cell)
    instruments = worker.resources.instruments(config)
    sets, missing = persona_sets(config.probe, study.config.transfer.personas)
    steps = config.training.steps

    def on_sets(model: Qwen2) -> dict[str, ModelOnSet]:
        return {name: on_set(model, instruments, asked) for name, asked in sets.items()}

    def trained(cell: Cell, step: int) -> Qwen2:
        return worker.trained_model(study.placed_config(cell), study.cell_directory(cell), step)

    def once(of: str, model: Callable[[], Qwen2]) -> dict[str, ModelOnSet]:
        """Of a model beside which this process measures several cells."""
        return worker.resources.keep(f"{of} on other personas", (config, sets), lambda: on_sets(model()))

    base = once("base", lambda: worker.resources.base(config))
    ours = once(baseline.hash, lambda: trained(baseline, steps))
    recipe = on_sets(trained(cell, step))
    return Transfer(
        baseline=baseline.hash,
        cell=cell.hash,
        step=step,
        layer=instruments.layers[0],
        sets={
            name: SetTransfer(
                personas=asked.personas.name,
                personas_digest=asked.personas.digest,
                questions=asked.questions.name,
                questions_digest=asked.questions.digest,
                base=base[name],
                baseline=ours[name],
                recipe=recipe[name],
            )
            for name, asked in sets.items()
        },
        missing=missing,
    )


def persona_sets(probe: ProbeSection, more: Sequence[str] = ()) -> tuple[dict[str, Sets], dict[str, str]]:
    """Every set that there is, each once, and why another is missing: nothing has to be fetched for a study."""
    sets: dict[str, Sets] = {}
    missing = {}
    for name, personas, questions in (
        (OWN, probe.personas, probe.questions),
        (SHIPPED, SHIPPED, SHIPPED),
        (REGISTERED, REGISTERED, REGISTERED),
        *((Path(file).stem, file, probe.questions) for file in more),
    ):
        try:
            found = Sets(load_personas(personas), load_questions(questions))
        except UserError as error:
            missing[name] = str(error)
            continue
        if not any(found.digests == other.digests for other in sets.values()):
            sets[name] = found
    return sets, missing


def covers_every_set(study: Study, measured: Transfer) -> bool:
    """Whether nothing is left to measure: every set that there is, as it is now, is among those that were measured."""
    sets, _ = persona_sets(study.baseline.recipe.config.probe, study.config.transfer.personas)
    known = {(one.personas_digest, one.questions_digest) for one in measured.sets.values()}
    return {asked.digests for asked in sets.values()} <= known


def on_set(model: Qwen2, instruments: Instruments, asked: Sets) -> ModelOnSet:
    """M1 of a model at every layer, and the variances at the deciding one."""
    vectors = extract(
        model,
        instruments.tokenizer,
        asked.personas.prompts,
        asked.questions.questions,
        range(model.config.num_hidden_layers),
        pack_tokens=instruments.pack_tokens,
    )
    between, within = variances(vectors.at(instruments.layers[0]))
    return ModelOnSet({str(layer): m1(vectors.mean(layer)) for layer in vectors.layers}, between, within)
