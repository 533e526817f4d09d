"""The registered metrics of a run or a model, judged: the content of result.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipersona.chat import ChatTokenizer
from minipersona.config import SHIPPED, ProbeSection, RunConfig
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import append_jsonl, digest, read_json, read_jsonl
from minipersona.model.adapter_files import load_adapter
from minipersona.model.load import load_model
from minipersona.model.lora import adapter_norm
from minipersona.model.network import Qwen2
from minipersona.settings import from_dict, read_toml
from minipersona.study.bench import DTYPES, load_run_model, load_run_tokenizer, run_instruments
from minipersona.study.judgement import judge
from minipersona.study.measure import Instruments, make_instruments, measure
from minipersona.study.run import baseline_loss, step_name, stored_probe
from minipersona.training.distributed import Distributed
from minipersona.training.parameters import distance_from_base

Result = dict[str, Any]
TINY_HELDOUT = "tiny:benign[2000:2200]"  # what the embedded model is judged on unless other rows are named


@dataclass(frozen=True)
class Overrides:
    """What a caller wants measured otherwise than the run's config says; empty is as the config says."""

    baseline: str = ""
    heldout: str = ""
    layers: tuple[int, ...] = ()
    personas: str = ""
    questions: str = ""

    def apply(self, config: RunConfig) -> RunConfig:
        """The config with these in place of its own."""
        given = {k: v for k in ("baseline", "layers", "personas", "questions") if (v := getattr(self, k))}
        data = replace(config.data, heldout=self.heldout or config.data.heldout)
        return replace(config, data=data, probe=replace(config.probe, **given))


def evaluate_run(directory: Path, device: torch.device, console: Console, overrides: Overrides | None = None) -> Result:
    """Judge every checkpoint of a run against its base and its baseline.

    What training has measured is taken as it is; what is missing, or is wanted with other instruments, is measured
    now. Measurements by the run's own protocol are added to its probes.jsonl.
    """
    if not (directory / "config.toml").is_file() or not (directory / "provenance.json").is_file():
        raise UserError(
            f"{directory}: is no run's directory (config.toml, provenance.json); name one that train.py made"
        )
    config = from_dict(RunConfig, read_toml(directory / "config.toml"))
    steps = [0, *checkpoint_steps(directory)]
    protocol = read_json(directory / "provenance.json")["protocol"]
    wanted = (overrides or Overrides()).apply(config)
    instruments_differ = (wanted.data, replace(wanted.probe, baseline="")) != (
        config.data,
        replace(config.probe, baseline=""),
    )
    rows = [stored_probe(directory, step, digest(protocol)) for step in steps]
    if instruments_differ or None in rows:
        rows, protocol = _measure_steps(directory, wanted, steps, device, console)
    found = [row for row in rows if row is not None]

    baseline: Result | None = None
    if wanted.probe.baseline == "self":
        if steps[-1] == wanted.training.steps:
            baseline = {"run": "self", "step": steps[-1], "eval_loss": found[-1]["eval_loss"]}
    elif wanted.probe.baseline:
        name = wanted.probe.baseline
        baseline = {"run": name, "eval_loss": baseline_loss(Path(name), protocol)}
    metrics = read_jsonl(directory / "metrics.jsonl")
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in metrics if row["tokens_per_second"])
    hardware = read_json(directory / "provenance.json")["hardware"]
    gpu_seconds = seconds * hardware["processes"] if hardware["cuda_device"] else None
    return _result(found[0], found[1:], baseline, protocol) | {"seconds": seconds, "gpu_seconds": gpu_seconds}


def evaluate_model(
    model: Qwen2, tokenizer: ChatTokenizer, console: Console, *, adapter: str = "", overrides: Overrides | None = None
) -> Result:
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
    base = {"step": 0, **measure(model, instruments, console)[0], "delta_norm": 0.0}
    protocol = instruments.protocol(model)
    baseline = None
    if wanted.baseline:
        baseline = {"run": wanted.baseline, "eval_loss": baseline_loss(Path(wanted.baseline), protocol)}
    rows = []
    if adapter:
        load_adapter(model, adapter)
        measured, _ = measure(model, instruments, console)
        rows.append({"step": None, "adapter": adapter, **measured, "delta_norm": adapter_norm(model)})
    return _result(base, rows, baseline, protocol) | {"gpu_seconds": None}


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps at which a run left a checkpoint."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-" + "[0-9]" * 6))


def _measure_steps(
    directory: Path, config: RunConfig, steps: Sequence[int], device: torch.device, console: Console
) -> tuple[list[Result | None], Result]:
    """Measure the base and every checkpoint with the instruments that `config` names, as far as not stored yet."""
    own = digest(read_json(directory / "provenance.json")["protocol"])
    model = load_run_model(config.model, device)
    instruments = run_instruments(config, model, load_run_tokenizer(config.model), compiled=False)
    protocol = instruments.protocol(model)
    rows: list[Result | None] = []
    for step in steps:
        row = stored_probe(directory, step, digest(protocol))
        if row is None:
            console.say(f"measuring step {step}")
            row = _measure_step(directory, config, model, instruments, step, console)
            row["protocol"] = digest(protocol)
            if row["protocol"] == own:
                append_jsonl(directory / "probes.jsonl", row)
        rows.append(row)
    return rows, protocol


def _measure_step(
    directory: Path, config: RunConfig, model: Qwen2, instruments: Instruments, step: int, console: Console
) -> Result:
    checkpoint = directory / step_name(step)
    alone = Distributed(0, 1, model.device)
    if step == 0:
        return {"step": 0, **measure(model, instruments, console)[0], "learned": None, "delta_norm": 0.0}
    if config.training.method == "lora":
        load_adapter(model, checkpoint)
        measured, _ = measure(model, instruments, console)
        return {"step": step, **measured, "learned": None, "delta_norm": distance_from_base(model, config, alone)}
    trained = load_model(str(checkpoint), dtype=DTYPES[config.model.dtype], device=model.device)
    measured, _ = measure(trained, instruments, console)
    trained.source = model.source  # the distance is from what the run started with
    return {"step": step, **measured, "learned": None, "delta_norm": distance_from_base(trained, config, alone)}


def _result(base: Result, rows: Sequence[Result], baseline: Result | None, protocol: Result) -> Result:
    """result.json, but for the time that was spent."""
    base_loss = base["eval_loss"]
    baseline_value = None if baseline is None else baseline["eval_loss"]
    judged = [_judged(row, base_loss, baseline_value) for row in rows]
    passed = [row for row in judged if row["substantive_pass"]]
    best = max(passed, key=lambda row: row["learned"])["step"] if passed else None
    return {
        "protocol": protocol,
        "base": _judged(base, base_loss, baseline_value),
        "baseline": baseline,
        "checkpoints": judged,
        "best": best,
    }


def _judged(row: Result, base_loss: float | None, baseline_loss: float | None) -> Result:
    judgement = judge(row["m1"], row["eval_loss"], base_loss, baseline_loss)
    left_out = ("m1_low", "m1_high", "learned", "protocol")
    return {
        **{key: value for key, value in row.items() if key not in left_out},
        "m1_ci95": [row["m1_low"], row["m1_high"]],
        "learned": judgement.learned,
        "registered_pass": judgement.registered_pass,
        "substantive_pass": judgement.substantive_pass,
        "collapsed": judgement.collapsed,
    }
