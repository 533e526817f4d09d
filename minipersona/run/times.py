"""How long a run takes, computed before it starts, part by part: its passes (`work.py`) and what comes on top of them.

The constants were fitted to one run of SmolLM2-135M-Instruct on an H200.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minipersona.config import RunConfig
from minipersona.model.config import ModelConfig
from minipersona.run.anchors import anchor_sets
from minipersona.run.resources import compiles, uses_graphs
from minipersona.run.work import (
    SUPERVISED,
    Machine,
    Work,
    adapter_parameters,
    anchored_blocks,
    forward,
    generation_seconds,
    learned_parameters,
    step,
)
from minipersona.training.buckets import TOKENS

START, START_CPU = 9.0, 4.0  # seconds until a process has imported everything and reached the device
LOAD_BYTES = 5e9  # bytes of weights loaded a second, or drawn at random
COMPILING, COMPILING_MEASURING = 16.0, 13.0  # seconds: training with its update; passes without gradients, two kinds
RECORDING, BUCKETS = 0.28, 2.5  # seconds a size: its first pass and its recording; sizes for each number of tokens
TOKENISED = 1e6  # tokens a second
IN_FLIGHT = 256  # responses that are generated at a time
RENDERING = 0.6  # seconds: the prompts, once a process
STATISTICS, STATISTICS_D = 0.5, 2e-4  # seconds of a measurement's statistics, and for each channel of the stream
WRITTEN = 1.5e9  # bytes a second


@dataclass(frozen=True)
class Counts:
    """Tokens of a run."""

    steps: Sequence[int]  # of each step
    contexts: float  # of all steps' contexts
    prompts: float  # of a measurement's prompts, what a persona's have in common once
    heldout: float  # of the held-out rows, as they are and under personas


@dataclass(frozen=True)
class Times:
    """Seconds of a run, by what it does. The first five are paid once a process that carries out several."""

    starting: float
    loading: float
    compiling: float
    recording: float  # CUDA graphs
    anchoring: float  # the base's states at an anchor's contexts, and its responses
    reading: float  # rows, into tokens
    training: float
    measurements: int  # of the base and of every checkpoint
    measurement: float  # one of them
    writing: float
    device: float  # of what every run pays, what the device computes, for which processes that share it wait
    step: float  # a mean step

    @property
    def once(self) -> float:
        """What only the first run of a process pays."""
        return self.starting + self.loading + self.compiling + self.recording + self.anchoring

    @property
    def measuring(self) -> float:
        """All measurements."""
        return self.measurements * self.measurement

    @property
    def each(self) -> float:
        """What every run pays; in a study the base is measured once, which is left out here."""
        measuring = (self.measurements - 1) * self.measurement
        return self.reading + self.training + measuring + self.writing

    @property
    def total(self) -> float:
        """The run alone in its process."""
        return self.once + self.each + self.measurement


def run_times(sizes: ModelConfig, config: RunConfig, counts: Counts, machine: Machine) -> Times:
    """How long a run takes that begins in a new process, with nothing compiled by an earlier one."""
    device = torch.device(machine.device)
    compiled, graphs = compiles(config, device), uses_graphs(config, device, sizes)
    tokens = [_padded(n) for n in counts.steps] if graphs else counts.steps
    contexts = counts.contexts / len(tokens)
    steps = [step(sizes, config, n, contexts) for n in tokens]
    training = sum(machine.seconds(work, graphs) for work in steps)
    measured, each = measurements(config), measurement(sizes, config, counts)
    anchoring = generation_seconds(sizes, anchor_response_tokens(config), IN_FLIGHT, machine)
    if config.objective.anchored:
        once = counts.contexts * contexts_taken(config) / (config.objective.contexts * len(tokens))
        anchoring += machine.seconds(forward(sizes, once, 0, anchored_blocks(sizes, config)))
    loading = weight_bytes(sizes, config, machine.device) / LOAD_BYTES
    again = loading * (config.training.method == "full")  # for the distance from the base
    return Times(
        starting=START if machine.device == "cuda" else START_CPU,
        loading=loading,
        compiling=compiled * (COMPILING + COMPILING_MEASURING),
        recording=graphs * RECORDING * min(len(tokens), BUCKETS * len(set(tokens))),
        anchoring=anchoring,
        reading=(sum(counts.steps) + counts.heldout) / TOKENISED + RENDERING,
        training=training,
        measurements=measured,
        measurement=machine.seconds(each) + STATISTICS + STATISTICS_D * sizes.hidden_size + again,
        writing=written_bytes(sizes, config) / WRITTEN,
        device=sum(map(machine.busy, steps)) + (measured - 1) * machine.busy(each),
        step=training / len(tokens),
    )


def contexts_taken(config: RunConfig) -> int:
    """Contexts that an anchored run takes at most, each counted once."""
    personas, questions = anchor_sets(config.objective)
    drawn = config.objective.contexts * config.training.steps
    return min(drawn, len(personas.prompts) * len(questions.questions))


def anchor_response_tokens(config: RunConfig) -> int:
    """Of the base's responses over which a run is anchored, at most: one for each context that it takes."""
    return contexts_taken(config) * config.objective.anchor_responses if config.objective.anchor_responses else 0


def measurements(config: RunConfig) -> int:
    """How often the model is measured, the base included."""
    return 1 + sum(config.training.measures(step) for step in range(1, config.training.steps + 1))


def measurement(sizes: ModelConfig, config: RunConfig, counts: Counts) -> Work:
    """The prompts up to the last block that is measured, and the losses of the held-out rows."""
    most = config.execution.measuring_tokens
    last = max(config.probe.measured(sizes.probe_layer))
    work = forward(sizes, counts.prompts, 0, last + 1, math.ceil(counts.prompts / most) + 1)
    return work + forward(sizes, counts.heldout, SUPERVISED * counts.heldout, passes=math.ceil(counts.heldout / most))


def _padded(tokens: int) -> int:
    """The tokens of the bucket that a step falls into."""
    return -(-(tokens + 1) // TOKENS) * TOKENS


def weight_bytes(sizes: ModelConfig, config: RunConfig, device: str) -> int:
    """Bytes of the weights in the precision that they are used in."""
    half = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and device == "cuda")
    return sizes.parameters * (2 if half else 4)


def checkpoint_bytes(sizes: ModelConfig, config: RunConfig) -> int:
    """Bytes of one named checkpoint."""
    return 4 * adapter_parameters(sizes, config) if config.training.method == "lora" else 2 * sizes.parameters


def state_bytes(sizes: ModelConfig, config: RunConfig) -> int:
    """Bytes of a rolling checkpoint: a master and two moments in fp32."""
    return 12 * learned_parameters(sizes, config)


def written_bytes(sizes: ModelConfig, config: RunConfig) -> int:
    """Bytes that a run writes at its named steps; a rolling checkpoint goes with each but the last."""
    named = len(config.training.checkpoints)
    return named * checkpoint_bytes(sizes, config) + max(0, named - 1) * state_bytes(sizes, config)
