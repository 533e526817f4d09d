"""How long the passes of a run take, computed before they are made: a model of products, bytes and launches.

A pass through the network is `Work`: P operations of matrix products, B bytes that other kernels move, and K kernels.
It takes the longer of

    device   P / rate + B / bandwidth + K * KERNEL
    host     K * launch, and next to nothing where the pass is a CUDA graph

seconds. A product's operands count as bytes too, since a thin product waits for them. On a CPU, P / rate is all.

`Machine` holds the three speeds, measured when the plan is made. The constants below were fitted to the 7B's figures in
docs/log.md and to one run of SmolLM2-135M-Instruct on an H200, and checked on others there. `python -m benchmarks.plan`
holds them against short runs.

T = tokens of a pass, D = width of the stream, F = width of the MLP, V = vocabulary
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from minipersona.chat import Document
from minipersona.config import ObjectiveSection, RunConfig
from minipersona.corpus.batch import make_packs
from minipersona.model.config import ModelConfig
from minipersona.model.load import load_model
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass
from minipersona.run.resources import DTYPES
from minipersona.training.distributed import Distributed
from minipersona.training.loop import backward
from minipersona.training.parameters import make_trainable

SMALL = 100e6  # parameters of a model whose own step is timed on a CPU; a larger one is judged by a large product
REACHED = {"cuda": 0.9, "cpu": 0.6}  # of a large product's rate
# A forward pass, per token and block: values of two bytes that kernels other than products read and write, for each
# channel of the MLP and of the stream; how many kernels they are; and what adapters with dropout add to each.
MOVED_F, MOVED_D, KERNELS = 3, 12, 14
ADAPTER_F, ADAPTER_D, ADAPTER_KERNELS = 2, 5, 18
ATTENTION = 6000  # bytes that are moved in the time of a head's attention, for a token of documents of some 300
HEAD_BYTES = 12  # per logit of a token whose loss is computed, forward and backward
UPDATE_BYTES = 48  # per parameter that learns, of its gradient's norm, its update and its copy in bf16
KERNEL = 2.4e-6  # seconds that the device takes for a kernel beyond its products and bytes
LAUNCHES = 10.0  # a kernel's launch from within the network, in launches of a plain addition
SUPERVISED = 0.7  # of a row's tokens
CACHED = 300  # tokens whose keys and values a token of an answer reads
TOKEN_STEP = 6e-3  # seconds that the host takes for the next token of all answers in flight


@dataclass(frozen=True)
class Work:
    """What one or more passes do."""

    products: float = 0.0  # floating-point operations
    moved: float = 0.0  # bytes
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.moved + other.moved, self.kernels + other.kernels)

    def __mul__(self, times: float) -> Work:
        return Work(self.products * times, self.moved * times, self.kernels * times)


@dataclass(frozen=True)
class Machine:
    """What a device reaches: floating-point operations and bytes a second, seconds that the host takes for a launch."""

    device: str
    products: float
    bandwidth: float = math.inf
    launch: float = 0.0

    def __str__(self) -> str:
        if self.device == "cpu":
            return f"this CPU, which reaches {self.products / 1e9:,.1f} GFLOP/s"
        return (
            f"this GPU, which reaches {self.products / 1e12:.0f} TFLOP/s and {self.bandwidth / 1e12:.2f} TB/s, and its "
            f"host, which launches a kernel in {self.launch * 1e6:.0f} microseconds"
        )

    def busy(self, work: Work) -> float:
        """Seconds of the device."""
        kernel = KERNEL if self.device == "cuda" else 0.0
        return work.products / self.products + work.moved / self.bandwidth + work.kernels * kernel

    def seconds(self, work: Work, graphs: bool = False) -> float:
        """Seconds until it is done."""
        return max(self.busy(work), 0.0 if graphs else work.kernels * self.launch)


def measure_machine(config: RunConfig, sizes: ModelConfig, device: str) -> Machine:
    """The machine that this process runs on, in half a second; on a CPU, by the step of a model that is small."""
    if device == "cpu" and sizes.parameters <= SMALL:
        return Machine(device, _reached_in_own_step(config, sizes))
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    rate = REACHED[device] * 2 * size**3 / _fastest(lambda: a @ a, device)
    if device == "cpu":
        return Machine(device, rate)
    source, small = torch.empty(2**30, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    copying = _fastest(source.clone, device)
    launching = _fastest(lambda: [small.add_(1.0) for _ in range(1000)], device) / 1000
    return Machine(device, rate, 2 * source.numel() / copying, LAUNCHES * launching)


def _reached_in_own_step(config: RunConfig, sizes: ModelConfig) -> float:
    """Floating-point operations a second of a training step on random tokens, the first one aside."""
    model = load_model(config.model.name, dtype=DTYPES[config.model.dtype], device="cpu")
    make_trainable(model, config, Distributed(0, 1, model.device))
    rng, length = np.random.default_rng(0), 75
    documents = [
        Document(rng.integers(0, sizes.vocab_size, length).astype(np.int32), np.arange(length) > 40, False)
        for _ in range(config.training.batch)
    ]
    packs = make_packs(documents, range(len(documents)), config.training_tokens)
    seconds = []
    for number in (1, 2, 3):
        started = time.perf_counter()
        for pack in packs:
            backward(model, pack, CrossEntropy(), ForwardPass(config.seed, number))
        seconds.append(time.perf_counter() - started)
    plain = replace(config, objective=ObjectiveSection())
    return step(sizes, plain, length * len(documents), 0).products / min(seconds[1:])


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of five calls."""
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


