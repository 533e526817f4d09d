"""The SFT loop. It reads in the order in which a step happens.

A step takes `batch` documents, in one or more packs on one or more ranks. Objectives are sums; their gradients are
accumulated over packs and ranks and divided once, by the supervised tokens of the whole step. So the way in which the
batch is cut changes nothing but rounding.
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
from minipersona.corpus.batch import Batch, RowOrder, make_batch
from minipersona.errors import UserError, require
from minipersona.files import read_jsonl, rewrite_jsonl
from minipersona.model.network import AddVector, Qwen2, Tap
from minipersona.model.pack import Pack, send
from minipersona.objective import check_objective, make_objective
from minipersona.objective.contexts import Anchored, Contexts
from minipersona.objective.head import ForwardPass, Objective
from minipersona.training.checkpoint import Position, load_state, save_state
from minipersona.training.distributed import Distributed
from minipersona.training.graphs import OBJECTIVES, Graphs
from minipersona.training.memory import Budget
from minipersona.training.null_space import keep_in_null_space, projections
from minipersona.training.optimizer import AdamW, Flat, Layout, learning_rate, norm_and_scale
from minipersona.training.parameters import make_trainable
from minipersona.training.penalty import penalty_ratio
from minipersona.training.record import Record
from minipersona.training.sharding import Shards, is_sharded

LOGS = ("metrics.jsonl", "probes.jsonl")


@dataclass(frozen=True)
class Hooks:
    """Functions of the caller. Each is called on every rank."""

    checkpoint: Callable[[int], None] = lambda step: None  # at each named step, with the weights of that step
    probe: Callable[[int], None] = lambda step: None  # at the other steps that are measured, every `probe_every`
    logged: Callable[[dict[str, Any]], None] = lambda row: None  # with the log line of each step (`record.py`)


def train(trainer: Trainer, hooks: Hooks | None = None) -> Position:
    """Fine-tune the trainer's model in place, from the last checkpoint in its directory to the last step.

    Writes metrics.jsonl and latest/ into the directory; `hooks.checkpoint` writes the model of a named step. UserError
    if the loss stays non-finite. Interrupted, on every rank, after the step in which any rank was asked to stop and
    once its rolling checkpoint is written.
    """
    hooks, recipe, distributed = hooks or Hooks(), trainer.config.training, trainer.distributed
    position = trainer.resume()
    if position.done:
        return position
    measure_step(position.step, recipe, hooks)  # again, if the run ended between the step and its measurement
    following: Batch | None = None  # the batch of the next step
    record = Record(trainer.config, trainer.directory, distributed, trainer.objective.terms, trainer.save, hooks.logged)

    for step in range(position.step + 1, recipe.steps + 1):
        batch = following or trainer.batch(step)

        # 0. At steps that leave a checkpoint: the penalty's share of the gradient, for the record alone.
        ratio = None
        if step in recipe.checkpoints and trainer.objective.weight:  # a weight on the device makes the host wait here
            record.settle()  # so that what this takes counts to no step
            ratio = trainer.penalty_ratio(step, batch.packs)
            record.start_clock()

        # 1. The loss, its terms and its gradients, summed over this rank's share of the step's documents.
        terms, halvings = trainer.gradients(step, batch.packs, on_error=record.settle)  # (K,), the loss first

        # 2. While the device computes: the record of the step before, whose weights these still are; the next batch.
        record.settle()
        following = trainer.batch(step + 1) if step < recipe.steps else None

        # 3. One reduction over ranks, one division, one update, if the numbers of every rank are finite.
        sums = torch.cat([terms, send(record.flags(halvings), trainer.model.device)])  # (K + 3,)
        trainer.layout.reduce(distributed, sums)  # does nothing on one rank
        divisor = max(1, batch.supervised)
        norm, scale = norm_and_scale(trainer.layout, distributed, divisor, recipe.max_grad_norm)
        rate = learning_rate(step, recipe.learning_rate, recipe.steps, recipe.warmup)
        if batch.supervised:
            trainer.optimizer.update(rate, scale, allowed=sums.isfinite().all() & norm.isfinite())
            if trainer.projections:  # none unless the config sets lora.null_space
                keep_in_null_space(trainer.projections)
        record.queue(step, batch, rate, sums, norm, ratio)

        # 4. The measurement, only of settled steps. A single process that was asked to stop begins no other step.
        if recipe.measures(step) or (distributed.stop.asked and distributed.size == 1):
            record.settle()
            measure_step(step, recipe, hooks)
            record.start_clock()

    record.settle()
    position = trainer.save(recipe.steps, done=True)
    distributed.barrier()
    return position


class Trainer:
    """What the steps of a run use: the model with its objective and optimizer, the data, the directory.

    compiled    the losses and the update are compiled; whether the model's blocks are is the model's own matter
    steering    block -> (D,), added to the stream that leaves that block at every token; it contains its coefficient
    contexts    what an anchored objective passes beside the rows
    null_space  name of a layer -> U (I, k): directions of its input that adapters are kept off (`null_space.py`)
    graphs      run the passes as CUDA graphs; they are kept there for later runs of this model. Several ranks run
                without

    UserError if no row can be learned from.
    """

    def __init__(
        self, model: Qwen2, documents: Sequence[Document], config: RunConfig, directory: Path,
        distributed: Distributed, *, compiled: bool = False, steering: Mapping[int, Tensor] | None = None,
        contexts: Contexts | None = None, null_space: Mapping[str, Tensor] | None = None, graphs: Graphs | None = None,
    ) -> None:  # fmt: skip
        check_learnable(documents)
        self.model, self.config, self.directory, self.distributed = model, config, directory, distributed
        recipe = config.training
        if distributed.first:
            check_objective(model, documents, config, directory)
        distributed.barrier()
        self.objective = make_objective(model, config, directory, compiled, contexts)  # the model is still its base
        self.parameters = make_trainable(model, config, distributed)
        self.sharded = is_sharded(config, distributed)
        learned = list(self.parameters.values())
        self.graphs = graphs if distributed.size == 1 and type(self.objective) in OBJECTIVES else None
        self.layout: Layout
        if self.sharded:
            self.layout = Shards(learned, distributed)
        elif self.graphs is None:
            self.layout = Flat(learned)
        else:
            self.layout, self.objective = self.graphs.layout(learned), self.graphs.objective(self.objective)
        self.optimizer = AdamW(self.layout, recipe.beta1, recipe.beta2, recipe.epsilon, recipe.weight_decay, compiled)
        self.projections = projections(model, null_space) if null_space else ()
        keep_in_null_space(self.projections)
        self.forward = functools.partial(
            ForwardPass, config.seed, taps=steering_taps(steering or {}, model), compiled=compiled,
            checkpoint_activations=config.execution.checkpoint_activations,
        )  # fmt: skip
        self.budget = Budget(config.training_tokens // self.objective.copies)
        self._documents, self._order = documents, RowOrder(len(documents), recipe.batch, config.seed)

    def resume(self) -> Position:
        """Restore the rolling checkpoint, if there is one; the logs then end at its step."""
        position = load_state(self.directory, self.parameters, self.optimizer)
        self.distributed.check_equal(position.step, "the step to continue from")
        if self.distributed.first and not position.done:
            cut_logs(self.directory, position.step)
        return position

    def save(self, step: int, done: bool = False) -> Position:
        """Write the rolling checkpoint of the weights after this step."""
        position = Position(step, self.optimizer.updates, done)
        if self.distributed.first or self.sharded:  # every rank writes its part of a sharded one
            save_state(self.directory, position, self.parameters, self.optimizer, self.distributed)
        return position

    def batch(self, step: int) -> Batch:
        """The documents of a step, and an anchor's, in packs of as many tokens as memory has allowed so far."""
        rows, ranks, tokens = self._order.step(step), self.distributed, self.budget.tokens
        batch = make_batch(self._documents, rows, tokens, ranks.rank, ranks.size, self.sharded)
        if isinstance(self.objective, Anchored):
            return self.objective.contexts.join(batch, step, tokens, ranks.rank, ranks.size)
        return batch

    def penalty_ratio(self, step: int, packs: Sequence[Pack]) -> float | None:
        """See `penalty.py`. The gradients in the layout are those of no step afterwards."""
        model, forward, layout, ranks = self.model, self.forward(step), self.layout, self.distributed
        fit = (lambda attempt, packs: attempt(packs)) if self.sharded else self.budget.fit
        return penalty_ratio(model, self.objective, forward, layout, ranks, packs, fit)

    def gradients(self, step: int, packs: Sequence[Pack], on_error: Callable[[], None]) -> tuple[Tensor, int]:
        """Leave the summed gradients of these packs in the layout.

        Returns the summed terms (K,), and how often memory ran out, so that the step was computed again. `on_error`
        records the step before, which is done whatever happens in this one.
        """
        attempt = functools.partial(
            accumulate, self.model, self.objective, self.forward(step), self.layout, graphs=self.graphs
        )
        if self.sharded:  # ranks go through the model together, so none of them can compute a step again alone
            return attempt(packs), 0
        before = self.budget.halvings
        try:
            return self.budget.fit(attempt, packs), self.budget.halvings - before
        except Exception:
            on_error()
            raise


