"""One fine-tuning run from its config to its directory: load, measure the base, train, measure each checkpoint."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipersona.chat import ChatTokenizer
from minipersona.chat.vocabulary import FILES
from minipersona.config import ModelSection, RunConfig
from minipersona.console import Console, Progress, command_line
from minipersona.corpus.mixtures import training_personas
from minipersona.corpus.training_set import TrainingSet
from minipersona.errors import Interrupted, UserError
from minipersona.files import explained, sweep_temporaries, write_text
from minipersona.hub import locate
from minipersona.locks import lock
from minipersona.model.load import RANDOM
from minipersona.model.network import Qwen2
from minipersona.run.anchors import check_anchors, run_contexts, words
from minipersona.run.directory import (
    CONFIG,
    LATEST,
    LOSSES,
    VECTORS,
    append_measurement,
    baseline_row,
    check_config,
    checkpoint_directory,
    finished,
    link_or_copy,
    losses_file,
    stored_measurement,
    vectors_file,
)
from minipersona.run.judgement import learned_share
from minipersona.run.measurement import Instruments, measure
from minipersona.run.null_space import check_null_space, run_null_space
from minipersona.run.provenance import provenance, write_provenance
from minipersona.run.resources import Resources, compiles, resolve
from minipersona.run.result import MeasurementProtocol
from minipersona.run.steering import check_steering, run_steering
from minipersona.settings import to_toml
from minipersona.training.checkpoint import drop_tensors, stored_position
from minipersona.training.distributed import Distributed
from minipersona.training.loop import Hooks, Trainer, check_learnable, train
from minipersona.training.memory import OUT_OF_MEMORY
from minipersona.training.parameters import distance_from_base, save_checkpoint
from minipersona.training.sharding import is_sharded


def run(config: RunConfig, distributed: Distributed, console: Console) -> None:
    """Carry out a run in ``config.out``, or continue it; a finished one is left as it is.

    Where another run is the baseline, its measurement of the base is taken over if the protocol is the same.

    UserError where the directory belongs to another config, is in use, or anything the config names is amiss, and
    where memory runs out. Interrupted, on every rank, where any was asked to stop.
    """
    directory = Path(config.out)
    with lock(directory) if distributed.first else contextlib.nullcontext():
        config = resolve(config, distributed.device)
        check_config(directory, config)
        evaluate = command_line("evaluate", "--run", directory)
        if finished(directory, config):
            if distributed.first:
                drop_tensors(directory)  # a kill may have come between the last step and this
            console.say(f"{directory} is finished; now: {evaluate}")
            return
        base = None if config.probe.baseline in ("", "self") else Path(config.probe.baseline)
        try:
            carry_out(config, directory, Resources(distributed.device), distributed, console, base=base)
        except torch.OutOfMemoryError as error:
            raise UserError(OUT_OF_MEMORY) from error
        console.say(f"finished; now: {evaluate}")


def carry_out(
    config: RunConfig,
    directory: Path,
    resources: Resources,
    distributed: Distributed,
    console: Console,
    *,
    base: Path | None = None,
    each_step: Callable[[], None] = lambda: None,
) -> None:
    """Carry out a resolved config in `directory`, from where that stands.

    base       a directory whose measurement of the base is taken over where the protocol is the same
    each_step  called after every step; what it raises ends the run
    """
    # 1. Everything that the config names is read and checked before the directory is claimed.
    make_deterministic(config.execution.deterministic)
    tokenizer = resources.tokenizer(config)
    training, overlap = resources.rows(config, console)
    for line in filter(None, [*training.report(), overlap]):
        console.say(line)
    console.say(f"loading {config.model.name}")
    model, instruments = resources.base(config), resources.instruments(config)
    graphs = resources.graphs(config)
    check_learnable(training.documents)
    check_disjoint(config, training, instruments)
    check_anchors(config, model.config, distributed.size, fetch=True)
    check_null_space(config)
    check_steering(config, directory, model, tokenizer)
    check_baseline(config, instruments.protocol(model))
    distributed.check_stop()
    if distributed.first:
        claim(directory, config, model, instruments, training, distributed)

    # 2. The base, while nothing is attached to it.
    evaluator = Evaluator(config, directory, distributed, console, model, tokenizer, instruments)
    if base is not None and distributed.first:
        evaluator.take_over_base(base)
    evaluator.measure(0)
    steering = run_steering(config, directory, distributed, model, tokenizer)
    contexts = run_contexts(config, directory, distributed, model, tokenizer, console, resources.keep)
    null_space = run_null_space(config, directory, distributed, model, tokenizer, console)

    # 3. The steps, with the measurements between them.
    if 0 < (step := stored_position(directory).step) < config.training.steps:
        console.say(f"continuing from the rolling checkpoint: {step:,} of {config.training.steps:,} steps are done")
    if config.training.method == "full":
        resources.discard_model()
    compiled = compiles(config, distributed.device)
    with console.progress("training", config.training.steps, "steps") as progress:
        logged = functools.partial(after_step, console, progress, each_step)
        hooks = Hooks(checkpoint=evaluator.save_and_measure, probe=evaluator.measure_only, logged=logged)
        with distributed.stop.deferred():  # until the step is done and its state is written
            trainer = Trainer(
                model, training.documents, config, directory, distributed, compiled=compiled,
                steering=steering, contexts=contexts, null_space=null_space, graphs=graphs,
            )  # fmt: skip
            train(trainer, hooks)


def claim(
    directory: Path,
    config: RunConfig,
    model: Qwen2,
    instruments: Instruments,
    training: TrainingSet,
    distributed: Distributed,
) -> None:
    """Make the directory this run's, and remove what a killed writer left in it."""
    sweep_temporaries(directory, *(directory / name for name in (LATEST, VECTORS, LOSSES)))
    write_text(directory / CONFIG, to_toml(config))
    write_provenance(directory, provenance(config, model, instruments, training, distributed.size))


