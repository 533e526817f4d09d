"""The SFT loop. It reads in the order in which a step happens.

A step takes `batch` documents, in one or more packs on one or more ranks. Objectives are sums; their gradients add up
over packs and ranks, and are divided once, by the supervised tokens of the whole step. So how the batch is cut
changes nothing but rounding.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import RunConfig, TrainingSection
from minipersona.corpus.order import RowOrder
from minipersona.corpus.packing import deal, pack_documents, share_out
from minipersona.errors import Interrupted, UserError
from minipersona.files import append_jsonl, read_jsonl, rewrite_jsonl
from minipersona.model.network import Qwen2, Tap
from minipersona.model.pack import Pack, make_pack
from minipersona.training.checkpoint import Position, load_state, save_state
from minipersona.training.layout import Flat, Layout, Shards
from minipersona.training.memory import Budget
from minipersona.training.objectives import Objective, Pass, make_objective
from minipersona.training.optimizer import AdamW, scale_and_clip
from minipersona.training.schedule import learning_rate
from minipersona.training.sharding import is_sharded
from minipersona.training.trainable import make_trainable
from minipersona.training.world import World

LOGS = ("metrics.jsonl", "probes.jsonl")


@dataclass(frozen=True)
class Hooks:
    """What the caller wants done along the way. Each is called on every rank."""

    checkpoint: Callable[[int], None] = lambda step: None  # at each named step, with the weights of that step
    probe: Callable[[int], None] = lambda step: None  # at the other steps that are measured, every `probe_every`
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
    objective = make_objective(model, documents, config, directory, world, compiled)  # the model is its base as yet
    taps = steering_taps(steering or {}, model)
    trainable = make_trainable(model, config, world)
    sharded = is_sharded(config, world)
    learned = list(trainable.values())
    layout: Layout = Flat(learned) if not sharded else Shards(learned, world)
    optimizer = AdamW(layout, recipe.beta1, recipe.beta2, recipe.epsilon, recipe.weight_decay, compiled)
    position = load_state(directory, trainable, optimizer)
    world.agree(position.step, "the step to continue from")
    if position.done:
        return position
    if world.first:
        cut_logs(directory, position.step)
    order = RowOrder(len(documents), recipe.batch, config.seed)
    budget = Budget(config.training_tokens // objective.share)
    make = functools.partial(make_batch, documents, world=world, sharded=sharded)
    measure_step(position.step, recipe, hooks)  # again, if what ended the run came between the step and its measurement
    batch = make(order.step(position.step + 1), budget.tokens)
    started = saved = time.monotonic()
    diverged = 0

    for step in range(position.step + 1, recipe.steps + 1):
        # 1. Summed loss, its terms, and gradients, over this rank's share of the step's documents.
        over_pack = Pass(config.seed, step, taps, config.execution.checkpoint_activations, compiled)
        attempt = functools.partial(accumulate, model, objective, over_pack, layout)
        halvings = budget.halvings
        if sharded:  # ranks go through the model together, so none of them can begin a step again alone
            with world.passes():
                terms = attempt(batch.packs)  # (K,) the loss comes first
        else:
            terms = budget.fit(attempt, batch.packs)
        following = make(order.step(step + 1), budget.tokens)  # while the device still works
        asked, halved = (terms.new_full((1,), flag) for flag in (world.stop.asked, budget.halvings - halvings))

        # 2. One reduction over ranks, one division, one update. Every rank sees the same numbers and decides alike.
        sums = torch.cat([terms, asked, halved])  # (K + 2,)
        layout.reduce(world, sums)
        norm = scale_and_clip(layout, world, max(1, batch.supervised), recipe.max_grad_norm)
        *totals, stopping, shortages, grad_norm = torch.cat([sums, norm.double().view(1)]).tolist()
        means = [total / max(1, batch.supervised) for total in totals]
        finite = all(map(math.isfinite, (*means, grad_norm)))
        rate = learning_rate(step, recipe.learning_rate, recipe.steps, recipe.warmup)
        if batch.supervised and finite:
            optimizer.update(rate)

        # 3. The record.
        now = time.monotonic()
        row = {
            "step": step,
            **{name: mean if finite else None for name, mean in zip(objective.terms, means, strict=True)},
            "supervised_tokens": batch.supervised,
            "tokens": batch.tokens,
            "grad_norm": grad_norm if finite else None,
            "lr": rate,
            "tokens_per_second": batch.tokens / (now - started),
        }
        if not batch.supervised:
            row["skipped"] = "no supervised token"
        elif not finite:
            row |= {"skipped": "non-finite loss or gradient", "documents": batch.rows}
        if shortages:
            row["out_of_memory"] = int(shortages)  # how often a rank began the step again, in smaller packs
        diverged = 0 if finite else diverged + 1
        if world.first:
            append_jsonl(directory / "metrics.jsonl", row, durable=False)
        hooks.logged(row)
        if diverged and diverged == recipe.most_non_finite:
            raise UserError(
                f"step {step}: loss or gradient non-finite {diverged} steps in a row (rows {batch.rows}); "
                "lower training.learning_rate or look at these rows"
            )

        # 4. The rolling checkpoint, then the measurement: what ends the run in between repeats the measurement only.
        due = time.monotonic() - saved > 60 * config.execution.save_minutes
        if sharded:  # every rank writes its part
            due = bool(world.follow(due))
        if (world.first or sharded) and (due or stopping or recipe.measures(step)):
            save_state(directory, Position(step, optimizer.updates), trainable, optimizer, world)
            saved = time.monotonic()
        if stopping:
            world.wait()  # for the first rank's checkpoint: where one rank ends, its launcher ends the others
            raise Interrupted(f"stopped after step {step}")
        measure_step(step, recipe, hooks)
        batch, started = following, time.monotonic() if recipe.measures(step) else now

    position = Position(recipe.steps, optimizer.updates, done=True)
    if world.first or sharded:
        save_state(directory, position, trainable, optimizer, world)
    world.wait()
    return position


def check_learnable(documents: Sequence[Document]) -> None:
    """UserError where no row teaches anything."""
    if not any(document.supervised.any() for document in documents):
        raise UserError("no training row has a supervised token; raise data.max_tokens or check the data")


@dataclass(frozen=True)
class Batch:
    """A step's documents. Rows that teach nothing are left out."""

    rows: list[int]  # of the whole step, on every rank
    tokens: int  # likewise
    supervised: int  # likewise
    packs: list[Pack]  # of this rank


