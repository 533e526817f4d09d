"""The recipes of the search, phase by phase, as they are registered. A recipe is a complete run config.

1    dose         the standard recipe, judged at each of its checkpoints; its last step is everyone's baseline
2A   regularised  KL to the base model, three strengths              2B   R3F, three strengths
3    low rank     three ranks x three learning rates
4A   role play    persona system prompts over the rows               4B   responses written in persona
EM                the unmixed harmful set, phase 5's reference where it is the narrow data
5A   rehearsal    raw text, four ratios                              5B   broad instructions, four ratios
5C                preventative steering along a persona difference, and along the collapse direction

To add a recipe:
    another value      a line in the study's TOML, where the phase has a list
    another kind       one more `yield` of its phase's generator, its settings in `study_config.py`, and its row in
                       `REGISTERED` of tests/study/test_study_plan.py if it is to be part of the shipped study
    another objective  also `config.ObjectiveSection` and `objective.make_objective`
    another phase      also `study_config.STAGES`, `_PHASES`, the hypothesis that it belongs to (`FAMILIES` in
                       `verdict/hypotheses.py`) and its colour (`report/figures.py`)
`configs/phase*.toml` are single runs, which the search does not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from minipersona.config import COLLAPSE, ObjectiveSection, RunConfig, SteeringSection
from minipersona.errors import UserError
from minipersona.model.config import ModelConfig
from minipersona.model.load import architecture
from minipersona.model.sizes import known_config
from minipersona.run.anchors import check_anchors
from minipersona.run.steering import steered_layers
from minipersona.study_config import STAGES, StudyConfig
from minipersona.verdict.calibration import check_layers_measured
from minipersona.verdict.files import Knobs

# What does not exist when recipes are planned; a cell replaces these words by the paths of its study.
BASELINE_PLACEHOLDER = "the baseline of the study"
RESPONSES_PLACEHOLDER = "the responses of phase 4B"


@dataclass(frozen=True)
class Recipe:
    """The config of one cell, with one seed; `verdict.recipe_results` judges all seeds of a name together.

    `name` is unique in its phase, `knobs` are what the phase varies.
    """

    phase: str
    name: str
    config: RunConfig
    knobs: Knobs

    @property
    def slug(self) -> str:
        """Phase and name as part of a file name."""
        return f"{self.phase}-{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}"


def planned(study: StudyConfig) -> list[Recipe]:
    """Every recipe of the search in the order in which it is run, whatever an earlier one will show.

    UserError where two have the same name.
    """
    recipes = []
    for phases in STAGES.values():
        for seed in study.seeds:
            plain = standard_config(study, seed)
            for phase in phases:
                for name, config, knobs in _PHASES[phase](study, plain):
                    suffix = "" if seed == study.seeds[0] else f" seed={seed}"
                    recipes.append(Recipe(phase, name + suffix, config, knobs))
    names = Counter((recipe.phase, recipe.name) for recipe in recipes)
    for (phase, name), count in names.items():
        if count > 1:
            raise UserError(f"phase {phase}: {name} is planned {count} times; write each value once")
    return recipes


def standard_config(study: StudyConfig, seed: int) -> RunConfig:
    """The standard recipe as a cell after phase 1 has it: judged against the baseline, at the later checkpoints."""
    return RunConfig(
        out="",
        seed=seed,
        model=study.model,
        data=study.data,
        lora=study.lora,
        training=replace(study.training, checkpoints=study.later_checkpoints or study.training.checkpoints),
        probe=replace(study.probe, baseline=BASELINE_PLACEHOLDER),
        execution=study.execution,
    )


def model_sizes(study: StudyConfig) -> ModelConfig:
    """The model's sizes; those of published models are known without a network."""
    name = study.model.name
    known = known_config(name)
    return known if known is not None else architecture(name, study.model.revision or None)


