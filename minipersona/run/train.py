"""One fine-tuning run from its config to its directory: load, measure the base, train, measure each checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minipersona.chat import ChatTokenizer
from minipersona.chat.vocabulary import FILES
from minipersona.config import ModelSection, RunConfig
from minipersona.console import Console
from minipersona.corpus.mixtures import training_personas
from minipersona.corpus.overlap import check_overlap
from minipersona.corpus.training_set import training_set
from minipersona.errors import Interrupted, UserError
from minipersona.files import (
    append_jsonl,
    digest,
    explained,
    read_json,
    read_jsonl,
    sweep_temporaries,
    write_json,
    write_text,
)
from minipersona.hub import locate, pinned_revision
from minipersona.locks import lock
from minipersona.model.load import RANDOM
from minipersona.model.network import Qwen2
from minipersona.records import from_dict
from minipersona.run.judgement import learned_share
from minipersona.run.measurement import Instruments, measure
from minipersona.run.provenance import provenance
from minipersona.run.resources import Resources, compiles
from minipersona.run.steering import check_steering, run_steering
from minipersona.settings import difference, read_toml, to_toml
from minipersona.training.checkpoint import drop_tensors, stored_position
from minipersona.training.loop import Hooks, check_learnable, train
from minipersona.training.memory import OUT_OF_MEMORY
from minipersona.training.sharding import is_sharded
from minipersona.training.trainable import distance_from_base, save_checkpoint
from minipersona.training.world import World


def run(config: RunConfig, world: World, console: Console) -> None:
    """Carry out a run in ``config.out``, or continue it; a finished one is left as it is.

    UserError where the directory belongs to another config, is in use, or anything the config names is amiss, and
    where memory runs out. Interrupted, on every rank, where any was asked to stop.
    """
    directory = Path(config.out)
    with lock(directory) if world.first else contextlib.nullcontext():
        config = resolve(config, world.device)
        check_claim(directory, config)
        if finished(directory, config):
            if world.first:
                drop_tensors(directory)  # what ended the run may have come before it did that
            console.say(f"{directory} is finished; now: python evaluate.py --run {directory}")
            return
        try:
            carry_out(config, directory, Resources(world.device), world, console)
        except torch.OutOfMemoryError as error:
            raise UserError(OUT_OF_MEMORY) from error
        console.say(f"finished; now: python evaluate.py --run {directory}")


def carry_out(
    config: RunConfig,
    directory: Path,
    bench: Resources,
    world: World,
    console: Console,
    *,
    base: Path | None = None,
    each_step: Callable[[], None] = lambda: None,
) -> None:
    """Carry out a resolved config in `directory`, from where that stands.

    base       a directory whose measurement of the base is taken over where the protocol is the same
    each_step  called after every step; what it raises ends the run
    """
    make_deterministic(config.execution.deterministic)
    tokenizer = bench.tokenizer(config)
    training = training_set(config.data, config.seed, tokenizer, console)
    for line in filter(None, [*training.report(), check_overlap(config.data.train, config.data.heldout)]):
        console.say(line)
    console.say(f"loading {config.model.name}")
    model = bench.model(config)
    instruments = bench.instruments(config)
    check_disjoint(config, instruments)
    check_steering(config, directory, model, tokenizer)
    check_learnable(training.documents)
    if config.probe.baseline not in ("", "self"):
        baseline_loss(Path(config.probe.baseline), instruments.protocol(model))  # now, not after the base is measured
    world.meet()
    if world.first:  # only now: a config that could not be carried out claims nothing
        sweep_temporaries(directory, directory / "latest", directory / "vectors")
        write_text(directory / "config.toml", to_toml(config))
        made_by = provenance(config, model, instruments, training, world.size)
        write_json(directory / "provenance.json", with_history(directory, made_by))

    probe = Probe(config, directory, world, console, model, tokenizer, instruments)
    if base is not None and world.first:
        probe.take_over(base)
    probe(0)  # the base, before anything is attached to it
    steering = run_steering(config, directory, world, model, tokenizer)
    if (step := stored_position(directory).step) and step < config.training.steps:
        console.say(f"continues from the rolling checkpoint, of step {step:,} or later")
    steps = config.training.steps
    with console.progress("training", steps, "steps") as progress:

        def logged(row: dict[str, Any]) -> None:
            if "out_of_memory" in row:
                console.say(f"step {row['step']}: out of memory; done again in smaller packs, as all later steps are")
            if "skipped" in row:
                console.say(f"step {row['step']} skipped: {row['skipped']}")
            else:
                progress.advance(row["step"], f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
            each_step()

        probe.together = is_sharded(config, world)
        hooks = Hooks(checkpoint=probe.checkpoint, probe=probe.passing, logged=logged)
        if config.training.method == "full":
            bench.discard_model()
        compiled = compiles(config, world.device)
        with world.stop.deferred():  # a step is finished, and its state written
            train(model, training.documents, config, directory, world, hooks, compiled=compiled, steering=steering)


class Probe:
    """Measures the model at a step and writes the line and the vectors, once.

    The first rank does, but for a model whose weights are sharded: then every rank goes through it with the same
    prompts, and the first one writes. `together` says so.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        world: World,
        console: Console,
        model: Qwen2,
        tokenizer: ChatTokenizer,
        instruments: Instruments,
    ) -> None:
        self.config, self.directory, self.world, self.console = config, directory, world, console
        self.model, self.tokenizer, self.instruments = model, tokenizer, instruments
        self.protocol = digest(instruments.protocol(model))
        self.together = False

    def checkpoint(self, step: int) -> None:
        """Save what a named step leaves, then measure it."""
        if self._due(step):
            save_checkpoint(
                self.model, self.config, self.directory / step_name(step), tokenizer_files(self.config.model),
                self.tokenizer.stop_tokens, self.world,
            )  # fmt: skip
        self(step)

    def passing(self, step: int) -> None:
        """Measure a step that leaves no checkpoint: a line of probes.jsonl, and no vectors."""
        self(step, keep_vectors=False)

    def take_over(self, base: Path) -> None:
        """Take the measurement of the base from a directory where an equal one lies."""
        row = stored_probe(base, 0, self.protocol)
        if row is not None and stored_probe(self.directory, 0, self.protocol) is None:
            target = vectors_file(self.directory, 0)
            with explained(target):
                link_or_copy(vectors_file(base, 0), target)
            learned = learned_share(row["eval_loss"], *self._reference_losses(row, 0))
            append_jsonl(self.directory / "probes.jsonl", {**row, "learned": learned})

    def __call__(self, step: int, keep_vectors: bool = True) -> None:
        """Measure the model, and meet the other ranks. Interrupted on all of them where one was asked to stop."""
        with contextlib.suppress(Interrupted):
            self._measure(step, keep_vectors)
        self.world.meet()

    def _due(self, step: int) -> bool:
        """Whether this rank has a part in the measurement of this step."""
        due = self.world.first and stored_probe(self.directory, step, self.protocol) is None
        return bool(self.world.follow(due)) if self.together else due

    def _measure(self, step: int, keep_vectors: bool) -> None:
        if self._due(step):
            # Ranks that measure together do not leave each other: they stop where they meet.
            with self.world.passes() if self.together else self.world.stop.at_once():
                row, vectors = measure(self.model, self.instruments, self.console)
                delta = 0.0 if step == 0 else distance_from_base(self.model, self.config, self.world)
            if not self.world.first:
                return
            if keep_vectors:
                vectors.save(vectors_file(self.directory, step))
            learned = learned_share(row["eval_loss"], *self._reference_losses(row, step))
            row = {"step": step, **row, "learned": learned, "delta_norm": delta, "protocol": self.protocol}
            append_jsonl(self.directory / "probes.jsonl", row)
            loss = "" if row["eval_loss"] is None else f", held-out loss {row['eval_loss']:.3f}"
            interval = f"[{row['m1_low']:.4f}, {row['m1_high']:.4f}]"
            self.console.say(f"step {step}: M1 {row['m1']:.4f} {interval}{loss}")

    def _reference_losses(self, row: dict[str, Any], step: int) -> tuple[float | None, float | None]:
        """The base's and the baseline's losses as far as they are known while the run goes on."""
        first = stored_probe(self.directory, 0, self.protocol)
        base = row["eval_loss"] if step == 0 else (first or {}).get("eval_loss")
        name = self.config.probe.baseline
        if name == "self":
            return base, row["eval_loss"] if step == self.config.training.steps else None
        return base, baseline_loss(Path(name), self.instruments.protocol(self.model)) if name else None


