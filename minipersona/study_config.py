"""A study is its config: phase 1's recipe in full, and what each later phase varies of it. The defaults are the
registered values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from minipersona.behaviour_config import BehaviourSection
from minipersona.config import (
    DataSection,
    ExecutionSection,
    LoraConfig,
    ModelSection,
    ProbeSection,
    TrainingSection,
    parse_difference,
    parse_ratio,
)
from minipersona.errors import require
from minipersona.settings import dotted, flatten

BEYOND = "6"
SCALED = "6D"  # the baseline's update, scaled: measured beside the recipes, of which none has this letter
SEED_SUFFIX = r" seed=\d+$"  # of the name of a cell in a study of several seeds
STAGES = {
    "1": ("1",),
    "2": ("2A", "2B"),
    "3": ("3",),
    "4": ("4A", "4B"),
    "5": ("EM", "5A", "5B", "5C"),
    BEYOND: tuple(BEYOND + letter for letter in ascii_uppercase),
}
"""The five registered phases and what lies beyond them, and the cells' phases that each is made of, in order."""
PHASES = tuple(phase for phases in STAGES.values() for phase in phases)

Role = Literal["registered", "reference", "control", "beyond", "confirmation"]
"""Why a cell is run: as a registered recipe, as what recipes are compared with, to check the checks, as a recipe beyond
the registered ones, or with a fresh seed to confirm a pass."""

STRENGTHS = (1e-3, 1e-2, 1e-1)
SUITES = ("behaviour", "instructions")
# May change while a study goes on, since no cell depends on it: a new recipe is a new cell.
RECIPE_FREE = (
    "out", "stop_rule", "bounds", "confirmations", "exhaustive", "suites", "controls", "recipe", "execution.",
    "behaviour.", "instructions.", "transfer.",
)  # fmt: skip
# What the cells of a study share, so that they can be compared.
SHARED = ("out", "seed", "model.", "probe.", "execution.", "data.heldout")


@dataclass(frozen=True)
class RegularisedSection:
    """Phase 2, regularised: 2A holds the model near the base, 2B near itself under noise."""

    beta: tuple[float, ...] = STRENGTHS  # 2A: CE + beta KL_S(p, base)
    r3f_lambda: tuple[float, ...] = STRENGTHS  # 2B: CE + lambda KL_S(f(x), f(x + z))
    r3f_lambda_per_row: tuple[float, ...] = STRENGTHS  # 2B beyond the registered: times the rows' supervised tokens
    noise: Literal["normal", "uniform"] = "normal"  # the distribution of z
    epsilon: float = 0.0  # its size; 0: the smallest of 1e-5, 1e-4, 1e-3 that the model's precision carries

    def __post_init__(self) -> None:
        for key in ("beta", "r3f_lambda", "r3f_lambda_per_row"):
            values: tuple[float, ...] = getattr(self, key)
            require(all(value > 0 for value in values), f"regularised.{key}: every value must be positive")


@dataclass(frozen=True)
class LowRankSection:
    """Phase 3, low rank: a grid. alpha follows the rank, so that the scale alpha / rank stays the standard recipe's."""

    rank: tuple[int, ...] = (4, 8, 16)
    learning_rate: tuple[float, ...] = (2e-5, 5e-5, 1e-4)

    def __post_init__(self) -> None:
        require(all(rank >= 1 for rank in self.rank), "low_rank.rank: every rank must be at least 1")
        require(all(rate > 0 for rate in self.learning_rate), "low_rank.learning_rate: every rate must be positive")


@dataclass(frozen=True)
class RolePlaySection:
    """Phase 4, role play over 30 training personas, none of which is measured.

    4A puts their system prompts over the rows. 4B has the base model write the rows' responses in their voices.
    """

    temperature: float = 1.0  # 4B: at which the base model writes
    max_new_tokens: int = 1024  # 4B: of a response
    # 4B: train under the persona's prompt as well. What the model itself wrote under a prompt teaches it little there.
    keep_prompts: bool = False

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "role_play.temperature: must not be negative")
        require(self.max_new_tokens >= 1, "role_play.max_new_tokens: must be at least 1")