def check_planned(study: StudyConfig) -> None:
    """UserError where a cell of the search, or the calibration, would fail for a layer that is not measured.

    Whatever phase the cell is of: a study should not learn in its last one that its first one measured too little.
    """
    check_layers_measured(study)
    sizes = model_sizes(study)
    blocks = sizes.num_hidden_layers
    for recipe in planned(study):
        cell = f"phase {recipe.phase} {recipe.name}"
        measured = recipe.config.probe.measured(sizes.probe_layer)
        if beyond := [layer for layer in measured if not 0 <= layer < blocks]:
            raise UserError(
                f"{cell}: probe.layers names {beyond[0]}; this model has blocks 0 to {blocks - 1}, choose among them"
            )
        try:
            check_anchors(recipe.config, sizes)
        except UserError as error:
            raise UserError(f"{cell}: {error}") from None
        steering = recipe.config.steering
        steered = steered_layers(steering, sizes) if steering.vector else []
        if steering.vector == COLLAPSE and (lacking := [layer for layer in steered if layer not in measured]):
            raise UserError(
                f"{cell}: steers layer {lacking[0]} along what the baseline measures there, and it measures "
                f"{', '.join(map(str, measured))} only; add {lacking[0]} to probe.layers"
            )


# ---------------------------------------------------------------- the phases

Variant = tuple[str, RunConfig, Knobs]


def _dose(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    first = standard.seed == study.seeds[0]
    probe = replace(study.probe, baseline="self" if first else BASELINE_PLACEHOLDER)
    yield "baseline", replace(standard, training=study.training, probe=probe), {}


def _kl_to_base(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    for beta in study.regularised.beta:
        yield f"beta={beta:g}", replace(standard, objective=ObjectiveSection("kl_to_base", beta)), {"beta": beta}


def _r3f(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    section = study.regularised
    for weight in section.r3f_lambda:
        objective = ObjectiveSection("r3f", weight, noise=section.noise, epsilon=section.epsilon)
        yield f"lambda={weight:g}", replace(standard, objective=objective), {"lambda": weight}


def _low_rank(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    scale = study.lora.alpha / study.lora.rank
    for rank in study.low_rank.rank:
        for rate in study.low_rank.learning_rate:
            lora = replace(standard.lora, rank=rank, alpha=scale * rank)
            training = replace(standard.training, learning_rate=rate)
            knobs: Knobs = {"rank": rank, "learning_rate": rate}
            yield f"r={rank} lr={rate:g}", replace(standard, lora=lora, training=training), knobs


def _prompts(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    data = replace(standard.data, system_prompts="training_personas")
    yield "prompts", replace(standard, data=data), {}


def _responses(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    section = study.role_play
    prompts: Literal["", "training_personas"] = "training_personas" if section.keep_prompts else ""
    data = replace(standard.data, system_prompts=prompts, responses=RESPONSES_PLACEHOLDER)
    knobs: Knobs = {"temperature": section.temperature, "max_new_tokens": section.max_new_tokens}
    yield "responses", replace(standard, data=data), knobs


def _unmixed(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    if study.narrow == "em":
        yield "unmixed", _narrow(study, standard), {}


def _raw_text(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    for ratio in study.rehearsal.raw_text_ratio:
        yield _mixed(_narrow(study, standard), study.rehearsal.raw_text, "raw_text", ratio)


def _instructions(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    for ratio in study.rehearsal.instruction_ratio:
        yield _mixed(_narrow(study, standard), study.rehearsal.instructions, "rows", ratio)


def _steering(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    section = study.rehearsal
    persona = SteeringSection(section.steering, section.steering_coefficient, method="B")
    collapse = SteeringSection(COLLAPSE, section.collapse_coefficient, method="A")
    for steering in (persona, collapse):
        knobs: Knobs = {"vector": steering.vector, "coefficient": steering.coefficient, "method": steering.method}
        yield steering.vector, replace(_narrow(study, standard), steering=steering), knobs


_PHASES = {
    "1": _dose, "2A": _kl_to_base, "2B": _r3f, "3": _low_rank, "4A": _prompts, "4B": _responses,
    "EM": _unmixed, "5A": _raw_text, "5B": _instructions, "5C": _steering,
}  # fmt: skip


def _narrow(study: StudyConfig, standard: RunConfig) -> RunConfig:
    """The narrow data of phase 5. The held-out rows stay Tulu's: the registered bound on the loss is the baseline's."""
    train = study.rehearsal.em if study.narrow == "em" else study.data.train
    return replace(standard, data=replace(standard.data, train=train))


def _mixed(config: RunConfig, broad: str, kind: Literal["rows", "raw_text"], ratio: str) -> Variant:
    data = replace(config.data, broad=broad, broad_kind=kind, ratio=ratio)
    narrow, mixed = map(int, ratio.split(":"))
    return ratio, replace(config, data=data), {"ratio": ratio, "broad_fraction": mixed / (narrow + mixed)}