# ---------------------------------------------------------------- what passes do


def forward(sizes: ModelConfig, tokens: float, logits: float, blocks: int = 0, passes: float = 1) -> Work:
    """Passes without gradients over so many tokens together, with the logits of some of them.

    blocks  stop after so many; 0 goes through all of them
    """
    d, f, blocks = sizes.hidden_size, sizes.intermediate_size, blocks or sizes.num_hidden_layers
    products = 2 * tokens * blocks * _block_parameters(sizes) + 2 * logits * d * sizes.vocab_size
    values = MOVED_F * f + MOVED_D * d + _operands(sizes)
    moved = tokens * blocks * (2 * values + ATTENTION * sizes.num_attention_heads)
    return Work(products, moved + logits * sizes.vocab_size * HEAD_BYTES / 2, passes * blocks * KERNELS)


def training(
    sizes: ModelConfig, config: RunConfig, tokens: float, logits: float, blocks: int = 0, passes: float = 1
) -> Work:
    """Passes forward and backward: for each product one by the weight, one for the gradient of its input and, where
    the weight learns, one for the weight's. A recomputed block leaves its last product out.
    """
    d, f, blocks = sizes.hidden_size, sizes.intermediate_size, blocks or sizes.num_hidden_layers
    again = config.execution.checkpoint_activations
    once = forward(sizes, tokens, logits, blocks, passes)
    work = once * 3
    if config.training.method == "lora":
        values = ADAPTER_F * f + ADAPTER_D * d + _operands(sizes)
        added = Work(0, 2 * tokens * blocks * values, passes * blocks * ADAPTER_KERNELS)
        own = adapter_parameters(sizes, config) * blocks / sizes.num_hidden_layers
        frozen = Work(once.products, 2 * tokens * blocks * _operands(sizes))  # no gradient of these weights
        work += added * (3 + again) + Work(6 * tokens * own) + frozen * -1
    if again:
        work += forward(sizes, tokens, 0, blocks, passes) + Work(-2 * tokens * blocks * d * f)
    return work


def step(sizes: ModelConfig, config: RunConfig, tokens: float, contexts: float) -> Work:
    """A training step over rows of so many tokens, with its anchor's contexts of so many, and its update."""
    kind = config.objective.kind
    passes = math.ceil(tokens / config.training_tokens)
    work = training(sizes, config, tokens, SUPERVISED * tokens, passes=passes)
    if kind == "r3f":
        work *= 2
    elif kind == "kl_to_base":
        work += forward(sizes, tokens, 2 * SUPERVISED * tokens, passes=passes)
    elif config.objective.anchors_predictions:
        work += training(sizes, config, contexts, contexts, passes=0)
        work += forward(sizes, 0, contexts, passes=0)  # of the base, only through the head
    elif config.objective.anchored:
        work += training(sizes, config, contexts, 0, anchored_blocks(sizes, config), passes=0)
    return work + Work(moved=UPDATE_BYTES * learned_parameters(sizes, config))


def generation_seconds(sizes: ModelConfig, tokens: float, batch: int, machine: Machine) -> float:
    """Answers of so many tokens together, `batch` at a time; a token reads all weights, and its keys and values."""
    cache = batch * CACHED * sizes.num_hidden_layers * 4 * sizes.key_width
    moved = 2 * sizes.matmul_parameters + cache + batch * sizes.vocab_size * HEAD_BYTES / 2
    work = Work(2 * batch * sizes.matmul_parameters, moved, sizes.num_hidden_layers * KERNELS)
    return tokens / batch * max(machine.busy(work), TOKEN_STEP if machine.device == "cuda" else 0.0)


def anchored_blocks(sizes: ModelConfig, config: RunConfig) -> int:
    """How many blocks the contexts of an anchor pass."""
    if config.objective.anchors_predictions:
        return sizes.num_hidden_layers
    return max(config.objective.anchor_layers or (sizes.probe_layer,)) + 1


def adapter_parameters(sizes: ModelConfig, config: RunConfig) -> int:
    """Parameters of the adapters that the config asks for."""
    d, f, q, k = sizes.hidden_size, sizes.intermediate_size, sizes.query_width, sizes.key_width
    widths = {"q_proj": d + q, "k_proj": d + k, "v_proj": d + k, "o_proj": q + d, "gate_proj": d + f, "up_proj": d + f,
              "down_proj": f + d}  # fmt: skip
    blocks = len(config.lora.adapted_blocks(sizes.num_hidden_layers))
    return blocks * config.lora.rank * sum(widths[name] for name in config.lora.targets)


def learned_parameters(sizes: ModelConfig, config: RunConfig) -> int:
    """Parameters that training changes."""
    return adapter_parameters(sizes, config) if config.training.method == "lora" else sizes.parameters


def _operands(sizes: ModelConfig) -> int:
    """Values that a block's seven products read and write for a token. A product that is thin waits for them."""
    d, f, q, k = sizes.hidden_size, sizes.intermediate_size, sizes.query_width, sizes.key_width
    return 2 * (d + q) + 2 * (d + k) + 3 * (d + f)


def _block_parameters(sizes: ModelConfig) -> float:
    return (sizes.matmul_parameters - sizes.hidden_size * sizes.vocab_size) / sizes.num_hidden_layers