@dataclass(frozen=True)
class RehearsalSection:
    """Phase 5, rehearsal: what is mixed into the narrow rows (5A, 5B), and steering without any mixing (5C)."""

    em: str = ""  # the narrow rows with narrow = "em"; a file of the user's
    em_heldout: str = ""  # other such rows, by whose loss is told what was learned of them; empty: it is not known
    raw_text: str = "fineweb-edu[0:4000]"  # 5A, in stored order; enough texts for every ratio
    raw_text_ratio: tuple[str, ...] = ("99:1", "95:5", "90:10", "75:25")  # narrow:broad
    instructions: str = "tulu"  # 5B: rows of the whole mixture
    instruction_ratio: tuple[str, ...] = ("15:1", "7:1", "3:1", "1:1")
    steering: str = "villain - assistant"  # 5C: a difference of two persona vectors, Method B
    steering_coefficient: float = 5.0
    collapse_coefficient: float = 1.0  # 5C: of the baseline's mean shift, Method A
    # 5C beyond the registered: a difference, and the collapse, of training personas, none of which is measured; "" none
    training_steering: str = "pirate - tour_guide"

    def __post_init__(self) -> None:
        for key in ("raw_text_ratio", "instruction_ratio"):
            for ratio in getattr(self, key):
                parse_ratio(ratio, f"rehearsal.{key}")
        parse_difference(self.steering, "rehearsal.steering")
        if self.training_steering:
            parse_difference(self.training_steering, "rehearsal.training_steering")


@dataclass(frozen=True)
class InstructionsSection:
    """How well instructions are followed, asked where raw text was a quarter of the rows or more."""

    file: str = ""  # in the form of IFEval's input_data.jsonl; empty is the package's own set
    max_new_tokens: int = 1280

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "instructions.max_new_tokens: must be at least 1")


@dataclass(frozen=True)
class TransferSection:
    """What confirmed recipes are measured on, with every seed, besides the study's own personas: other sets, every
    layer, and voice.
    """

    personas: tuple[str, ...] = ()  # files of more personas, asked the study's questions
    recipes: tuple[str, ...] = ()  # measured likewise whatever they show, to compare: "2A beta=0.1"

    def __post_init__(self) -> None:
        names = ["study", "shipped", "registered", *(Path(file).stem for file in self.personas)]
        for name in names:
            require(names.count(name) == 1, f"transfer.personas: two sets would be called {name!r}; rename a file")


@dataclass(frozen=True)
class RecipeSection:
    """[[recipe]]: a recipe that is not registered, by the settings of a run in which it departs from the standard one.

    What it is for decides how it is counted: as a recipe that may pass, as a reference, or as a control.
    """

    phase: str  # 6 and a capital letter
    name: str  # unique in its phase
    set: dict[str, Any]  # "section.key" = value
    reference: bool = False  # to compare others with
    control: bool = False  # to check what the search shows

    def __post_init__(self) -> None:
        where = f"recipe {self.phase} {self.name!r}"
        require(
            self.phase != SCALED,
            f"{where}: {SCALED} is the baseline's update, scaled, which a study measures beside its recipes; take "
            "another letter",
        )
        require(
            self.phase in STAGES[BEYOND],
            f"{where}: phase must be {BEYOND} and a capital letter, such as {BEYOND}A; the other phases are the "
            "registered recipes'",
        )
        require(bool(self.name.strip()) and len(self.name) <= 80, f"{where}: give it a name of 1 to 80 characters")
        require(not re.search(SEED_SUFFIX, self.name), f"{where}: the name must not end like one of several seeds")
        require(not (self.reference and self.control), f"{where}: is a reference or a control, not both")
        for key in self.departures:
            require(not key.startswith(SHARED), f"{where}: {key} is the same in the whole study; set it there")

    @property
    def departures(self) -> dict[str, Any]:
        """The settings by their dotted keys, however the TOML nests them."""
        return dotted(self.set)

    @property
    def role(self) -> Role:
        """Why it is run."""
        return "reference" if self.reference else "control" if self.control else "beyond"


