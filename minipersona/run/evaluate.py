"""The registered metrics of a run or a model, judged: the content of result.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from minipersona.chat import ChatTokenizer
from minipersona.config import SHIPPED, ProbeSection, RunConfig
from minipersona.console import Console
from minipersona.errors import UserError, require
from minipersona.model.adapter_files import load_adapter
from minipersona.model.lora import adapter_norm
from minipersona.model.network import Qwen2
from minipersona.run.directory import (
    append_measurement,
    baseline_row,
    checkpoint_directory,
    checkpoint_steps,
    read_config,
    stored_measurement,
    training_seconds,
)
from minipersona.run.judgement import bounds_for, judge_result
from minipersona.run.measurement import Instruments, make_instruments, measure
from minipersona.run.provenance import read_provenance
from minipersona.run.resources import load_checkpoint, load_run_model, load_run_tokenizer, run_instruments
from minipersona.run.result import Baseline, Checkpoint, Measurement, MeasurementProtocol, Metrics, RunResult
from minipersona.training.checkpoint import stored_position
from minipersona.training.distributed import Distributed
from minipersona.training.parameters import distance_from_base

TINY_HELDOUT = "tiny:benign[2000:2200]"  # what the embedded model is judged on unless other rows are named


@dataclass(frozen=True)
class Overrides:
    """Settings that replace those of a run's config; an empty one keeps the config's."""

    baseline: str = ""
    heldout: str = ""
    layers: tuple[int, ...] = ()
    personas: str = ""
    questions: str = ""

    def apply(self, config: RunConfig) -> RunConfig:
        """The config with these settings."""
        given = {k: v for k in ("baseline", "layers", "personas", "questions") if (v := getattr(self, k))}
        data = replace(config.data, heldout=self.heldout or config.data.heldout)
        return replace(config, data=data, probe=replace(config.probe, **given))


def evaluate_run(
    directory: Path, device: torch.device, console: Console, overrides: Overrides | None = None
) -> RunResult:
    """Judge every checkpoint of a run against its base and its baseline.

    The measurements that training made are used as they are. Missing ones are made now, and so are all where other
    instruments are wanted. Measurements by the run's own protocol are added to its probes.jsonl.
    """
    config, made_by = read_config(directory), read_provenance(directory)
    wanted = (overrides or Overrides()).apply(config)
    steps = [0, *checkpoint_steps(directory)]
    position = stored_position(directory)
    for step in config.training.checkpoints:
        written = step < position.step or position.done
        require(
            step in steps or not written,
            f"{checkpoint_directory(directory, step)}: is gone; restore it, or delete {directory} and train again",
        )
    protocol = made_by.protocol
    stored = [stored_measurement(directory, step, protocol) for step in steps]
    rows = [row for row in stored if row is not None]
    if not _same_instruments(wanted, config) or len(rows) < len(steps):
        rows, protocol = _measure_steps(directory, wanted, steps, protocol, device, console)

    baseline = None
    if wanted.probe.baseline == "self":
        if steps[-1] == wanted.training.steps:
            baseline = Baseline("self", rows[-1].eval_loss, steps[-1], rows[-1].persona_loss)
    elif wanted.probe.baseline:
        baseline = _named_baseline(wanted.probe.baseline, protocol)
    base, *checkpoints = (row.unjudged(row.step, row.delta_norm) for row in rows)
    seconds = training_seconds(directory)
    gpu_seconds = seconds * made_by.hardware.processes if made_by.hardware.cuda_device else None
    return _judged(protocol, base, checkpoints, baseline, gpu_seconds, seconds)


def evaluate_model(
    model: Qwen2, tokenizer: ChatTokenizer, console: Console, *, adapter: str = "", overrides: Overrides | None = None
) -> RunResult:
    """Judge a model as it stands or, with an adapter, the adapted model against the model without it."""
    wanted = overrides or Overrides()
    instruments = make_instruments(
        model,
        tokenizer,
        personas=wanted.personas or SHIPPED,
        questions=wanted.questions or SHIPPED,
        layers=ProbeSection(layers=wanted.layers).measured(model.config.probe_layer),
        heldout=wanted.heldout or (TINY_HELDOUT if model.source["name"] == "tiny" else None),
    )
    base = measure(model, instruments, console)[0].unjudged(step=0, delta_norm=0.0)
    protocol = instruments.protocol(model)
    baseline = _named_baseline(wanted.baseline, protocol) if wanted.baseline else None
    adapted = []
    if adapter:
        load_adapter(model, adapter)
        adapted = [measure(model, instruments, console)[0].unjudged(None, adapter_norm(model), adapter)]
    return _judged(protocol, base, adapted, baseline, gpu_seconds=None)


def check_side_by_side(results: Mapping[str, RunResult]) -> None:
    """UserError where runs, by their directories, were measured or are judged by something that is not the same."""
    (first, one), *others = results.items()
    for run, result in results.items():
        if not result.checkpoints:
            raise UserError(f"--run {run}: has no checkpoint yet; let train.py write one")
    for run, result in others:
        for f in fields(MeasurementProtocol):
            if getattr(one.protocol, f.name) != getattr(result.protocol, f.name):
                raise UserError(
                    f"--run {first} {run}: the {f.name} of their measurements is not the same; of one model, --layer, "
                    "--personas, --questions and --heldout measure both alike"
                )
        if _judged_against(first, one) != _judged_against(run, result):
            raise UserError(f"--run {first} {run}: each has another baseline; name one with --baseline")


def _judged_against(run: str, result: RunResult) -> Path | None:
    if result.baseline is None:
        return None
    return Path(run if result.baseline.run == "self" else result.baseline.run).resolve()


# ---------------------------------------------------------------- measured


def _same_instruments(wanted: RunConfig, config: RunConfig) -> bool:
    """Whether two configs ask for the same measurement, whatever their baselines."""
    one, other = ((c.data, replace(c.probe, baseline="")) for c in (wanted, config))
    return one == other


def _measure_steps(
    directory: Path,
    config: RunConfig,
    steps: Sequence[int],
    own: MeasurementProtocol,
    device: torch.device,
    console: Console,
) -> tuple[list[Measurement], MeasurementProtocol]:
    """Measure the base and every checkpoint with the instruments that `config` names, unless they are stored already.

    Measurements by the run's `own` protocol are stored.
    """
    model = load_run_model(config, device)
    instruments = run_instruments(config, model, load_run_tokenizer(config.model))
    protocol = instruments.protocol(model)
    rows = []
    for step in steps:
        row = stored_measurement(directory, step, protocol)
        if row is None:
            console.say(f"measuring step {step}")
            metrics, delta_norm = _measure_step(directory, config, model, instruments, step, console)
            row = metrics.at_step(step, protocol.digest, delta_norm)
            if protocol == own:
                append_measurement(directory, row)
        rows.append(row)
    return rows, protocol


def _measure_step(
    directory: Path, config: RunConfig, model: Qwen2, instruments: Instruments, step: int, console: Console
) -> tuple[Metrics, float]:
    """The metrics of a step, and its distance from the base."""
    if step == 0:
        return measure(model, instruments, console)[0], 0.0
    trained = load_checkpoint(model, config, directory, step)
    metrics = measure(trained, instruments, console)[0]
    trained.source = model.source  # the distance is from what the run started with
    return metrics, distance_from_base(trained, config, Distributed(0, 1, model.device))


# ---------------------------------------------------------------- judged


def _named_baseline(run: str, protocol: MeasurementProtocol) -> Baseline:
    last = baseline_row(Path(run), protocol)
    return Baseline(run, last.eval_loss, last.step, last.persona_loss)


def _judged(
    protocol: MeasurementProtocol,
    base: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    baseline: Baseline | None,
    gpu_seconds: float | None,
    seconds: float | None = None,
) -> RunResult:
    unjudged = RunResult(
        protocol=protocol,
        base=base,
        baseline=baseline,
        checkpoints=tuple(checkpoints),
        best=None,
        gpu_seconds=gpu_seconds,
        seconds=seconds,
    )
    return judge_result(unjudged, baseline, bounds_for(protocol, base.m1))
