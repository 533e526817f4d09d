"""A run's directory: the names of what it holds, and how they are read.

config.toml             the resolved config
provenance.json         what made the run (`provenance.py`)
metrics.jsonl           one line a training step (`training/record.py`)
probes.jsonl            one line a measured step; step 0 is the base (`result.Measurement`)
vectors/                the persona vectors of the base and of every checkpoint
losses/                 the loss of every held-out row, likewise (`losses.py`)
step-000375/            a checkpoint: a PEFT adapter, or a whole model in Hugging Face's layout
latest/                 the rolling checkpoint, from which a run continues (`training/checkpoint.py`)
steering.safetensors    the vectors that the run was steered by (`steering.py`)
null_space.safetensors  the directions that adapters are kept off (`null_space.py`)
anchor_responses.jsonl  the base's responses over which it is anchored (`anchors.py`)
result.json             every checkpoint judged (`result.RunResult`)
objective_check.json    what became of R3F's noise (`objective/noise_check.py`)
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from minipersona.config import RunConfig
from minipersona.console import command_line
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.records import append_record, read_records
from minipersona.run.result import Checkpoint, Measurement, MeasurementProtocol, read_result
from minipersona.settings import difference, load_config
from minipersona.training.checkpoint import stored_position

CONFIG = "config.toml"
PROVENANCE = "provenance.json"
METRICS = "metrics.jsonl"
PROBES = "probes.jsonl"
RESULT = "result.json"
STEERING_VECTORS = "steering.safetensors"
NULL_SPACE = "null_space.safetensors"
ANCHOR_RESPONSES = "anchor_responses.jsonl"
VECTORS = "vectors"
LOSSES = "losses"
LATEST = "latest"

# ---------------------------------------------------------------- what belongs to a step


def checkpoint_directory(directory: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return directory / _name(step)


def vectors_file(directory: Path, step: int) -> Path:
    """Where a run keeps the persona vectors of a step; step 0 is the base."""
    return directory / VECTORS / f"{_name(step)}.safetensors"


def losses_file(directory: Path, step: int) -> Path:
    """Where a run keeps the loss of every held-out row at a step; step 0 is the base."""
    return directory / LOSSES / f"{_name(step)}.safetensors"


def _name(step: int) -> str:
    return f"step-{step:06}"


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps at which a run left a checkpoint, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-" + "[0-9]" * 6))


def last_vectors(path: Path) -> Path:
    """A vectors file: `path` itself or, where that is a run's directory, the file of its last step."""
    if not path.is_dir():
        return path
    files = sorted((path / VECTORS).glob("step-*.safetensors"))
    if not files:
        raise UserError(f"{path}: has no {VECTORS}/step-*.safetensors; name a vectors file or a run of train.py")
    return files[-1]


# ---------------------------------------------------------------- the config


def read_config(directory: Path) -> RunConfig:
    """The config of a run; UserError where the directory is not one of a run."""
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: is not a run directory (it has no {CONFIG}); name one that train.py made")
    return load_config(str(directory / CONFIG), RunConfig)


def check_config(directory: Path, config: RunConfig) -> None:
    """UserError where `directory` holds a run of another config, or files that are not a run's."""
    if not (directory / CONFIG).is_file():  # the first file that a run writes
        if foreign := sorted(path.name for path in directory.glob("*") if not path.name.startswith(".")):
            raise UserError(
                f"{directory} is not a run's directory and holds {foreign[0]!r} ({len(foreign)} in all); choose "
                "another --out, or empty it"
            )
    elif changed := difference(config, read_config(directory)):
        raise UserError(
            f"{directory} belongs to a run with another config ({'; '.join(changed)}); "
            "choose another --out, or delete the directory"
        )


# ---------------------------------------------------------------- the measurements


def read_measurements(directory: Path) -> list[Measurement]:
    """The lines of probes.jsonl; an empty list if the file does not exist."""
    return read_records(directory / PROBES, Measurement, "delete that line, and its step is measured again")


def stored_measurement(directory: Path, step: int, protocol: MeasurementProtocol) -> Measurement | None:
    """The measurement of a step by this protocol, if there is one."""
    digest = protocol.digest
    return next((row for row in read_measurements(directory) if (row.step, row.protocol) == (step, digest)), None)


def append_measurement(directory: Path, row: Measurement) -> None:
    """Add a line to probes.jsonl."""
    append_record(directory / PROBES, row)


def finished(directory: Path, config: RunConfig) -> bool:
    """Whether a run has nothing left to do: its last step is taken, and every step that is due is measured."""
    if not stored_position(directory).done:
        return False
    measured = {row.step for row in read_measurements(directory)}
    return {0, *filter(config.training.measures, range(1, config.training.steps + 1))} <= measured


def training_seconds(directory: Path) -> float:
    """How long the steps in metrics.jsonl took. UserError where a line does not say it."""
    seconds = 0.0
    for number, row in enumerate(read_jsonl(directory / METRICS), 1):
        tokens, rate = (row.get(key) if isinstance(row, dict) else None for key in ("tokens", "tokens_per_second"))
        if not all(isinstance(value, (int, float)) and 0 <= value < 1e300 for value in (tokens, rate)):
            raise UserError(
                f"{directory / METRICS}: line {number} lacks its tokens or tokens_per_second; delete that line"
            )
        seconds += tokens / rate if rate else 0.0
    return seconds


# ---------------------------------------------------------------- another run as the baseline


def baseline_row(directory: Path, protocol: MeasurementProtocol) -> Checkpoint:
    """The last step of another run, which a run with this protocol is held against.

    UserError where that step is not judged yet, or was measured on other rows or another model than `protocol` says.
    Under other personas' prompts its loss says nothing of this run's, and is left out.
    """
    evaluate = f"run `{command_line('evaluate', '--run', directory)}`"
    if not (directory / RESULT).is_file():
        raise UserError(f"baseline {directory}: has no {RESULT}; {evaluate} first")
    result = read_result(directory / RESULT, f"{evaluate} again")
    steps = read_config(directory).training.steps
    last = result.checkpoints[-1] if result.checkpoints else None
    if last is None or last.step != steps:
        raise UserError(
            f"baseline {directory}: judged at step {last and last.step}, its last is {steps}; finish it and {evaluate}"
        )
    for key in ("model", "revision", "weights", "heldout_digest", "max_tokens", "supervise", "tokenizer_digest"):
        if getattr(result.protocol, key) != getattr(protocol, key):
            raise UserError(
                f"baseline {directory}: its {key} is not this run's, so that their losses cannot be compared; "
                "name a run with the same model and held-out rows"
            )
    same_personas = result.protocol.persona_digest == protocol.persona_digest
    return last if same_personas else replace(last, persona_loss=None)


# ---------------------------------------------------------------- files


def link_or_copy(source: Path, target: Path) -> None:
    """Replace `target` by a hard link to `source`, or by a copy where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