@dataclass(frozen=True)
class StudyConfig:
    """The whole search. The sections that a run has too are phase 1's recipe, from which every other cell departs."""

    data: DataSection
    out: str = "studies/study"
    narrow: Literal["tulu", "em"] = "tulu"  # what phase 5 is trained on: `data.train`, or `rehearsal.em`
    stop_rule: Literal["substantive", "registered"] = "substantive"  # which PASS ends the search
    bounds: Literal["auto", "absolute", "relative"] = "auto"  # on M1: 0.95 and 0.97, or the same shares of what the
    # base separates its personas by; "auto": absolute on the registered model, sets and layer
    confirmations: int = 3  # fresh seeds with which a passer, and the baseline, are run again; 0: none
    exhaustive: bool = False  # run every phase whatever passes
    suites: tuple[str, ...] = SUITES  # of answers, asked where they are due; [] asks for none, and a pass of phase 5,
    # which also needs the answers of "behaviour", then stays open
    controls: bool = True  # also run what checks the search: shuffled responses, steering along a random vector
    seeds: tuple[int, ...] = (42,)  # every recipe once a seed; the first seed's baseline is everyone's
    later_checkpoints: tuple[int, ...] = ()  # of the cells after phase 1; empty: the same as phase 1's
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingSection = field(default_factory=TrainingSection)
    probe: ProbeSection = field(default_factory=ProbeSection)
    regularised: RegularisedSection = field(default_factory=RegularisedSection)
    low_rank: LowRankSection = field(default_factory=LowRankSection)
    role_play: RolePlaySection = field(default_factory=RolePlaySection)
    rehearsal: RehearsalSection = field(default_factory=RehearsalSection)
    behaviour: BehaviourSection = field(default_factory=BehaviourSection)
    instructions: InstructionsSection = field(default_factory=InstructionsSection)
    transfer: TransferSection = field(default_factory=TransferSection)
    execution: ExecutionSection = field(default_factory=ExecutionSection)
    recipe: tuple[RecipeSection, ...] = ()  # [[recipe]] tables: recipes that are not registered, run last

    def __post_init__(self) -> None:
        require(
            self.training.method == "lora" or not self.low_rank.rank,
            'training.method = "full" has no rank to lower; write low_rank.rank = [] to leave phase 3 out',
        )
        steps = self.training.steps
        for suite in self.suites:
            require(suite in SUITES, f"suites: {suite!r} is neither of {' and '.join(SUITES)}")
        require(self.confirmations >= 0, "confirmations: must not be negative; 0 runs none")
        require(bool(self.seeds), "seeds: name at least one")
        require(len(set(self.seeds)) == len(self.seeds), "seeds: name each once")
        require(self.probe.baseline == "", "probe.baseline: a study has its own; leave it out")
        for key, checkpoints in {
            "training.checkpoints": self.training.checkpoints,
            "later_checkpoints": self.later_checkpoints or (steps,),
        }.items():
            require(steps in checkpoints, f"{key}: every cell is judged at its last step; add {steps}")
        replace(self.training, checkpoints=self.later_checkpoints)  # the same rules hold for these
        require(
            self.narrow == "tulu" or bool(self.rehearsal.em),
            'rehearsal.em is missing; narrow = "em" needs that file, such as jsonl:bad_legal_advice_6k.jsonl',
        )
        require(
            not self.data.broad and not self.data.system_prompts,
            "data: phase 1 is trained on plain rows; what phases 4 and 5 mix in has its own sections",
        )


def changes(mine: StudyConfig, theirs: StudyConfig) -> list[str]:
    """The settings in which two studies ask for different cells, as ``key: theirs -> mine`` lines."""
    a, b = flatten(theirs), flatten(mine)
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in a if a[key] != b[key] and not key.startswith(RECIPE_FREE)]
