"""What a run works with: a model on its device, its tokenizer and the instruments, as its config names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.config import ModelSection, RunConfig
from minipersona.console import Console
from minipersona.corpus.overlap import check_overlap
from minipersona.corpus.training_set import TrainingSet, training_set
from minipersona.errors import UserError
from minipersona.hub import pinned_revision
from minipersona.model.acceleration.compiler import compile_blocks
from minipersona.model.adapter_files import load_adapter
from minipersona.model.config import ModelConfig
from minipersona.model.load import load_model
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.run.directory import checkpoint_directory
from minipersona.run.measurement import Instruments, make_instruments
from minipersona.training.graphs import Graphs

SMALL = 1e9  # matmul parameters below which the host takes longer to launch a training pass than a GPU to compute it
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "auto": None}


class Resources:
    """Keeps a model, its graphs, its tokenizer, its instruments, rows and what is measured of the base from one run to
    the next while their settings are the same, so that loading, compiling, recording and tokenising are paid once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[str, tuple[Any, Any]] = {}  # what -> (its settings, the thing)

    def tokenizer(self, config: RunConfig) -> ChatTokenizer:
        """The config's tokenizer."""
        return self.keep("tokenizer", config.model, lambda: load_run_tokenizer(config.model))

    def base(self, config: RunConfig) -> Qwen2:
        """The config's model as it was loaded, compiled where the config asks for it. It is one object, on which runs
        train: adapters that are attached to it are detached.
        """
        settings = config.model, config.execution.fused, compiles(config, self.device)
        model = self.keep("model", settings, lambda: self._load(config))
        return remove_lora(model)

    def graphs(self, config: RunConfig) -> Graphs | None:
        """The graphs of the model's training passes, where the config trains by them."""
        model = self.base(config)
        wanted = uses_graphs(config, model.device, model.config)
        return self.keep("graphs", model, lambda: Graphs(model)) if wanted else None

    def instruments(self, config: RunConfig) -> Instruments:
        """The config's instruments."""
        settings = (
            config.model, replace(config.probe, baseline=""), config.data.heldout, config.data.max_tokens,
            config.data.supervise, config.execution.measuring_tokens,
        )  # fmt: skip
        model, tokenizer = self.base(config), self.tokenizer(config)
        return self.keep("instruments", settings, lambda: run_instruments(config, model, tokenizer))

    def rows(self, config: RunConfig, console: Console) -> tuple[TrainingSet, str]:
        """The rows that the config trains on, as tokens, and what to say of held-out rows among them."""
        data, tokenizer = config.data, self.tokenizer(config)
        return self.keep(
            "rows", (config.model, data, config.seed),
            lambda: (training_set(data, config.seed, tokenizer, console), check_overlap(data.train, data.heldout)),
        )  # fmt: skip

    def clear(self) -> None:
        """Free everything: memory has run out."""
        self._kept.clear()

    def discard_model(self) -> None:
        """Load the model again next time: its own weights have changed."""
        self._kept.pop("model", None)
        self._kept.pop("graphs", None)  # they hold it

    def _load(self, config: RunConfig) -> Qwen2:
        self._kept.pop("graphs", None)  # they hold the model that this one replaces
        model = load_run_model(config, self.device)
        if compiles(config, self.device):
            compile_blocks(model)
        return model

    def keep(self, what: str, settings: Any, make: Callable[[], T]) -> T:
        """What `make` gives, or gave before: once for runs that follow each other with the same settings."""
        if what not in self._kept or self._kept[what][0] != settings:
            self._kept.pop(what, None)  # first, so that two models need not fit into memory
            self._kept[what] = (settings, make())
        return cast(T, self._kept[what][1])


class Kind(NamedTuple):
    """What a process does once: runs that agree in the first part share what is compiled, in the second the graphs."""

    compiled: object
    recorded: object


