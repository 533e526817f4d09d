"""What an objective asks of the network: which passes over a pack, and what becomes of their states.

T = tokens of the pack, N = supervised tokens, D = width
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import RunConfig
from minipersona.corpus.batch import RowOrder, pack_documents
from minipersona.errors import UserError
from minipersona.files import read_json, write_json
from minipersona.model.dropout import token_keys
from minipersona.model.lora import adapter_disabled
from minipersona.model.network import EMBEDDING, Qwen2, Tap
from minipersona.model.pack import Pack, send, split
from minipersona.objective.cross_entropy import cross_entropy
from minipersona.objective.divergence import Direction
from minipersona.objective.head import Reference
from minipersona.objective.kl_to_base import kl_to_base
from minipersona.objective.noise import EPSILONS, Kind, NoiseCheck, check_noise, embedding_noise
from minipersona.objective.r3f import add_to_second_half, r3f, twice
from minipersona.training.distributed import Distributed

OBJECTIVE_CHECK = "objective_check.json"
CHECKED_TOKENS = 1_024  # for R3F's noise: millions of its entries. In fp32 all scores of attention exist at once


@dataclass(frozen=True)
class Pass:
    """How the model that learns goes over a pack: in which step, steered how, and with what saved."""

    seed: int
    step: int
    taps: Mapping[int, Tap] = field(default_factory=dict)
    checkpoint_activations: bool = False
    compiled: bool = False

    def keys(self, model: Qwen2, pack: Pack) -> Tensor:
        """(T,) int32 on the model's device: what dropout and noise hang on. The pack lies on the CPU."""
        return send(token_keys(self.seed, self.step, pack), model.device)

    def states(self, model: Qwen2, pack: Pack, keys: Tensor, noise: Tap | None = None) -> Tensor:
        """(N, D) states that predict; the pack lies on the model's device."""
        assert EMBEDDING not in self.taps, "the embedding's tap is the noise's"
        taps = dict(self.taps) if noise is None else {**self.taps, EMBEDDING: noise}
        return model(
            pack, taps=taps, dropout_keys=keys, checkpoint_activations=self.checkpoint_activations,
            last_rows=pack.supervised,
        )  # fmt: skip


class Objective(Protocol):
    """Maps (model, pack on the CPU, pass) to the summed loss () and all summed terms (K,), the loss first."""

    terms: ClassVar[tuple[str, ...]]  # names of the K terms
    share: ClassVar[int]  # of the budget of tokens a pass, what its packs may take: one in this many

    def __call__(self, model: Qwen2, pack: Pack, run: Pass) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Plain SFT."""

    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy")
    share: ClassVar[int] = 1

    def __call__(self, model: Qwen2, pack: Pack, run: Pass) -> tuple[Tensor, Tensor]:
        keys, pack = run.keys(model, pack), pack.to(model.device)
        states, targets = run.states(model, pack, keys), pack.targets[pack.supervised]
        loss = cross_entropy(states, model.lm_head.weight, targets, compiled=run.compiled)
        return loss, loss.detach().expand(2)


@dataclass(frozen=True)
class KLToBase:
    """SFT held near the base: the model without its adapters, or a frozen copy where all weights learn.

    The base is the base as it is: no dropout, no steering. Its states are there before the model's graph is.
    """

    beta: float
    direction: Direction
    frozen: Qwen2 | None = None
    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "kl")
    share: ClassVar[int] = 1

    def __call__(self, model: Qwen2, pack: Pack, run: Pass) -> tuple[Tensor, Tensor]:
        keys, pack = run.keys(model, pack), pack.to(model.device)
        base = self.frozen or model
        with torch.no_grad(), contextlib.nullcontext() if self.frozen else adapter_disabled(model):
            reference = Reference(base(pack)[pack.supervised], base.lm_head.weight)
        return kl_to_base(
            run.states(model, pack, keys), model.lm_head.weight, pack.targets[pack.supervised], reference,
            beta=self.beta, direction=self.direction, compiled=run.compiled,
        )  # fmt: skip


@dataclass(frozen=True)
class R3F:
    """SFT held near itself under noise: both branches in one pass, under the same dropout and the same steering."""

    lam: float
    noise: Kind
    epsilon: float
    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy", "kl")
    share: ClassVar[int] = 2  # every token is there twice

    def __call__(self, model: Qwen2, pack: Pack, run: Pass) -> tuple[Tensor, Tensor]:
        keys, pack = run.keys(model, pack), pack.to(model.device)
        noise = embedding_noise(keys, self.noise, self.epsilon, model.config.hidden_size)  # (T, D)
        states = run.states(model, twice(pack), keys.repeat(2), add_to_second_half(noise))  # (2N, D)
        clean, noisy = states.chunk(2)
        targets = pack.targets[pack.supervised]
        return r3f(clean, noisy, model.lm_head.weight, targets, lam=self.lam, compiled=run.compiled)


def make_objective(
    model: Qwen2,
    documents: Sequence[Document],
    config: RunConfig,
    directory: Path,
    distributed: Distributed,
    compiled: bool,
) -> Objective:
    """The objective of a config. `model` is the base, before anything is made trainable.

    R3F's noise is looked at on the first step's rows, and what was found is kept in objective_check.json: a run that
    continues goes on with the same epsilon.
    """
    section = config.objective
    if section.kind == "kl_to_base":
        return KLToBase(section.weight, section.direction, _frozen_copy(model, config, compiled))
    if section.kind == "r3f":
        file = directory / OBJECTIVE_CHECK
        if distributed.first and not file.is_file():
            write_json(file, asdict(_check_noise(model, documents, config)))
        distributed.barrier()
        return R3F(section.weight, section.noise, read_json(file)["epsilon"])
    return CrossEntropy()


def _frozen_copy(model: Qwen2, config: RunConfig, compiled: bool) -> Qwen2 | None:
    if config.training.method == "lora":
        return None
    base = copy.deepcopy(model).requires_grad_(False)
    base.prepare()  # what an earlier pass had laid out was copied beside the weights that were views of it
    if compiled:
        base.compile_blocks()
    return base


def _check_noise(model: Qwen2, documents: Sequence[Document], config: RunConfig) -> NoiseCheck:
    section = config.objective
    order = RowOrder(len(documents), config.training.batch, config.seed)
    steps = (order.step(step) for step in range(1, config.training.steps + 1))
    rows = next(useful for step in steps if (useful := [row for row in step if documents[row].supervised.any()]))
    rows = [rows[i] for i in split([len(documents[row]) for row in rows], CHECKED_TOKENS)[0]]
    pack = pack_documents([documents[row] for row in rows], rows)
    tokens = token_keys(config.seed, 1, pack).to(model.device)
    epsilons = (section.epsilon,) if section.epsilon else EPSILONS
    check = check_noise(model, pack.to(model.device), tokens, section.noise, epsilons)
    if not all(map(math.isfinite, (check.cosine, check.kl, check.kl_fp32))):
        raise UserError("objective r3f: the base's logits are not finite on the first step's rows; check the model")
    return check
