"""A run is its config. Its sections are the fields of `RunConfig`, in the order in which a run meets them.

`settings.py` reads such configs from TOML and writes them back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from minipersona.errors import UserError, require
from minipersona.files import user_path

DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"
LARGE_PASS = 16_384  # tokens: products run at full speed long before
SHIPPED = "shipped"  # the package's own personas and questions
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSection:
    """Which model is fine-tuned."""

    name: str = DEFAULT_MODEL  # a directory, a hub id, tiny, or random:<hub id or directory>
    revision: str = ""  # a hub revision; empty is the pinned one, or the newest where none is pinned
    tokenizer: str = ""  # empty is the model's own
    template: str = ""  # a chat template by name; empty is the tokenizer's own, where that is known
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 on CUDA, else float32


def parse_ratio(text: str, key: str = "data.ratio") -> tuple[int, int]:
    """``"95:5"`` -> (95, 5): narrow and broad parts, both at least 1. `key` is the setting that an error names."""
    match = re.fullmatch(r"([1-9][0-9]{0,5}):([1-9][0-9]{0,5})", text)
    if match is None:
        raise UserError(f"{key} = {text!r}: write narrow:broad in whole numbers from 1 up, such as 95:5")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class DataSection:
    """What it is fine-tuned on. Sources are described by `python -m minipersona.corpus`."""

    train: str
    heldout: str
    max_tokens: int = 2048  # of a row; longer ones are cut on the right
    supervise: Literal["last", "all"] = "last"  # which assistant turns are learned
    # A mixture: of every narrow + broad rows of `train`, `broad` are replaced from the broad source, drawn by the seed.
    broad: str = ""  # the broad source; empty mixes nothing
    broad_kind: Literal["", "rows", "raw_text"] = ""  # whole rows, or raw text of just the replaced rows' token counts
    ratio: str = ""  # narrow:broad in rows, such as "95:5"
    system_prompts: Literal["", "training_personas"] = ""  # give every row one of the 30 training personas' prompts
    responses: str = ""  # a file of `python -m minipersona.behaviour roleplay`: its responses in place of the rows' own
    persona_share: float = 1.0  # of the rows that get such prompts and responses, drawn by the seed; others stay plain
    shuffle_responses: bool = False  # a control: every row gets the response of another row, drawn by the seed

    def __post_init__(self) -> None:
        require(self.max_tokens >= 2, f"data.max_tokens = {self.max_tokens}: must be at least 2")
        share, changed = self.persona_share, bool(self.system_prompts or self.responses)
        require(0 < share <= 1, f"data.persona_share = {share}: must be above 0 and at most 1")
        require(
            share == 1 or (changed and not self.broad),
            f"data.persona_share = {share}: is the share of rows with data.system_prompts or data.responses; it needs "
            "one of them, and no data.broad",
        )
        require(
            not (self.shuffle_responses and (self.responses or self.broad)),
            "data.shuffle_responses: shuffles the rows' own responses; leave data.responses and data.broad out",
        )
        mixture = {"broad": self.broad, "broad_kind": self.broad_kind, "ratio": self.ratio}
        missing = [name for name, value in mixture.items() if not value]
        if 0 < len(missing) < len(mixture):
            raise UserError(f"data.{missing[0]} is missing; a mixture needs {', '.join(mixture)} together")
        if self.ratio:
            parse_ratio(self.ratio)


@dataclass(frozen=True)
class LoraConfig:
    """Hu et al. 2021, with scale alpha / rank."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    targets: tuple[str, ...] = LORA_TARGETS
    # How many directions of each layer's inputs, at prompts of personas that are not measured, the update is kept off.
    null_space: int = 0
    blocks: tuple[int, ...] = ()  # [first, last]: only these blocks are adapted, counted from 0; empty: all

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank = {self.rank}: must be at least 1")
        require(self.alpha > 0, f"lora.alpha = {self.alpha}: must be positive")
        require(0 <= self.dropout < 1, f"lora.dropout = {self.dropout}: must lie in [0, 1)")
        for name in self.targets:
            require(name in LORA_TARGETS, f"lora.targets: {name!r} is none of {', '.join(LORA_TARGETS)}")
        require(bool(self.targets), "lora.targets: name at least one layer, such as q_proj")
        require(self.null_space >= 0, f"lora.null_space = {self.null_space}: must not be negative; 0 is off")
        pair = len(self.blocks) == 2 and 0 <= self.blocks[0] <= self.blocks[1]
        require(not self.blocks or pair, f"lora.blocks = {list(self.blocks)}: write [first, last], counted from 0")

    def adapted_blocks(self, blocks: int) -> range:
        """The blocks that are adapted, of so many. UserError where the model lacks one of them."""
        first, last = self.blocks or (0, blocks - 1)
        require(last < blocks, f"lora.blocks names {last}; this model has blocks 0 to {blocks - 1}, choose among them")
        return range(first, last + 1)