def kind_of(config: RunConfig) -> Kind:
    """The kind of a run. Graphs are shared by fewer runs than compiled blocks are.

    Blocks are compiled for the adapters in them and for the passes that an objective makes of them. A graph is one
    objective's with all its numbers, but for an anchor's strengths, and has the steered blocks (`training/graphs.py`).
    The directions of a null space are found on the plain path, which is compiled too; no graph knows of them.
    """
    lora, objective, steering = config.lora, config.objective, config.steering
    adapters = replace(lora, null_space=0) if config.training.method == "lora" else None
    if objective.anchored:
        objective = replace(objective, weight=1.0, kl_factor=1.0)
    steered = (steering.layer, steering.all_layers) if steering.vector else None
    return Kind(
        compiled=(adapters, bool(lora.null_space), objective.kind),
        recorded=(adapters, objective, steered),
    )


# ---------------------------------------------------------------- from a config


def resolve(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with the model's revision and precision filled in, as far as it leaves them open."""
    revision = pinned_revision(config.model.name, config.model.revision or None) or ""
    dtype = config.model.dtype
    if dtype == "auto":  # settled once: a run that is continued elsewhere keeps its precision
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return replace(config, model=replace(config.model, revision=revision, dtype=dtype))


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether blocks and the training loss are compiled."""
    wanted = config.execution.compile == "on" or (config.execution.compile == "auto" and device.type == "cuda")
    return wanted and config.execution.fused


def uses_graphs(config: RunConfig, device: torch.device, sizes: ModelConfig) -> bool:
    """Whether training passes are CUDA graphs. UserError where a config asks for what cannot be recorded.

    The portable attention cannot, and only half precision has flash kernels (`model/attention.py`).
    """
    wanted, cuda = config.execution.graphs, device.type == "cuda"
    half = config.model.dtype in ("auto", "bfloat16")
    if wanted == "on" and not cuda:
        raise UserError('execution.graphs = "on": only a CUDA device has graphs; leave it out, or set it to "off"')
    if wanted == "on" and not half:
        raise UserError(
            f'execution.graphs = "on", model.dtype = "{config.model.dtype}": graphs need bfloat16, whose attention has '
            "a kernel that can be recorded; leave one of the two out"
        )
    pays = compiles(config, device) and sizes.matmul_parameters < SMALL
    return cuda and half and config.execution.fused and (wanted == "on" or (wanted == "auto" and pays))


def load_run_model(config: RunConfig, device: torch.device) -> Qwen2:
    """The model of a config, not compiled."""
    section = config.model
    model = load_model(section.name, dtype=DTYPES[section.dtype], device=device, revision=section.revision or None)
    model.fused = config.execution.fused
    return model


def load_run_tokenizer(section: ModelSection) -> ChatTokenizer:
    """The tokenizer of a config: the model's own unless another is named."""
    return load_tokenizer(
        section.tokenizer or section.name,
        revision=None if section.tokenizer else section.revision or None,
        template=section.template or None,
    )


def load_checkpoint(base: Qwen2, config: RunConfig, directory: Path, step: int) -> Qwen2:
    """The model that a run left at a step.

    base  the run's model as it was loaded. The adapter of a LoRA run is attached to it, in place of any other; the
          checkpoint of a full-parameter run is a model of its own, on the same device, and `base` stays as it is
    """
    checkpoint = checkpoint_directory(directory, step)
    if config.training.method == "lora":
        load_adapter(base, checkpoint)
        return base
    model = load_model(str(checkpoint), dtype=DTYPES[config.model.dtype], device=base.device)
    model.fused = base.fused
    return model


def run_instruments(config: RunConfig, model: Qwen2, tokenizer: ChatTokenizer) -> Instruments:
    """The instruments that a run's config names."""
    return make_instruments(
        model,
        tokenizer,
        personas=config.probe.personas,
        questions=config.probe.questions,
        layers=config.probe.measured(model.config.probe_layer),
        heldout=config.data.heldout,
        max_tokens=config.data.max_tokens,
        supervise=config.data.supervise,
        pack_tokens=config.execution.measuring_tokens,
    )