# ---------------------------------------------------------------- the parts, shared with evaluation


def resolve(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with what it left open filled in, as far as that changes results."""
    revision = pinned_revision(config.model.name, config.model.revision or None) or ""
    dtype = config.model.dtype
    if dtype == "auto":  # settled once: a run that is continued elsewhere keeps its precision
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return replace(config, model=replace(config.model, revision=revision, dtype=dtype))


def finished(directory: Path, config: RunConfig) -> bool:
    """Whether a run has nothing left to do: its last step is taken, and every step that is due is measured."""
    if not stored_position(directory).done:
        return False
    measured = {row["step"] for row in read_jsonl(directory / "probes.jsonl")}
    return {0, *filter(config.training.measures, range(1, config.training.steps + 1))} <= measured


def with_history(directory: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a run that is continued: as it began, with what each continuation ran on after it."""
    path = directory / "provenance.json"
    if not path.is_file():
        return made_by
    began = read_json(path)
    again = {key: made_by[key] for key in ("minipersona", "code_digest", "commit", "versions", "hardware")}
    return {**began, "continued": [*began.get("continued", []), again]}


def check_claim(directory: Path, config: RunConfig) -> None:
    """UserError where `directory` holds a run that asks for something else."""
    path = directory / "config.toml"
    if path.is_file():
        changed = difference(config, from_dict(RunConfig, read_toml(path)))
        if changed:
            raise UserError(
                f"{directory} belongs to a run with another config ({'; '.join(changed)}); "
                "choose another --out, or delete the directory"
            )


def check_disjoint(config: RunConfig, instruments: Instruments) -> None:
    """UserError where a persona is both trained on and measured."""
    if config.data.system_prompts:
        trained, measured = training_personas(), instruments.personas.prompts
        for name, prompt in measured.items():
            if name in trained or prompt in trained.values():
                raise UserError(f"persona {name!r} is trained on (data.system_prompts) and measured; measure others")


def make_deterministic(wanted: bool) -> None:
    """Ask torch for bit-equal results on CUDA; the CPU gives them anyway."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def tokenizer_files(section: ModelSection) -> list[Path]:
    """The files that a saved model needs beside its weights."""
    name = section.tokenizer or section.name
    directory = locate("tiny" if name.startswith(RANDOM) else name, FILES)
    return [directory / file for file in FILES if (directory / file).is_file()]


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, in place of what had it; a copy where the file system has no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def step_name(step: int) -> str:
    """The directory of a checkpoint within its run."""
    return f"step-{step:06}"


def vectors_file(directory: Path, step: int) -> Path:
    """Where a run keeps the vectors of a step; step 0 is the base."""
    return directory / "vectors" / f"{step_name(step)}.safetensors"


def last_vectors(path: Path) -> Path:
    """A vector file: `path` itself, or the last step's of the run in that directory."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("vectors/step-*.safetensors"))
    if not files:
        raise UserError(f"{path}: holds no vectors/step-*.safetensors; name a vector file or a run of train.py")
    return files[-1]


def stored_probe(directory: Path, step: int, protocol: str) -> dict[str, Any] | None:
    """The line that an equal measurement of this step left, if any."""
    for row in read_jsonl(directory / "probes.jsonl"):
        if row["step"] == step and row["protocol"] == protocol:
            return row
    return None


def baseline_loss(directory: Path, protocol: dict[str, Any]) -> float | None:
    """The held-out loss of another run's last step, if it was measured on the same rows of the same model."""
    file = directory / "result.json"
    if not file.is_file():
        raise UserError(f"baseline {directory}: has no result.json; run `python evaluate.py --run {directory}` first")
    result = read_json(file)
    if not isinstance(result, dict) or not {"protocol", "checkpoints"} <= result.keys():
        raise UserError(f"{file}: is no result of evaluate.py; run `python evaluate.py --run {directory}` again")
    steps = from_dict(RunConfig, read_toml(directory / "config.toml")).training.steps
    last = result["checkpoints"][-1] if result["checkpoints"] else {"step": None}
    if last["step"] != steps:
        raise UserError(
            f"baseline {directory}: judged at step {last['step']}, its last is {steps}; "
            f"finish it and run `python evaluate.py --run {directory}`"
        )
    same = ("model", "revision", "heldout_digest", "max_tokens", "tokenizer_digest")
    for key in same:
        if result["protocol"][key] != protocol[key]:
            raise UserError(f"baseline {directory}: its {key} is another; losses of different protocols do not compare")
    loss = last["eval_loss"]
    return None if loss is None else float(loss)