@dataclass(frozen=True)
class TrainingSection:
    """The recipe: AdamW under a linear schedule."""

    method: Literal["lora", "full"] = "lora"
    learning_rate: float = 2e-5
    steps: int = 375
    batch: int = 16  # sequences a step, over all ranks and packs
    warmup: float = 0.03  # share of the steps, rounded up
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    checkpoints: tuple[int, ...] = (10, 25, 50, 100, 200, 375)
    probe_every: int = 0  # measure every so many steps too, without leaving a checkpoint; 0: at the checkpoints only
    most_non_finite: int = 5  # steps in a row without a finite gradient, after which the run has failed; 0: never

    def __post_init__(self) -> None:
        require(self.learning_rate >= 0, f"training.learning_rate = {self.learning_rate}: must not be negative")
        require(self.steps >= 1, f"training.steps = {self.steps}: must be at least 1")
        require(self.batch >= 1, f"training.batch = {self.batch}: must be at least 1")
        require(0 <= self.warmup <= 1, f"training.warmup = {self.warmup}: is a share of the steps, from 0 to 1")
        require(self.weight_decay >= 0, f"training.weight_decay = {self.weight_decay}: must not be negative")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name} = {value}: must lie in [0, 1)")
        require(self.epsilon > 0, f"training.epsilon = {self.epsilon}: must be positive")
        require(self.max_grad_norm > 0, f"training.max_grad_norm = {self.max_grad_norm}: must be positive")
        for name in ("probe_every", "most_non_finite"):
            value = getattr(self, name)
            require(value >= 0, f"training.{name} = {value}: must not be negative; 0 is never")
        for step in self.checkpoints:
            require(
                1 <= step <= self.steps,
                f"training.checkpoints: step {step} is outside 1 to {self.steps} (training.steps)",
            )
        require(
            tuple(sorted(set(self.checkpoints))) == self.checkpoints,
            "training.checkpoints: list each step once, rising",
        )

    def measures(self, step: int) -> bool:
        """Whether the model is measured after this step, from 1."""
        return step in self.checkpoints or (self.probe_every > 0 and step > 0 and step % self.probe_every == 0)