def check_learnable(documents: Sequence[Document]) -> None:
    """UserError if no row has a supervised token."""
    if not any(document.supervised.any() for document in documents):
        raise UserError("no training row has a supervised token; raise data.max_tokens or check the data")


def accumulate(
    model: Qwen2, objective: Objective, forward: ForwardPass, layout: Layout, packs: Sequence[Pack],
    *, graphs: Graphs | None = None,
) -> Tensor:  # fmt: skip
    """Set the gradients in `layout` to the sum over these packs; returns the summed terms, (K,)."""
    layout.zero()  # also what an attempt that ran out of memory has left
    terms = torch.zeros(len(objective.terms), dtype=torch.float64, device=model.device)
    one_pack = backward if graphs is None else graphs.backward
    for pack in packs:
        terms += one_pack(model, pack, objective, forward)
    return terms


def backward(model: Qwen2, pack: Pack, objective: Objective, forward: ForwardPass) -> Tensor:
    """Add the gradients of one pack's summed loss to the parameters', and return the summed terms, (K,)."""
    loss, terms = objective(model, pack, forward)
    loss.backward()
    return terms.detach()


def measure_step(step: int, recipe: TrainingSection, hooks: Hooks) -> None:
    """Have the caller measure the model, if the recipe measures it after this step."""
    if step in recipe.checkpoints:
        hooks.checkpoint(step)
    elif recipe.measures(step):
        hooks.probe(step)


def steering_taps(vectors: Mapping[int, Tensor], model: Qwen2) -> dict[int, Tap]:
    """block -> the tap h <- h + v of its vector (D,), in the stream's precision."""
    return {layer: AddVector(vector.to(model.device, model.compute_dtype)) for layer, vector in vectors.items()}


def cut_logs(directory: Path, step: int) -> None:
    """Delete the lines that a killed run wrote after the step it can continue from; step 0 of the probes stays."""
    for name in LOGS:
        rows = read_jsonl(directory / name)
        for number, row in enumerate(rows, 1):
            has_step = isinstance(row, dict) and isinstance(row.get("step"), int)
            require(has_step, f"{directory / name}: line {number} has no step; delete that line")
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            rewrite_jsonl(directory / name, kept)
