"""What is measured of a run, as records: a line of probes.jsonl, and result.json with every checkpoint judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minipersona.records import read_record

Interval = tuple[float, float]


@dataclass(frozen=True)
class Protocol:
    """What a measurement was made with: two of them are comparable where these are equal."""

    model: str | None
    revision: str | None
    compute_dtype: str
    layer: int  # the deciding one: the stream leaving that block, blocks counted from 0
    layers: tuple[int, ...]
    layer_convention: str
    method: str
    persona_set: str
    persona_digest: str
    question_set: str
    question_digest: str
    heldout: str | None
    heldout_digest: str | None
    max_tokens: int
    tokenizer_digest: str


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The measures of persona vectors at the deciding layer (`geometry/measures.py`); None where one is undefined."""

    layer: int
    m1: float
    centred_cosine: float | None
    shared_mean_share: float | None
    between_variance: float | None
    within_variance: float | None
    effective_rank: float | None
    nearest_centroid_accuracy: float | None
    m1_noise_floor: float
    m1_by_layer: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Measurement(Geometry):
    """One line of probes.jsonl; step 0 is the base.

    `learned` is by what was known while the run went on; `protocol` is the digest of what it was measured with.
    """

    step: int
    m1_low: float  # the 95% bootstrap interval over questions
    m1_high: float
    eval_loss: float | None  # nats per supervised token of the held-out rows
    learned: float | None
    delta_norm: float  # ||theta - theta_base||_2
    protocol: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Geometry):
    """A measured model, judged: the base, a checkpoint, or (step None) a model with an adapter."""

    step: int | None
    m1_ci95: Interval
    eval_loss: float | None
    learned: float | None
    delta_norm: float
    registered_pass: bool | None
    substantive_pass: bool | None
    collapsed: bool
    adapter: str | None = None


@dataclass(frozen=True)
class Baseline:
    """The run whose last step the others are judged against; "self" where it is the run itself."""

    run: str
    eval_loss: float | None
    step: int | None = None


@dataclass(frozen=True)
class RunResult:
    """result.json."""

    protocol: Protocol
    base: Checkpoint
    baseline: Baseline | None
    checkpoints: tuple[Checkpoint, ...]
    best: int | None  # the step of the checkpoint that passes substantively and learned the most
    seconds: float | None = None
    gpu_seconds: float | None = None


def read_result(path: Path, mend: str) -> RunResult:
    """Read result.json; UserError with the `mend` where it is not one."""
    return read_record(path, RunResult, mend)