@dataclass(frozen=True)
class ObjectiveSection:
    """What is minimised: cross-entropy, alone or with a term that holds the model near something."""

    kind: Literal[
        "cross_entropy", "kl_to_base", "r3f", "feature_anchor", "kl_on_prompts", "feature_and_kl", "gram_anchor"
    ] = "cross_entropy"
    weight: float = 0.0  # of that term: beta of KL to the base, lambda of R3F, w of an anchor
    direction: Literal["symmetric", "forward", "reverse"] = "symmetric"  # forward: KL(trained || base)
    noise: Literal["normal", "uniform"] = "normal"  # of R3F: standard deviation epsilon, or from -epsilon to epsilon
    epsilon: float = 0.0  # 0: the smallest of 1e-5, 1e-4, 1e-3 that the model's precision carries
    per_row: bool = False  # of R3F: lambda times the rows' mean supervised length, as fairseq's loss a sentence has it
    # The last four kinds hold the model near its base at contexts: prompts of personas and questions not measured.
    contexts: int = 32  # prompts a step, beside the rows; gram_anchor takes all personas of as many questions as fit
    anchor_layers: tuple[int, ...] = ()  # blocks counted from 0; empty is the model's registered one
    anchor_personas: str = ""  # a file in the form of the measured ones; empty: the package's 30 training personas
    anchor_questions: str = ""  # likewise; empty: the package's 240 anchor questions
    # Of a feature anchor: a state's change is relative to the base's state, or to how far the contexts' states spread.
    anchor_scale: Literal["state", "spread"] = "state"
    # Of KL at contexts: N compares over the base's own greedy responses to the prompts, of N tokens at most; 0 over the
    # prompts' tokens.
    anchor_responses: int = 0
    kl_factor: float = 1.0  # of feature_and_kl: its KL counts so many times as much as its feature anchor

    @property
    def anchored(self) -> bool:
        """Whether a step passes contexts beside its rows."""
        return self.anchors_states or self.anchors_predictions

    @property
    def anchors_states(self) -> bool:
        """Whether the states at contexts, or their cosines, are held."""
        return self.anchors_features or self.kind == "gram_anchor"

    @property
    def anchors_features(self) -> bool:
        """Whether the states at contexts are held."""
        return self.kind in ("feature_anchor", "feature_and_kl")

    @property
    def anchors_predictions(self) -> bool:
        """Whether the predictions over contexts are held."""
        return self.kind in ("kl_on_prompts", "feature_and_kl")

    def __post_init__(self) -> None:
        if self.kind == "cross_entropy":
            require(self.weight == 0, f'objective.weight = {self.weight}: kind = "cross_entropy" has nothing to weigh')
        else:
            require(self.weight > 0, f'objective.weight = {self.weight}: must be positive for kind = "{self.kind}"')
        if self.kind != "kl_to_base":
            require(
                self.direction == "symmetric",
                f'objective.direction = "{self.direction}": is a choice of kind = "kl_to_base" only',
            )
        require(self.epsilon >= 0, f"objective.epsilon = {self.epsilon}: must not be negative; 0 chooses")
        if self.kind != "r3f":
            require(self.noise == "normal", f'objective.noise = "{self.noise}": is a choice of kind = "r3f" only')
            require(self.epsilon == 0, f'objective.epsilon = {self.epsilon}: is a choice of kind = "r3f" only')
            require(not self.per_row, 'objective.per_row: is a choice of kind = "r3f" only')
        require(self.contexts >= 1, f"objective.contexts = {self.contexts}: must be at least 1")
        require(
            min(self.anchor_layers, default=0) >= 0 and len(set(self.anchor_layers)) == len(self.anchor_layers),
            f"objective.anchor_layers = {list(self.anchor_layers)}: list each block once, counted from 0",
        )
        require(
            not self.anchor_layers or self.anchors_states,
            'objective.anchor_layers: is a choice of kind = "feature_anchor", "feature_and_kl" or "gram_anchor" only',
        )
        require(
            self.anchor_scale == "state" or self.anchors_features,
            'objective.anchor_scale: is a choice of kind = "feature_anchor" or "feature_and_kl" only',
        )
        responses = self.anchor_responses
        require(responses >= 0, f"objective.anchor_responses = {responses}: must not be negative; 0 is off")
        require(
            responses == 0 or self.anchors_predictions,
            f'objective.anchor_responses = {responses}: is a choice of kind = "kl_on_prompts" or "feature_and_kl" only',
        )
        require(self.kl_factor > 0, f"objective.kl_factor = {self.kl_factor}: must be positive")
        require(
            self.kl_factor == 1 or self.kind == "feature_and_kl",
            f'objective.kl_factor = {self.kl_factor}: is a choice of kind = "feature_and_kl" only',
        )
        if not self.anchored:
            for name in ("contexts", "anchor_personas", "anchor_questions"):
                require(
                    getattr(self, name) == getattr(ObjectiveSection, name),
                    f'objective.{name}: is a choice of kind = "feature_anchor", "kl_on_prompts", "feature_and_kl" or '
                    '"gram_anchor" only',
                )


