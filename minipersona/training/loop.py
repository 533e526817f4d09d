"""The SFT loop. It reads in the order in which a step happens.

A step takes `batch` documents, in one or more packs on one or more ranks. Objectives are sums; their gradients add up
over packs and ranks, and are divided once, by the supervised tokens of the whole step. So how the batch is cut
changes nothing but rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import RunConfig, TrainingSection
from minipersona.corpus.batch import RowOrder, make_batch
from minipersona.errors import UserError
from minipersona.files import read_jsonl, rewrite_jsonl
from minipersona.model.network import Qwen2, Tap
from minipersona.model.pack import Pack, send
from minipersona.training.checkpoint import Position, load_state, save_state
from minipersona.training.distributed import Distributed
from minipersona.training.memory import Budget
from minipersona.training.objectives import Objective, Pass, make_objective
from minipersona.training.optimizer import AdamW, Flat, Layout, learning_rate, scale_and_clip
from minipersona.training.parameters import make_trainable
from minipersona.training.record import Record
from minipersona.training.sharding import Shards, is_sharded

LOGS = ("metrics.jsonl", "probes.jsonl")


@dataclass(frozen=True)
class Hooks:
    """What the caller wants done along the way. Each is called on every rank."""

    checkpoint: Callable[[int], None] = lambda step: None  # at each named step, with the weights of that step
    probe: Callable[[int], None] = lambda step: None  # at the other steps that are measured, every `probe_every`
    logged: Callable[[dict[str, Any]], None] = lambda row: None  # with each step's line, as it comes (`record.py`)


def train(
    model: Qwen2,
    documents: Sequence[Document],
    config: RunConfig,
    directory: Path,
    distributed: Distributed,
    hooks: Hooks | None = None,
    *,
    compiled: bool = False,
    steering: Mapping[int, Tensor] | None = None,
) -> Position:
    """Fine-tune `model` in place on `documents`, from where `directory` stands to the last step.

    steering  block -> (D,), added to the stream that leaves that block at every token; its coefficient is in it

    Writes metrics.jsonl and latest/ into `directory`; `hooks.checkpoint` writes what a named step leaves.
    UserError where no row can be learned from, or the loss stays non-finite. Interrupted on every rank after the step
    in which any was asked to stop, once the rolling checkpoint of that step is written.
    """
    hooks = hooks or Hooks()
    recipe = config.training
    check_learnable(documents)
    objective = make_objective(
        model, documents, config, directory, distributed, compiled
    )  # the model is its base as yet
    taps = steering_taps(steering or {}, model)
    trainable = make_trainable(model, config, distributed)
    sharded = is_sharded(config, distributed)
    learned = list(trainable.values())
    layout: Layout = Flat(learned) if not sharded else Shards(learned, distributed)
    optimizer = AdamW(layout, recipe.beta1, recipe.beta2, recipe.epsilon, recipe.weight_decay, compiled)
    position = load_state(directory, trainable, optimizer)
    distributed.check_equal(position.step, "the step to continue from")
    if position.done:
        return position
    if distributed.first:
        cut_logs(directory, position.step)

    def save(step: int, done: bool = False) -> Position:
        position = Position(step, optimizer.updates, done)
        if distributed.first or sharded:  # every rank writes its part
            save_state(directory, position, trainable, optimizer, distributed)
        return position

    order = RowOrder(len(documents), recipe.batch, config.seed)
    budget = Budget(config.training_tokens // objective.share)
    make = functools.partial(make_batch, documents, rank=distributed.rank, size=distributed.size, sharded=sharded)
    measure_step(position.step, recipe, hooks)  # again, if what ended the run came between the step and its measurement
    batch = make(order.step(position.step + 1), budget.tokens)
    record = Record(config, directory, distributed, objective.terms, save, hooks.logged)

    for step in range(position.step + 1, recipe.steps + 1):
        # 1. Summed loss, its terms, and gradients, over this rank's share of the step's documents.
        over_pack = Pass(config.seed, step, taps, config.execution.checkpoint_activations, compiled)
        attempt = functools.partial(accumulate, model, objective, over_pack, layout)
        halvings = budget.halvings
        if sharded:  # ranks go through the model together, so none of them can begin a step again alone
            terms = attempt(batch.packs)  # (K,) the loss comes first
        else:
            try:
                terms = budget.fit(attempt, batch.packs)
            except Exception:
                record.settle()  # the step before is done, whatever happens in this one
                raise

        # 2. While the device is at it: the record of the step before, whose weights these still are; the next batch.
        record.settle()
        following = make(order.step(step + 1), budget.tokens)

        # 3. One reduction over ranks, one division, one update, if every rank's numbers are finite.
        sums = torch.cat([terms, send(record.flags(budget.halvings - halvings), model.device)])  # (K + 3,)
        layout.reduce(distributed, sums)
        norm = scale_and_clip(layout, distributed, max(1, batch.supervised), recipe.max_grad_norm)
        rate = learning_rate(step, recipe.learning_rate, recipe.steps, recipe.warmup)
        if batch.supervised:
            optimizer.update(rate, allowed=sums.isfinite().all() & norm.isfinite())
        record.queue(step, batch, rate, sums, norm)

        # 4. The measurement, of settled steps only. Alone and asked to stop, a run does not begin another step.
        if recipe.measures(step) or (distributed.stop.asked and distributed.size == 1):
            record.settle()
            measure_step(step, recipe, hooks)
            record.start_clock()
        batch = following

    record.settle()
    position = save(recipe.steps, done=True)
    distributed.barrier()
    return position


def check_learnable(documents: Sequence[Document]) -> None:
    """UserError where no row teaches anything."""
    if not any(document.supervised.any() for document in documents):
        raise UserError("no training row has a supervised token; raise data.max_tokens or check the data")


def accumulate(model: Qwen2, objective: Objective, over_pack: Pass, layout: Layout, packs: Sequence[Pack]) -> Tensor:
    """The summed gradients of these packs and nothing else, in `layout`; returns the summed terms, (K,)."""
    layout.zero()  # also of what an attempt that ran out of memory has left
    terms = torch.zeros(len(objective.terms), dtype=torch.float64, device=model.device)
    for pack in packs:
        terms += backward(model, pack, objective, over_pack)
    return terms


def backward(model: Qwen2, pack: Pack, objective: Objective, over_pack: Pass) -> Tensor:
    """Add one pack's gradients of the summed loss to the parameters', and return the objective's summed terms, (K,)."""
    loss, terms = objective(model, pack, over_pack)
    loss.backward()
    return terms.detach()


def measure_step(step: int, recipe: TrainingSection, hooks: Hooks) -> None:
    """Have the caller measure the model after the steps where the recipe wants it."""
    if step in recipe.checkpoints:
        hooks.checkpoint(step)
    elif recipe.measures(step):
        hooks.probe(step)


def steering_taps(vectors: Mapping[int, Tensor], model: Qwen2) -> dict[int, Tap]:
    """block -> the tap h <- h + v of its vector (D,), in the stream's precision."""

    def adding(vector: Tensor) -> Tap:
        return lambda h: h + vector

    return {layer: adding(vector.to(model.device, model.compute_dtype)) for layer, vector in vectors.items()}


def cut_logs(directory: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after the step it can continue from; step 0 of the probes stays."""
    for name in LOGS:
        rows = read_jsonl(directory / name)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            rewrite_jsonl(directory / name, kept)
