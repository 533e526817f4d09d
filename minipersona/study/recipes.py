"""The recipes of the search, phase by phase, as they are registered. A recipe is a complete run config.

1    dose         the standard recipe, judged at each of its checkpoints; its last step is everyone's baseline
2A   regularised  KL to the base model, three strengths              2B   R3F, three strengths
3    low rank     three ranks x three learning rates
4A   role play    persona system prompts over the rows               4B   responses written in persona
EM                the unmixed harmful set, phase 5's reference where it is the narrow data
5A   rehearsal    raw text, four ratios                              5B   broad instructions, four ratios
5C                preventative steering along a persona difference, and along the collapse direction
6A to 6Z          beyond the registered phases: the `[[recipe]]` tables of the study's TOML

Beside the registered recipes, the phases hold what they are compared with and checked by, each with its role.

To add a recipe:
    of settings that a run has  a `[[recipe]]` table in the study's TOML
    another value of a phase    a line there, where the phase has a list
    another objective           also `config.ObjectiveSection` and `objective.make_objective`
`configs/phase*.toml` are single runs, which the search does not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.questions import load_questions
from minipersona.config import COLLAPSE, SHIPPED, STEERING_RANDOM, ObjectiveSection, RunConfig, SteeringSection
from minipersona.corpus.mixtures import TRAINING_PERSONAS
from minipersona.errors import Unreachable, UserError, require
from minipersona.files import data_dir, user_path
from minipersona.geometry.prompts import load_personas
from minipersona.geometry.prompts import load_questions as load_asked
from minipersona.model.load import architecture_offline
from minipersona.records import unknown_key
from minipersona.run.anchors import anchor_sets, check_anchors, check_unmeasured
from minipersona.run.steering import steered_layers
from minipersona.settings import difference, flatten, with_settings
from minipersona.study_config import BEYOND, SEED_SUFFIX, SHARED, STAGES, RecipeSection, Role, StudyConfig
from minipersona.verdict.calibration import check_layers_measured
from minipersona.verdict.files import Knobs
from minipersona.verdict.results import BASELINE

# What does not exist when recipes are planned; a cell replaces these words by the paths of its study.
BASELINE_PLACEHOLDER = "the baseline of the study"
UNMIXED_PLACEHOLDER = "the unmixed cell of the study"
RESPONSES_PLACEHOLDER = "study:role_play"  # what the base model writes in persona
REWRITTEN_PLACEHOLDER = "study:rewritten"  # what it writes anew, given the rows' own
WRITTEN = (RESPONSES_PLACEHOLDER, REWRITTEN_PLACEHOLDER)  # any other data.responses is a file of the user's


@dataclass(frozen=True)
class Recipe:
    """The config of one cell, with one seed; `verdict.recipe_results` judges all seeds of a name together.

    `name` is unique in its phase, `knobs` are what the phase varies, `role` is why the recipe is run.
    """

    phase: str
    name: str
    config: RunConfig
    knobs: Knobs
    role: Role = "registered"

    @property
    def bare_name(self) -> str:
        """The name without the seed."""
        return re.sub(SEED_SUFFIX, "", self.name)

    @property
    def is_baseline(self) -> bool:
        """Whether it is the standard recipe, with whatever seed."""
        return (self.phase, self.bare_name) == BASELINE

    @property
    def is_unmixed(self) -> bool:
        """Whether it is trained on the harmful rows alone, with whatever seed."""
        return self.phase == "EM"

    @property
    def against_unmixed(self) -> bool:
        """Whether it is judged against the cell that is, and not against the baseline."""
        return self.config.probe.baseline == UNMIXED_PLACEHOLDER

    @property
    def slug(self) -> str:
        """Phase and name as part of a file name."""
        return f"{self.phase}-{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}"


def planned(study: StudyConfig) -> list[Recipe]:
    """Every recipe of the search in the order in which it is run, whatever an earlier one will show.

    UserError where two have the same name, or where a `[[recipe]]` table sets what does not exist or equals another.
    """
    recipes = []
    for stage, phases in STAGES.items():
        for seed in study.seeds:
            plain = standard_config(study, seed)
            for phase in phases:
                variants = _declared(study, plain, phase) if stage == BEYOND else _PHASES[phase](study, plain)
                suffix = "" if seed == study.seeds[0] else f" seed={seed}"
                recipes += [Recipe(phase, v.name + suffix, v.config, v.knobs, v.role) for v in variants]
    _check_different(recipes)
    return recipes


def _check_different(recipes: Sequence[Recipe]) -> None:
    names = Counter((recipe.phase, recipe.name) for recipe in recipes)
    for (phase, name), count in names.items():
        if count > 1:
            raise UserError(f"phase {phase}: {name} is planned {count} times; write each value once")
    trained: dict[str, Recipe] = {}  # by what is trained: what judges a recipe, and at which steps, makes no other one
    for recipe in recipes:
        training = replace(recipe.config.training, checkpoints=())
        what = repr(replace(recipe.config, out="", training=training, probe=replace(recipe.config.probe, baseline="-")))
        if other := trained.get(what):
            raise UserError(
                f"recipe {recipe.phase} {recipe.name!r}: is the same as {other.phase} {other.name}; remove one"
            )
        trained[what] = recipe


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


def named_files(config: RunConfig) -> list[Path]:
    """Files besides those of rows, personas and questions by whose contents a config trains. UserError where one of the
    user's is missing.
    """
    data, named = config.data, []
    if data.responses not in ("", *WRITTEN):
        named.append(("data.responses", user_path(data.responses)))
    if config.steering.file is not None:
        named.append(("steering.vector", config.steering.file))
    if data.system_prompts or data.responses == RESPONSES_PLACEHOLDER:
        named.append(("data.system_prompts", data_dir() / TRAINING_PERSONAS))
    for key, file in named:
        require(file.is_file(), f"{key}: {file}: no such file; check its path")
    return [file for _, file in named]


def check_planned(study: StudyConfig) -> None:
    """UserError where a cell of the search, or the calibration, would fail for a layer that is not measured, or where
    the files of a suite of answers cannot be read.

    Whatever phase the cell is of: a study should not learn in its last one that its first one measured too little.
    """
    check_layers_measured(study)
    for file in study.transfer.personas:
        load_personas(file)
    recipes = [recipe for recipe in planned(study) if not (recipe.is_baseline or recipe.is_unmixed)]
    names = {f"{recipe.phase} {recipe.bare_name}" for recipe in recipes}
    for name in study.transfer.recipes:
        if name not in names:
            raise UserError(
                f"transfer.recipes: {name!r} is not a recipe of this study; --plan lists them. Leave out the seed, and "
                "what recipes are judged against, which is measured beside them"
            )
    if "behaviour" in study.suites:
        load_questions(study.behaviour.questions)
    if "instructions" in study.suites:
        load_instructions(study.instructions.file)
    sizes = architecture_offline(study.model.name, study.model.revision or None)
    blocks = sizes.num_hidden_layers
    for recipe in planned(study):
        cell = f"phase {recipe.phase} {recipe.name}"
        measured = recipe.config.probe.measured(sizes.probe_layer)
        if beyond := [layer for layer in measured if not 0 <= layer < blocks]:
            raise UserError(
                f"{cell}: probe.layers names {beyond[0]}; this model has blocks 0 to {blocks - 1}, choose among them"
            )
        try:
            recipe.config.lora.adapted_blocks(blocks)
            named_files(recipe.config)
            check_anchors(recipe.config, sizes)
            if recipe.config.objective.anchored:  # what it is anchored to would not show what it keeps of others
                for personas in (SHIPPED, *study.transfer.personas):
                    sets = load_personas(personas), load_asked(SHIPPED)
                    check_unmeasured(anchor_sets(recipe.config.objective), sets, "transfer")
        except Unreachable:
            pass  # the measured sets are not here yet; the cell checks this again before it trains
        except UserError as error:
            raise UserError(f"{cell}: {error}") from None
        steering = recipe.config.steering
        steered = steered_layers(steering, sizes) if steering.vector else []
        leaks = steering.leaks and steering.vector == COLLAPSE
        if leaks and (lacking := [layer for layer in steered if layer not in measured]):
            raise UserError(
                f"{cell}: steers layer {lacking[0]} along what the baseline measures there, and it measures "
                f"{', '.join(map(str, measured))} only; add {lacking[0]} to probe.layers"
            )


# ---------------------------------------------------------------- the phases


class Variant(NamedTuple):
    """A recipe within its phase."""

    name: str
    config: RunConfig
    knobs: Knobs
    role: Role = "registered"


def _dose(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    first = standard.seed == study.seeds[0]
    probe = replace(study.probe, baseline="self" if first else BASELINE_PLACEHOLDER)
    yield Variant("baseline", replace(standard, training=study.training, probe=probe), {})


def _kl_to_base(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    for beta in study.regularised.beta:
        config = replace(standard, objective=ObjectiveSection("kl_to_base", beta))
        yield Variant(f"beta={beta:g}", config, {"beta": beta})


def _r3f(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    section = study.regularised
    for weight in section.r3f_lambda:
        objective = ObjectiveSection("r3f", weight, noise=section.noise, epsilon=section.epsilon)
        yield Variant(f"lambda={weight:g}", replace(standard, objective=objective), {"lambda": weight})
    for weight in section.r3f_lambda_per_row:
        objective = ObjectiveSection("r3f", weight, noise=section.noise, epsilon=section.epsilon, per_row=True)
        knobs: Knobs = {"lambda": weight, "per": "row"}
        yield Variant(f"lambda={weight:g} xT", replace(standard, objective=objective), knobs, "beyond")


def _low_rank(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    scale = study.lora.alpha / study.lora.rank
    for rank in study.low_rank.rank:
        for rate in study.low_rank.learning_rate:
            lora = replace(standard.lora, rank=rank, alpha=scale * rank)
            training = replace(standard.training, learning_rate=rate)
            knobs: Knobs = {"rank": rank, "learning_rate": rate}
            yield Variant(f"r={rank} lr={rate:g}", replace(standard, lora=lora, training=training), knobs)
    # The standard rank at the other rates, so that a rank is compared with another at the same rate.
    rank = study.lora.rank
    for rate in study.low_rank.learning_rate:
        if rate != study.training.learning_rate and study.low_rank.rank and rank not in study.low_rank.rank:
            training = replace(standard.training, learning_rate=rate)
            knobs = {"rank": rank, "learning_rate": rate}
            yield Variant(f"r={rank} lr={rate:g}", replace(standard, training=training), knobs, "reference")


def _prompts(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    data = replace(standard.data, system_prompts="training_personas")
    yield Variant("prompts", replace(standard, data=data), {})


def _responses(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    section = study.role_play
    prompts: Literal["", "training_personas"] = "training_personas" if section.keep_prompts else ""
    data = replace(standard.data, system_prompts=prompts, responses=RESPONSES_PLACEHOLDER)
    knobs: Knobs = {"temperature": section.temperature, "max_new_tokens": section.max_new_tokens}
    yield Variant("responses", replace(standard, data=data), knobs)
    if study.controls:
        shuffled = replace(standard, data=replace(standard.data, shuffle_responses=True))
        yield Variant("shuffled responses", shuffled, {}, "control")


def _unmixed(study: StudyConfig, standard: RunConfig) -> Iterator[Variant]:
    if study.narrow == "em":
        config = _narrow(study, standard)
        if study.rehearsal.em_heldout and standard.seed == study.seeds[0]:
            config = replace(config, probe=replace(config.probe, baseline="self"))
        yield Variant("unmixed", config, {})


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
    random = replace(persona, vector=STEERING_RANDOM + persona.vector)
    chosen: list[tuple[str, SteeringSection, Role]] = [
        (persona.vector, persona, "registered"),
        (collapse.vector, collapse, "registered"),
    ]
    if study.controls:
        chosen.append(("random", random, "control"))
    if section.training_steering:
        difference = replace(persona, vector=section.training_steering, persona_set="training")
        chosen.append((difference.vector, difference, "beyond"))
        chosen.append(("collapse (training)", replace(collapse, persona_set="training"), "beyond"))
    for name, steering, role in chosen:
        knobs: Knobs = {"vector": steering.vector, "coefficient": steering.coefficient, "method": steering.method}
        yield Variant(name, replace(_narrow(study, standard), steering=steering), knobs, role)


_PHASES = {
    "1": _dose, "2A": _kl_to_base, "2B": _r3f, "3": _low_rank, "4A": _prompts, "4B": _responses,
    "EM": _unmixed, "5A": _raw_text, "5B": _instructions, "5C": _steering,
}  # fmt: skip


def _narrow(study: StudyConfig, standard: RunConfig) -> RunConfig:
    """The narrow data of phase 5. What is learned of harmful rows is measured on such rows, against the unmixed cell.

    Without any held out, the rows that are measured stay the others', and so does the baseline.
    """
    if study.narrow != "em":
        return standard
    narrow = replace(standard, data=replace(standard.data, train=study.rehearsal.em))
    if not study.rehearsal.em_heldout:
        return narrow
    data = replace(narrow.data, heldout=study.rehearsal.em_heldout)
    return replace(narrow, data=data, probe=replace(standard.probe, baseline=UNMIXED_PLACEHOLDER))


def _mixed(config: RunConfig, broad: str, kind: Literal["rows", "raw_text"], ratio: str) -> Variant:
    data = replace(config.data, broad=broad, broad_kind=kind, ratio=ratio)
    narrow, mixed = map(int, ratio.split(":"))
    knobs: Knobs = {"ratio": ratio, "broad_fraction": mixed / (narrow + mixed)}
    return Variant(ratio, replace(config, data=data), knobs)


# ---------------------------------------------------------------- beyond them: [[recipe]] tables


def _declared(study: StudyConfig, standard: RunConfig, phase: str) -> Iterator[Variant]:
    """The `[[recipe]]` tables of a phase, applied to the standard recipe."""
    for section in study.recipe:
        if section.phase == phase:
            config = _departed(section, standard)
            knobs = {key: _knob(value) for key, value in section.departures.items()}
            yield Variant(section.name, config, knobs, section.role)


def _departed(section: RecipeSection, standard: RunConfig) -> RunConfig:
    """The standard recipe with a table's settings in it. Every error names the table."""
    where = f"recipe {section.phase} {section.name!r}"
    settable = [key for key in flatten(standard) if not key.startswith(SHARED)]
    for key in section.departures:
        if key not in settable:
            raise UserError(f"{where}: {unknown_key(key, settable)}")
    try:
        config = with_settings(standard, section.departures)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not difference(config, standard):
        raise UserError(f"{where}: sets nothing in which it departs from the standard recipe")
    if (steps := config.training.steps) not in config.training.checkpoints:
        raise UserError(f"{where}: every cell is judged at its last step; add {steps} to training.checkpoints")
    return config


def _knob(value: Any) -> int | float | str:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