STEERING_FILE = "file:"
STEERING_RANDOM = "random:"
COLLAPSE = "collapse"


def parse_difference(text: str, key: str = "steering.vector") -> tuple[str, str]:
    """``"villain - assistant"`` -> (villain, assistant): two different persona names. An error names the setting."""
    plus, separator, minus = (part.strip() for part in text.partition(" - "))
    if not (plus and separator and minus) or plus == minus:
        raise UserError(f'{key} = {text!r}: write two personas with " - " between, such as villain - assistant')
    return plus, minus


@dataclass(frozen=True)
class SteeringSection:
    """Preventative steering (Chen et al. 2025): h <- h + coefficient * vector at every token, in training only."""

    # Empty is off. Else a difference of two personas ("villain - assistant"); "collapse", the baseline's mean shift; or
    # "file:PATH" (one tensor layer.L (D,) a layer), "file:PATH#a - b" (a difference in a file of persona vectors); or
    # "random:a - b", a control: a direction drawn by the seed, as long as that difference.
    vector: str = ""
    coefficient: float = 5.0  # in lengths of the raw vector; 1 is natural for collapse, up to 1.5 for all_layers
    layer: int = -1  # a block counted from 0; -1 is the model's registered one
    all_layers: bool = False  # the incremental form: v_l - v_(l-1) at every block, v_(-1) = 0
    method: Literal["A", "B"] = "B"  # by which a difference of two personas is extracted
    # Of whom a difference or the collapse is: the personas and questions that are measured, which leaks them into
    # training, or the 30 training personas and the anchor questions.
    persona_set: Literal["measured", "training"] = "measured"

    def __post_init__(self) -> None:
        require(self.layer >= -1, f"steering.layer = {self.layer}: blocks are counted from 0; -1 is the registered one")
        require(
            not (self.all_layers and self.layer >= 0),
            f"steering.layer = {self.layer}: steering.all_layers steers every block; leave one of the two out",
        )
        if self.vector.startswith(STEERING_FILE):
            path, marked, names = self.vector.removeprefix(STEERING_FILE).partition("#")
            require(bool(path), f"steering.vector = {self.vector!r}: name the file, such as file:v.safetensors")
            if marked:
                parse_difference(names)
        elif self.vector not in ("", COLLAPSE):
            parse_difference(self.difference)
        require(
            bool(self.vector) or all(getattr(self, f.name) == f.default for f in fields(self)),
            "steering: has no effect without steering.vector; name one, or leave the section out",
        )

    @property
    def leaks(self) -> bool:
        """Whether the vector is made of the personas that are measured, so that M1 says less than it seems to."""
        elsewhere = self.vector.startswith((STEERING_FILE, STEERING_RANDOM)) or self.persona_set == "training"
        return bool(self.vector) and not elsewhere

    @property
    def file(self) -> Path | None:
        """The file that the vector is read from; None where it is made from a model."""
        if not self.vector.startswith(STEERING_FILE):
            return None
        return user_path(self.vector.removeprefix(STEERING_FILE).partition("#")[0])

    @property
    def difference(self) -> str:
        """The two personas of a difference, or of the one that a random vector is as long as."""
        return self.vector.removeprefix(STEERING_RANDOM)