def after_step(console: Console, progress: Progress, each_step: Callable[[], None], row: dict[str, Any]) -> None:
    """Show a line of metrics.jsonl as progress, say what was unusual about the step, and call `each_step`."""
    if "out_of_memory" in row:
        console.say(f"step {row['step']}: out of memory; repeated in smaller packs, which later steps use too")
    if "skipped" in row:
        console.say(f"step {row['step']} skipped: {row['skipped']}")
    else:
        progress.advance(row["step"], f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
    each_step()


# ---------------------------------------------------------------- measurements during training


@dataclass
class Evaluator:
    """Saves and measures the model at the steps that the config names, each step once.

    The first rank does so alone. Where the weights are sharded, which they are from the first step on, every rank goes
    through the model with the same prompts, and the first one writes.
    """

    config: RunConfig
    directory: Path
    distributed: Distributed
    console: Console
    model: Qwen2
    tokenizer: ChatTokenizer
    instruments: Instruments

    def __post_init__(self) -> None:
        self.protocol = self.instruments.protocol(self.model)

    def take_over_base(self, other: Path) -> None:
        """Take the measurement of the base from another directory, if it has one by the same protocol."""
        row = stored_measurement(other, 0, self.protocol)
        if row is not None and stored_measurement(self.directory, 0, self.protocol) is None:
            for file in (vectors_file, losses_file):
                if (source := file(other, 0)).is_file():  # there are no losses without held-out rows
                    target = file(self.directory, 0)
                    with explained(target):
                        link_or_copy(source, target)
            learned = self._learned(0, row.eval_loss)
            append_measurement(self.directory, replace(row, learned=learned))
            self.console.say(f"step 0: M1 {row.m1:.4f}, as measured in {other}")

    def save_and_measure(self, step: int) -> None:
        """Write the checkpoint of a step, then measure it."""
        if self._due(step):
            save_checkpoint(
                self.model,
                self.config,
                checkpoint_directory(self.directory, step),
                tokenizer_files(self.config.model),
                self.tokenizer.stop_tokens,
                self.distributed,
            )
        self.measure(step)

    def measure_only(self, step: int) -> None:
        """Measure a step that leaves no checkpoint: a line of probes.jsonl, without vectors and losses by row."""
        self.measure(step, keep_parts=False)

    def measure(self, step: int, keep_parts: bool = True) -> None:
        """Measure the model, and meet the other ranks. Interrupted on all of them where one was asked to stop."""
        with contextlib.suppress(Interrupted):
            self._measure(step, keep_parts)
        self.distributed.check_stop()

    def _sharded(self, step: int) -> bool:
        return step > 0 and is_sharded(self.config, self.distributed)

    def _due(self, step: int) -> bool:
        """Whether this rank has a part in the measurement of this step."""
        due = self.distributed.first and stored_measurement(self.directory, step, self.protocol) is None
        return bool(self.distributed.broadcast(due)) if self._sharded(step) else due

    def _measure(self, step: int, keep_parts: bool) -> None:
        if not self._due(step):
            return
        # Ranks that measure together do not leave each other: they stop where they meet.
        with contextlib.nullcontext() if self._sharded(step) else self.distributed.stop.at_once():
            metrics, vectors, losses = measure(self.model, self.instruments, self.console)
            delta_norm = 0.0 if step == 0 else distance_from_base(self.model, self.config, self.distributed)
        if not self.distributed.first:
            return
        if keep_parts:
            vectors.save(vectors_file(self.directory, step))
            if losses is not None:
                losses.save(losses_file(self.directory, step))
        learned = self._learned(step, metrics.eval_loss)
        append_measurement(self.directory, metrics.at_step(step, self.protocol.digest, delta_norm, learned))
        loss = "" if metrics.eval_loss is None else f", held-out loss {metrics.eval_loss:.3f}"
        self.console.say(f"step {step}: M1 {metrics.m1:.4f} [{metrics.m1_low:.4f}, {metrics.m1_high:.4f}]{loss}")

    def _learned(self, step: int, loss: float | None) -> float | None:
        """The share of the baseline's loss reduction, by the losses that are known while the run goes on."""
        base = stored_measurement(self.directory, 0, self.protocol)  # None while the base itself is measured
        name = self.config.probe.baseline
        if name == "self":
            baseline = loss if step == self.config.training.steps else None
        else:
            baseline = baseline_row(Path(name), self.protocol).eval_loss if name else None
        return learned_share(loss, loss if base is None else base.eval_loss, baseline)


def tokenizer_files(section: ModelSection) -> list[Path]:
    """The files that a saved model needs beside its weights."""
    name = section.tokenizer or section.name
    directory = locate("tiny" if name.startswith(RANDOM) else name, FILES)
    return [directory / file for file in FILES if (directory / file).is_file()]


# ---------------------------------------------------------------- before the run


def make_deterministic(wanted: bool) -> None:
    """Ask torch for bit-equal results on CUDA; the CPU gives them anyway."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def check_baseline(config: RunConfig, protocol: MeasurementProtocol) -> None:
    """UserError where the run that `probe.baseline` names is not there or cannot be compared with."""
    if config.probe.baseline not in ("", "self"):
        baseline_row(Path(config.probe.baseline), protocol)


def check_disjoint(config: RunConfig, training: TrainingSet, instruments: Instruments) -> None:
    """UserError where a persona, by its name or the words of its prompt, is both trained on and measured.

    Trained on are those whose prompts the rows have, and those in whose voice the responses are written.
    """
    known, key = training_personas(), "data.system_prompts" if config.data.system_prompts else "data.responses"
    trained = {*training.mixture.get("responses_personas", ()), *(known if config.data.system_prompts else ())}
    prompts = {words(prompt) for name, prompt in known.items() if name in trained}
    for name, prompt in instruments.personas.prompts.items():
        if name in trained or words(prompt) in prompts:
            raise UserError(f"persona {name!r} is trained on ({key}) and measured; measure others")
