"""What is measured of a run, as records: a line of probes.jsonl, and result.json with every checkpoint judged."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from minipersona.files import digest
from minipersona.geometry.measures import Measures
from minipersona.records import may_be_missing, read_record, to_dict
from minipersona.significance import Interval


@dataclass(frozen=True)
class MeasurementProtocol:
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
    supervise: str = may_be_missing("last")  # which turns of the held-out rows count
    weights: str | None = may_be_missing()  # of a model that no revision tells apart: a digest

    @property
    def digest(self) -> str:
        """By which a line of probes.jsonl names its protocol: hex SHA-256."""
        return digest(to_dict(self))


# ---------------------------------------------------------------- measured


@dataclass(frozen=True, kw_only=True)
class Geometry(Measures):
    """The measures of persona vectors at the deciding layer; None where one has no value."""

    layer: int
    m1_noise_floor: float
    m1_by_layer: dict[str, float]
    m1_by_persona: dict[str, float] | None = may_be_missing()  # each persona's mean cosine with the others
    m1_without: dict[str, float] | None = may_be_missing()  # M1 with that persona left out


@dataclass(frozen=True, kw_only=True)
class Metrics(Geometry):
    """All that is measured of one model, whatever it is."""

    m1_low: float  # the 95% bootstrap interval over questions
    m1_high: float
    eval_loss: float | None  # nats per supervised token of the held-out rows; None without such rows
    persona_loss: float | None = may_be_missing()  # the same with row i under the measured persona i mod P

    def at_step(self, step: int, protocol: str, delta_norm: float = 0.0, learned: float | None = None) -> Measurement:
        """The same as the measurement of a run's step; the defaults are the base's."""
        return Measurement(**vars(self), step=step, learned=learned, delta_norm=delta_norm, protocol=protocol)

    def unjudged(self, step: int | None, delta_norm: float, adapter: str | None = None) -> Checkpoint:
        """The same as a row of result.json before it is judged."""
        return Checkpoint(
            **{f.name: getattr(self, f.name) for f in fields(Geometry)},
            step=step,
            m1_ci95=(self.m1_low, self.m1_high),
            eval_loss=self.eval_loss,
            persona_loss=self.persona_loss,
            delta_norm=delta_norm,
            adapter=adapter,
            learned=None,
            registered_pass=None,
            substantive_pass=None,
            collapsed=False,
        )


@dataclass(frozen=True, kw_only=True)
class Measurement(Metrics):
    """One line of probes.jsonl; step 0 is the base."""

    step: int
    learned: float | None  # by what was known when it was measured
    delta_norm: float  # ||theta - theta_base||_2
    protocol: str  # `MeasurementProtocol.digest`


@dataclass(frozen=True, kw_only=True)
class LayerMeasures(Measures):
    """The measures of one layer's vectors as extract.py prints them."""

    m1_ci95: Interval
    m1_noise_floor: float


# ---------------------------------------------------------------- judged


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the rules of `judgement.py` judge by and what they say; None where they cannot say it."""

    m1: float
    eval_loss: float | None
    persona_loss: float | None = may_be_missing()
    learned: float | None  # the share of the baseline's reduction of the loss
    learned_personas: float | None = may_be_missing()  # the same of the loss under personas
    separation: float | None = may_be_missing()  # (1 - M1) / (1 - M1 of the base)
    spread: float | None = may_be_missing()  # between-persona variance, as a share of the base's
    discriminability: float | None = may_be_missing()  # between / within variance, likewise
    m1_ci95_personas: Interval | None = may_be_missing()  # by the jackknife over personas
    registered_pass: bool | None
    substantive_pass: bool | None
    shortfalls: tuple[str, ...] = may_be_missing(())  # what the substantive rule fails by, or lacks
    trade_off: bool = may_be_missing(False)
    collapsed: bool
    mean_growth: bool = may_be_missing(False)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Geometry, Judged):
    """A measured model, judged: the base (step 0), a checkpoint, or a model with an adapter (step None)."""

    step: int | None
    m1_ci95: Interval
    delta_norm: float
    adapter: str | None = may_be_missing()


@dataclass(frozen=True)
class Baseline:
    """The run whose last step the others are judged against; "self" where it is the run itself."""

    run: str
    eval_loss: float | None
    step: int | None = may_be_missing()
    persona_loss: float | None = may_be_missing()


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """result.json."""

    protocol: MeasurementProtocol
    base: Checkpoint
    baseline: Baseline | None
    checkpoints: tuple[Checkpoint, ...]
    best: int | None  # the step of the checkpoint that passes substantively and learned the most
    gpu_seconds: float | None = None  # of all GPUs together; None on a CPU
    seconds: float | None = may_be_missing()  # of training


def read_result(path: Path, mend: str) -> RunResult:
    """Read result.json; UserError with the `mend` where it is not one."""
    return read_record(path, RunResult, mend)
