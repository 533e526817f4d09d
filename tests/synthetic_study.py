"""Study directories made by hand: numbers and small vectors in a study's layout, no training.

The base's loss is 2 and the baseline's 1, so that a cell's loss is 2 - learned, and the registered bound on it is 2.
The base's M1 is 0.90, so that relative bounds are the registered ones, 0.95 and 0.97; its variances are 1.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipersona.geometry.vectors import PersonaVectors
from minipersona.records import write_record
from minipersona.run.directory import losses_file, vectors_file
from minipersona.run.losses import HeldoutLosses
from minipersona.run.result import Checkpoint, MeasurementProtocol, RunResult
from minipersona.settings import load_config, override, to_toml
from minipersona.study_config import StudyConfig
from minipersona.verdict import ledger
from minipersona.verdict.calibration import Calibration
from minipersona.verdict.files import (
    CellRecord,
    ChosenScales,
    Frontier,
    FrontierPoint,
    Knobs,
    MatchedScale,
    Plan,
    PlanEntry,
    Role,
    Scaling,
    frontier_vectors,
    matched_file,
)
from minipersona.verdict.ledger import Event, LedgerEntry
from minipersona.verdict.results import StudyResults, read_study

LAYER = 3
PERSONAS, QUESTIONS, WIDTH = 4, 24, 16
ROWS = 50  # held-out ones
BASE_M1 = 0.90
SETS = ("plain", "narrow_like")
NAMES = tuple(f"p{i}" for i in range(PERSONAS))
FRESH = (101, 102, 103)  # seeds
HASH = "0" * 12  # of the first cell, which is the baseline where a study begins with it
PROTOCOL = MeasurementProtocol(
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
    PersonaVectors({layer: samples}, list(NAMES)).save(path)


def losses_with(loss: float, noise: float = 0.1, seed: int = 0) -> HeldoutLosses:
    """Held-out losses by row with just that pooled loss; equal seeds have equal noise in every row."""
    scatter = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nats, tokens = 10 * (loss + noise * (scatter - scatter.mean())), torch.full((ROWS,), 10)
    return HeldoutLosses(nats.clamp(min=0), tokens, nats.clamp(min=0), tokens.clone())


def behaviour(rate: float, answers: int = 200) -> dict[str, Any]:
    """behaviour.json with the same rate of misaligned answers on every prompt set."""
    row = {"answers": answers, "scored": answers, "coherent": answers, "misaligned": round(rate * answers),
           "rate": rate, "rate_ci95": [0.0, 1.0], "rate_coherent": rate, "rate_coherent_ci95": [0.0, 1.0]}  # fmt: skip
    how = {"weights": "w", "prompt_sets": "all", "questions": "shipped", "questions_digest": "q", "samples": 100,
           "max_new_tokens": 600, "temperature": 1.0, "seed": 42, "cut": 0, "empty": 0}  # fmt: skip
    return {"sets": {name: dict(row) for name in SETS}, "judge": {"kind": "file"}, **how}


def checkpoint(
    step: int,
    m1: float,
    learned: float,
    interval: tuple[float, float] | None = None,
    *,
    base_m1: float = BASE_M1,
    **more: Any,
) -> Checkpoint:
    """A row of result.json. Its flags are lies that a reader must not trust. The personas draw together as M1 rises."""
    numbers: dict[str, Any] = {
        "between_variance": (1 - m1) / (1 - base_m1),
        "within_variance": 1.0,
        "persona_loss": 2.0 - learned,
        "m1_without": dict.fromkeys(NAMES, m1),
        "m1_by_persona": dict.fromkeys(NAMES, m1),
        **more,
    }
    return Checkpoint(
        layer=LAYER, m1=m1, centred_cosine=-0.3, shared_mean_share=0.9, effective_rank=2.5,
        nearest_centroid_accuracy=1.0, m1_noise_floor=1e-3, m1_by_layer={str(LAYER): m1},
        step=step, m1_ci95=interval or (m1 - 1e-3, m1 + 1e-3), eval_loss=2.0 - learned, learned=9.0, delta_norm=1.0,
        registered_pass=True, substantive_pass=True, collapsed=True, **numbers,
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
        role: Role = "registered",
        knobs: Knobs | None = None,
        labels: tuple[str, ...] = (),
        answers: dict[str, Any] | None = None,
        noise_seed: int = 0,
        less: float | None = 0.0,
        base_m1: float = BASE_M1,
        interval: tuple[float, float] | None = None,
        protocol: dict[str, Any] | None = None,
        **more: Any,
    ) -> Path:
        """A finished cell; `rows` are (step, M1, learned), by default the last step's alone.

        less   M1 of the scaled baseline with the same loss, less the cell's: above zero is in the cell's favour.
               None leaves out vectors, losses by row and the scaled baseline
        more   numbers of the last row
        """
        cell = self._planned(phase, name, seed, role, knobs)
        directory = self.directory / "cells" / cell
        wanted = rows or [(375, m1, learned)]
        checkpoints = [
            checkpoint(*row, interval, base_m1=base_m1, **(more if row is wanted[-1] else {})) for row in wanted
        ]
        base = checkpoint(0, base_m1, 0.0, base_m1=base_m1)
        if less is not None:
            for row in (base, *checkpoints):
                self._parts(directory, row, noise_seed)
            for row in checkpoints:
                if 0 < 2.0 - (row.eval_loss or 0) < 1:
                    self._matched(cell, row, row.m1 + less)
        write_record(
            directory / "result.json",
            RunResult(
                protocol=replace(self.protocol, **(protocol or {})), base=base, baseline=None,
                checkpoints=tuple(checkpoints), best=1,
            ),
        )  # fmt: skip
        record = CellRecord(
            phase, name, cell[-12:], seed, knobs or {}, notes=(), labels=labels, objective_check=None,
            gpu_seconds=None, seconds=1.0, role=role,
        )  # fmt: skip
        write_record(directory / "cell.json", record)
        if answers is not None:
            self._write(directory / "behaviour.json", answers)
        return directory

    def baseline(self, m1: float = 0.98, early: float = 0.91, **more: Any) -> Path:
        """Phase 1 in four checkpoints, from an M1 near the base's to the final one."""
        rows = [(10, early, 0.05), (25, early + 0.01, 0.2), (50, early + 0.045, 0.5), (375, m1, 1.0)]
        return self.cell("1", "baseline", rows=rows, **more)

    def witnesses(self, *phases: str, m1: float = 0.98, learned: float = 0.99) -> None:
        """A recipe that teaches and has collapsed, in each of these phases; by default in one of each of 2 to 5."""
        for phase in phases or ("2A", "3", "4A", "5A"):
            self.cell(phase, "75:25" if phase in ("5A", "5B") else "witness", m1, learned)

    def confirm(self, phase: str, name: str, *values: tuple[float, float], **more: Any) -> None:
        """Fresh seeds of a recipe with these (M1, learned), three passes by default, and of the baseline."""
        for seed, (m1, learned) in zip(FRESH, values or ((0.94, 0.95),) * 3, strict=False):
            named = {(entry.phase, entry.name) for entry in self.plan}
            if ("1", f"baseline seed={seed}") not in named:
                self.baseline_again(seed)
            self.cell(phase, f"{name} seed={seed}", m1, learned, seed=seed, role="confirmation", **more)

    def baseline_again(self, seed: int) -> None:
        """The baseline with a fresh seed."""
        self.cell("1", f"baseline seed={seed}", seed=seed, role="confirmation", less=None)

    def missing(self, phase: str, name: str, seed: int = 42, role: Role = "registered") -> None:
        """A planned cell that nobody has begun."""
        self._planned(phase, name, seed, role)

    def event(self, phase: str, name: str, event: Event, error: str | None = None, role: Role = "registered") -> None:
        """A planned cell of which the ledger says something, and which has no directory."""
        cell = self._planned(phase, name, 42, role)
        ledger.append(self.directory, LedgerEntry(len(self.plan), cell, phase, name, event, 1, error))

    def frontier(self, points: list[tuple[float, float, float]]) -> None:
        """(scale, M1, learned) of the baseline's update scaled down."""
        rows = []
        for scale, m1, learned in points:
            rows.append(FrontierPoint(scale, m1, (m1, m1), eval_loss=2.0 - learned, learned=9.0, delta_norm=scale))
            save_samples(frontier_vectors(self.directory, scale), samples_with(m1))
        write_record(self.directory / "frontier.json", Frontier(HASH, tuple(rows)))

    def scaling(self, one: tuple[float, float], per_block: tuple[float, float], baseline: str = HASH) -> None:
        """(M1, learned) of the baseline's update scaled by one scale and block by block, as training personas chose."""
        found = [
            ChosenScales(scales, separation=0.56, loss=1.1, measured=checkpoint(375, *numbers))
            for scales, numbers in (((0.5, 0.5), one), ((0.25, 1.0), per_block))
        ]
        write_record(self.directory / "scaling.json", Scaling(baseline, 0.55, ("a" * 64, "b" * 64), *found))

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

    def _parts(self, directory: Path, row: Checkpoint, seed: int) -> None:
        """The vectors and the losses by row that a checkpoint was measured from."""
        assert row.step is not None and row.eval_loss is not None
        save_samples(vectors_file(directory, row.step), samples_with(row.m1, seed=seed))
        losses_with(row.eval_loss, seed=seed).save(losses_file(directory, row.step))

    def _matched(self, cell: str, row: Checkpoint, m1: float) -> None:
        """The scaled baseline with the loss of a checkpoint."""
        assert row.step is not None and row.eval_loss is not None
        found = MatchedScale(
            baseline=self.unmixed if cell.startswith("5") else HASH, cell=cell[-12:], step=row.step, scale=0.5, m1=m1,
            m1_ci95=(m1, m1), eval_loss=row.eval_loss, persona_loss=None, between_variance=None, within_variance=None,
            slope=-0.08,
        )  # fmt: skip
        write_record(matched_file(self.directory, cell, row.step), found)
        save_samples(matched_file(self.directory, cell, row.step, ".vectors.safetensors"), samples_with(m1))
        losses_with(row.eval_loss).save(matched_file(self.directory, cell, row.step, ".losses.safetensors"))

    @property
    def unmixed(self) -> str:
        """The hash of what phase 5 is held against: the unmixed harmful cell, or the baseline."""
        return next((entry.cell[-12:] for entry in self.plan if entry.phase == "EM"), HASH)

    def _planned(self, phase: str, name: str, seed: int, role: Role = "registered", knobs: Knobs | None = None) -> str:
        cell = f"{phase}-{name.replace(' ', '-').replace(':', '-')}-{len(self.plan):012}"
        self.plan.append(PlanEntry(phase, name, seed, knobs or {}, cell, role))
        return cell

    def _write(self, name: str | Path, content: Any) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
