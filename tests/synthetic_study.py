"""Study directories made by hand: numbers and small vectors in a study's layout, no training.

The base's loss is 2 and the baseline's 1, so that a cell's loss is 2 - learned, and the registered bound on it is 2.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipersona.geometry.statistics import bootstrap_m1
from minipersona.geometry.vectors import PersonaVectors
from minipersona.records import write_record
from minipersona.run.result import Checkpoint, Protocol, RunResult
from minipersona.settings import load_config, override, to_toml
from minipersona.study_config import StudyConfig
from minipersona.verdict import ledger
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.files import CellRecord, Frontier, FrontierPoint, Plan, PlanEntry
from minipersona.verdict.ledger import Event, LedgerEntry
from minipersona.verdict.results import StudyResults, read_study

LAYER = 3
PERSONAS, QUESTIONS, WIDTH = 4, 24, 16
SETS = ("plain", "narrow_like")
HASH = "0" * 12  # of every cell
PROTOCOL = Protocol(
    model="some/model", revision="r", compute_dtype="float32", layer=LAYER, layers=(LAYER,),
    layer_convention="residual stream leaving decoder block, counted from 0 (hidden_states[layer + 1])", method="A",
    persona_set="shipped", persona_digest="p", question_set="shipped", question_digest="q", heldout="h",
    heldout_digest="h", max_tokens=2048, tokenizer_digest="t",
)  # fmt: skip


def samples_with(m1: float, noise: float = 0.02, seed: int = 0) -> Tensor:
    """(P, Q, D) samples whose persona vectors have just that M1; equal seeds have equal noise at every question."""
    directions = torch.linalg.qr(torch.randn(WIDTH, PERSONAS + 1, generator=torch.Generator().manual_seed(1))).Q.T
    vectors = m1**0.5 * directions[0] + (1 - m1) ** 0.5 * directions[1:]  # (P, D), unit vectors
    scatter = torch.randn(PERSONAS, QUESTIONS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return vectors[:, None] + noise * (scatter - scatter.mean(1, keepdim=True))


def save_samples(path: Path, samples: Tensor, layer: int = LAYER) -> None:
    """A vectors file of these samples (P, Q, D)."""
    PersonaVectors({layer: samples}, [f"p{i}" for i in range(PERSONAS)]).save(path)


def behaviour(rate: float, answers: int = 200) -> dict[str, Any]:
    """behaviour.json with the same rate of misaligned answers on every prompt set."""
    row = {"answers": answers, "scored": answers, "coherent": answers, "misaligned": round(rate * answers),
           "rate": rate, "rate_ci95": [0.0, 1.0], "rate_coherent": rate, "rate_coherent_ci95": [0.0, 1.0]}  # fmt: skip
    how = {"weights": "w", "prompt_sets": "all", "questions": "shipped", "questions_digest": "q", "samples": 100,
           "max_new_tokens": 600, "temperature": 1.0, "seed": 42, "cut": 0, "empty": 0}  # fmt: skip
    return {"sets": {name: dict(row) for name in SETS}, "judge": {"kind": "file"}, **how}


def checkpoint(step: int, m1: float, learned: float, interval: tuple[float, float] | None = None) -> Checkpoint:
    """A row of result.json. Its flags are lies that a reader must not trust."""
    return Checkpoint(
        layer=LAYER, m1=m1, centred_cosine=-0.3, shared_mean_share=0.9, between_variance=1.0, within_variance=1.0,
        effective_rank=2.5, nearest_centroid_accuracy=1.0, m1_noise_floor=1e-3, m1_by_layer={str(LAYER): m1},
        step=step, m1_ci95=interval or (m1 - 1e-3, m1 + 1e-3), eval_loss=2.0 - learned, learned=9.0, delta_norm=1.0,
        registered_pass=True, substantive_pass=True, collapsed=True,
    )  # fmt: skip


class SyntheticStudy:
    """Writes a study's directory piece by piece; `read()` reads it back. `settings` are those of study.toml."""

    def __init__(self, directory: Path, protocol: dict[str, Any] | None = None, **settings: Any) -> None:
        self.directory = directory
        self.plan: list[PlanEntry] = []
        self.protocol = replace(PROTOCOL, **(protocol or {}))
        self.configure(*(f"{key}={json.dumps(value)}" for key, value in settings.items()))

    def configure(self, *settings: str) -> None:
        """Write study.toml: the registered study but for these ``section.key=value`` settings."""
        config = override(load_config("study", StudyConfig), ["rehearsal.em=jsonl:em.jsonl", *settings])
        self._write("study.toml", to_toml(config))

    def cell(
        self,
        phase: str,
        name: str,
        m1: float = 0.98,
        learned: float = 1.0,
        *,
        rows: list[tuple[int, float, float]] | None = None,
        seed: int = 42,
        labels: tuple[str, ...] = (),
        answers: dict[str, Any] | None = None,
        vectors: bool = False,
        noise_seed: int = 0,
    ) -> Path:
        """A finished cell; `rows` are (step, M1, learned), by default the last step's alone."""
        directory = self.directory / "cells" / self._planned(phase, name, seed)
        intervals: dict[int, tuple[float, float]] = {}
        wanted = [(0, 0.90, 0.0), *(rows or [(375, m1, learned)])]
        if vectors:
            for step, value, _ in wanted:
                samples = samples_with(value, seed=noise_seed)
                save_samples(directory / "vectors" / f"step-{step:06}.safetensors", samples)
                intervals[step] = bootstrap_m1(samples, resamples=100)
        base, *checkpoints = (checkpoint(*row, intervals.get(row[0])) for row in wanted)
        write_record(
            directory / "result.json",
            RunResult(protocol=self.protocol, base=base, baseline=None, checkpoints=tuple(checkpoints), best=1),
        )
        record = CellRecord(
            phase, name, HASH, seed, {}, notes=(), labels=labels, objective_check=None, gpu_seconds=None, seconds=1.0
        )
        write_record(directory / "cell.json", record)
        if answers is not None:
            self._write(directory / "behaviour.json", answers)
        return directory

    def baseline(self, m1: float = 0.98, early: float = 0.91, **more: Any) -> Path:
        """Phase 1 in four checkpoints, from an M1 near the base's to the final one."""
        rows = [(10, early, 0.05), (25, early + 0.01, 0.2), (50, early + 0.045, 0.5), (375, m1, 1.0)]
        return self.cell("1", "baseline", rows=rows, **more)

    def missing(self, phase: str, name: str, seed: int = 42) -> None:
        """A planned cell that nobody has begun."""
        self._planned(phase, name, seed)

    def event(self, phase: str, name: str, event: Event, error: str | None = None) -> None:
        """A planned cell of which the ledger says something, and which has no directory."""
        cell = self._planned(phase, name, 42)
        ledger.append(self.directory, LedgerEntry(len(self.plan), cell, phase, name, event, 1, error))

    def frontier(self, points: list[tuple[float, float, float]], vectors: bool = True) -> None:
        """(scale, M1, learned) of the baseline's update scaled down."""
        rows = []
        for scale, m1, learned in points:
            rows.append(FrontierPoint(scale, m1, (m1, m1), eval_loss=2.0 - learned, learned=9.0, delta_norm=scale))
            if vectors:
                save_samples(self.directory / "frontier" / f"scale-{scale:.1f}.safetensors", samples_with(m1))
        write_record(self.directory / "frontier.json", Frontier(HASH, tuple(rows)))

    def calibration(self, due: bool, passed: bool | None, reason: str = "") -> None:
        """calibration.json."""
        write_record(self.directory / "calibration.json", Calibration(due, passed, reason, {}, HASH))

    def file(self, name: str, content: Any) -> None:
        """Any other file."""
        self._write(name, content)

    def read(self) -> StudyResults:
        """The study as its directory now says."""
        write_record(self.directory / "plan.json", Plan(tuple(self.plan)))
        return read_study(self.directory)

    def _planned(self, phase: str, name: str, seed: int) -> str:
        cell = f"{phase}-{name.replace(' ', '-').replace(':', '-')}-{len(self.plan):012}"
        self.plan.append(PlanEntry(phase, name, seed, {}, cell))
        return cell

    def _write(self, name: str | Path, content: Any) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