@dataclass(frozen=True)
class ProbeSection:
    """What is measured of the base and of every checkpoint."""

    layers: tuple[int, ...] = ()  # blocks counted from 0; empty is the model's registered one. The first decides.
    personas: str = SHIPPED  # or registered (the predecessor's, fetched and verified), or a file in the same form
    questions: str = SHIPPED
    baseline: str = ""  # "self", or the directory of the run whose last step the others are judged against

    def __post_init__(self) -> None:
        require(len(set(self.layers)) == len(self.layers), "probe.layers: name each block once")

    def measured(self, registered: int) -> tuple[int, ...]:
        """The layers that are measured, where `registered` is the model's own."""
        return self.layers or (registered,)


@dataclass(frozen=True)
class ExecutionSection:
    """How, not what: nothing here changes a result beyond rounding, so a run may be continued with other values."""

    device: str = "auto"  # auto: CUDA where there is one
    pack_tokens: int = 0  # most tokens of one pass, lower it when memory runs out; 0: in measuring 16,384; in training
    # all weights 16,384 with checkpointed activations, adapters 10,240 without them, and otherwise 8,192
    checkpoint_activations: bool = True  # recompute blocks in the backward pass: less memory, a third slower
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on CUDA
    graphs: Literal["auto", "on", "off"] = "auto"  # train by CUDA graphs, one GPU a run; auto: where kernels are short
    fused: bool = True  # false: the plain path, with a product a layer, nothing compiled, portable attention of new
    # tokens and no CUDA graph; slower, easy to follow in a debugger, and equal to rounding
    save_minutes: float = 5.0  # between rolling checkpoints
    timeout_minutes: float = 30.0  # that ranks wait for each other; the first one's measurements must take less
    deterministic: bool = False  # bit-equal runs on CUDA too, slower

    def __post_init__(self) -> None:
        require(self.pack_tokens >= 0, f"execution.pack_tokens = {self.pack_tokens}: must not be negative")
        require(
            self.fused or self.compile != "on",
            'execution.compile = "on": the plain path is not compiled; leave execution.fused = false out',
        )
        require(
            self.fused or self.graphs != "on",
            'execution.graphs = "on": the plain path has no graphs; leave execution.fused = false out',
        )
        require(self.save_minutes >= 0, f"execution.save_minutes = {self.save_minutes}: must not be negative")
        require(self.timeout_minutes > 0, f"execution.timeout_minutes = {self.timeout_minutes}: must be positive")

    @property
    def measuring_tokens(self) -> int:
        """Most tokens of one pass without gradients."""
        return self.pack_tokens or LARGE_PASS


@dataclass(frozen=True)
class RunConfig:
    """One fine-tuning run."""

    data: DataSection
    out: str = "runs/run"
    seed: int = 42
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingSection = field(default_factory=TrainingSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    steering: SteeringSection = field(default_factory=SteeringSection)
    probe: ProbeSection = field(default_factory=ProbeSection)
    execution: ExecutionSection = field(default_factory=ExecutionSection)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed = {self.seed}: must be from 0 to 2^63 - 1")
        steps = self.training.steps
        require(
            self.probe.baseline != "self" or steps in self.training.checkpoints,
            f'probe.baseline = "self" is the run\'s last step; add {steps} to training.checkpoints',
        )
        require(
            not self.lora.null_space or self.training.method == "lora",
            'lora.null_space: is of adapters; training.method = "full" has none',
        )
        require(
            self.steering.vector != COLLAPSE or self.probe.baseline not in ("", "self"),
            'steering.vector = "collapse" is measured on another run; name its directory in probe.baseline',
        )

    @property
    def training_tokens(self) -> int:
        """Most tokens of one forward and backward pass."""
        if self.execution.pack_tokens:
            return self.execution.pack_tokens
        full, checkpointed = self.training.method == "full", self.execution.checkpoint_activations
        if full and checkpointed:
            return LARGE_PASS  # a pass casts or gathers all weights, so few long ones are faster; 2 GiB more for the 3B
        return 8_192 if full or checkpointed else 10_240