def make_batch(
    documents: Sequence[Document], rows: Sequence[int], pack_tokens: int, world: World, sharded: bool = False
) -> Batch:
    """Deal a step's rows to the ranks, and pack this rank's share. Sharded ranks all get the same number of packs."""
    useful = [row for row in rows if documents[row].supervised.any()]
    lengths = [len(documents[row]) for row in useful]
    hands = [[useful[i] for i in hand] for hand in deal(lengths, world.size)]
    packs = make_packs(documents, hands[world.rank], pack_tokens)
    if sharded and useful:
        most = max(len(share_out([len(documents[row]) for row in hand], pack_tokens)) for hand in hands)
        packs = make_packs(documents, hands[world.rank], pack_tokens, most)
        packs += [_idle(documents[useful[0]])] * (most - len(packs))
    supervised = sum(int(documents[row].supervised.sum()) for row in useful)
    return Batch(useful, sum(lengths), supervised, packs)


def make_packs(documents: Sequence[Document], rows: Sequence[int], pack_tokens: int, at_least: int = 1) -> list[Pack]:
    """The packs of some rows, none of them empty; a document's identity is its row."""
    return [
        pack_documents([documents[rows[i]] for i in group], [rows[i] for i in group])
        for group in share_out([len(documents[row]) for row in rows], pack_tokens, at_least)
        if group
    ]


def _idle(document: Document) -> Pack:
    """A few tokens that teach nothing: for a rank that has no documents left while others still go over theirs."""
    return make_pack([document.ids[:8]])


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
