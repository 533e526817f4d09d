"""The SFT loop. It reads in the order in which a step happens.

A step takes `batch` documents, in one or more packs on one or more ranks. Objectives are sums; their gradients add up
over packs and ranks, and are divided once, by the supervised tokens of the whole step. So how the batch is cut
changes nothing but rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipersona.chat import Document
from minipersona.config import RunConfig
from minipersona.corpus.order import RowOrder
from minipersona.corpus.packing import deal, pack_documents, split
from minipersona.errors import UserError
from minipersona.files import append_jsonl, read_jsonl, rewrite_jsonl
from minipersona.model.dropout import token_keys
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.cross_entropy import cross_entropy
from minipersona.training.checkpoint import Position, load_state, save_state
from minipersona.training.optimizer import AdamW, scale_and_clip
from minipersona.training.schedule import learning_rate
from minipersona.training.trainable import make_trainable
from minipersona.training.world import World

MOST_NON_FINITE = 5  # steps in a row without a finite gradient; then the run has diverged
LOGS = ("metrics.jsonl", "probes.jsonl")


@dataclass(frozen=True)
class Hooks:
    """What the caller wants done along the way. Each is called on every rank."""

    checkpoint: Callable[[int], None] = lambda step: None  # at each named step, with the weights of that step
    logged: Callable[[dict[str, Any]], None] = lambda row: None  # after each step, with its line of metrics.jsonl


def train(
    model: Qwen2,
    documents: Sequence[Document],
    config: RunConfig,
    directory: Path,
    world: World,
    hooks: Hooks | None = None,
    *,
    compiled: bool = False,
) -> Position:
    """Fine-tune `model` in place on `documents`, from where `directory` stands to the last step.

    Writes metrics.jsonl and latest/ into `directory`; `hooks.checkpoint` writes what a named step leaves.
    UserError where no row can be learned from, or the loss stays non-finite.
    """
    hooks = hooks or Hooks()
    recipe = config.training
    trainable = make_trainable(model, config)
    parameters = list(trainable.values())
    optimizer = AdamW(parameters, recipe.beta1, recipe.beta2, recipe.epsilon, recipe.weight_decay)
    position = load_state(directory, trainable, optimizer)
    world.agree(position.step, "the step to continue from")
    if position.done:
        return position
    if world.first:
        cut_logs(directory, position.step)
    check_learnable(documents)
    order = RowOrder(len(documents), recipe.batch, config.seed)
    gradients = [torch.zeros_like(p) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    saved = time.monotonic()
    diverged = 0

    for step in range(position.step + 1, recipe.steps + 1):
        started = time.monotonic()

        # 1. The batch: this rank's share of the step's documents, as packs. Rows that teach nothing are left out.
        rows = [row for row in order.step(step) if documents[row].supervised.any()]
        lengths = [len(documents[row]) for row in rows]
        supervised = sum(int(documents[row].supervised.sum()) for row in rows)  # of the whole step, on every rank
        mine = [rows[i] for i in deal(lengths, world.size)[world.rank]]
        packs = make_packs(documents, mine, config.execution.pack_tokens)

        # 2. Summed loss and gradients.
        torch._foreach_zero_(gradients)
        loss_sum = torch.zeros((), device=model.device)
        for pack in packs:
            loss_sum += backward(model, pack, config, step, compiled)

        # 3. One reduction over ranks, one division, one update. Every rank sees the same numbers and decides alike.
        extras = loss_sum.double().view(1)
        world.sum_gradients(parameters, extras)
        norm = scale_and_clip(parameters, max(1, supervised), recipe.max_grad_norm)
        loss, grad_norm = torch.stack([extras[0] / max(1, supervised), norm.double()]).tolist()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        rate = learning_rate(step, recipe.learning_rate, recipe.steps, recipe.warmup)
        if supervised and finite:
            optimizer.update(rate)

        # 4. The record.
        seconds = time.monotonic() - started
        row = {
            "step": step,
            "loss": loss if finite else None,
            "cross_entropy": loss if finite else None,
            "supervised_tokens": supervised,
            "tokens": sum(lengths),
            "grad_norm": grad_norm if finite else None,
            "lr": rate,
            "tokens_per_second": sum(lengths) / seconds,
        }
        if not supervised:
            row["skipped"] = "no supervised token"
        elif not finite:
            row |= {"skipped": "non-finite loss or gradient", "documents": rows}
        diverged = 0 if finite else diverged + 1
        if world.first:
            append_jsonl(directory / "metrics.jsonl", row)
        hooks.logged(row)
        if diverged == MOST_NON_FINITE:
            raise UserError(
                f"step {step}: loss or gradient non-finite {diverged} steps in a row (rows {rows}); "
                "lower training.learning_rate or look at these rows"
            )

        # 5. Checkpoints: what the named step leaves comes first, so that a kill in between only repeats it.
        position = Position(step, optimizer.updates)
        if step in recipe.checkpoints:
            hooks.checkpoint(step)
        due = time.monotonic() - saved > 60 * config.execution.save_minutes
        if world.first and step < recipe.steps and (due or step in recipe.checkpoints):
            save_state(directory, position, trainable, optimizer)
            saved = time.monotonic()

    position = Position(recipe.steps, optimizer.updates, done=True)
    if world.first:
        save_state(directory, position, trainable, optimizer)
    world.wait()
    return position


def check_learnable(documents: Sequence[Document]) -> None:
    """UserError where no row teaches anything."""
    if not any(document.supervised.any() for document in documents):
        raise UserError("no training row has a supervised token; raise data.max_tokens or check the data")


def make_packs(documents: Sequence[Document], rows: Sequence[int], pack_tokens: int) -> list[Pack]:
    """The packs of some rows, in order; a document's identity is its row."""
    return [
        pack_documents([documents[rows[i]] for i in group], [rows[i] for i in group])
        for group in split([len(documents[row]) for row in rows], pack_tokens)
    ]


def backward(model: Qwen2, pack: Pack, config: RunConfig, step: int, compiled: bool) -> torch.Tensor:
    """Add one pack's gradients of the summed loss to the parameters', and return that loss, ()."""
    keys = token_keys(config.seed, step, pack).to(model.device, non_blocking=True)  # (T,)
    pack = pack.to(model.device)
    hidden = model(pack, dropout_keys=keys, checkpoint_activations=config.execution.checkpoint_activations)  # (T, D)
    loss = cross_entropy(
        hidden[pack.supervised], model.lm_head.weight, pack.targets[pack.supervised], compiled=compiled
    )
    loss.backward()
    return loss.detach()


def cut_logs(directory: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after the step it can continue from; step 0 of the probes stays."""
    for name in LOGS:
        rows = read_jsonl(directory / name)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            rewrite_jsonl(directory / name, kept)
