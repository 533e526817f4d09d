"""Study directories made by hand: numbers and small vectors in the runner's layout, no training.

The base's loss is 2 and the baseline's 1, so that a cell's loss is 2 - learned, and the registered bound on it is 2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipersona.geometry.statistics import bootstrap_m1
from minipersona.geometry.vectors import PersonaVectors
from minipersona.verdict.results import StudyResults, read_study

LAYER = 3
PERSONAS, QUESTIONS, WIDTH = 4, 24, 16
SETS = ("plain", "narrow_like")


def samples_with(m1: float, noise: float = 0.02, seed: int = 0) -> Tensor:
    """(P, Q, D) samples whose persona vectors have just that M1; equal seeds have equal noise at every question."""
    directions = torch.linalg.qr(torch.randn(WIDTH, PERSONAS + 1, generator=torch.Generator().manual_seed(1))).Q.T
    vectors = m1**0.5 * directions[0] + (1 - m1) ** 0.5 * directions[1:]  # (P, D), unit vectors
    scatter = torch.randn(PERSONAS, QUESTIONS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return vectors[:, None] + noise * (scatter - scatter.mean(1, keepdim=True))


def behaviour(rate: float, answers: int = 200) -> dict[str, Any]:
    """behaviour.json with the same rate of misaligned answers on every prompt set."""
    row = {"answers": answers, "scored": answers, "coherent": answers, "misaligned": round(rate * answers)}
    return {"sets": {name: dict(row) for name in SETS}, "judge": {"kind": "file"}, "questions_digest": "q"}


class SyntheticStudy:
    """Writes a study's directory piece by piece; `read()` reads it back."""

    def __init__(self, directory: Path, protocol: dict[str, Any] | None = None, **settings: Any) -> None:
        self.directory = directory
        self.plan: list[dict[str, Any]] = []
        self.protocol = {
            "model": "some/model", "revision": "r", "layer": LAYER, "layers": [LAYER], "method": "A",
            "persona_set": "shipped", "question_set": "shipped", **(protocol or {}),
        }  # fmt: skip
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        self._write("study.toml", "\n".join(lines) + "\n")

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
        **more: Any,
    ) -> Path:
        """A finished cell; `rows` are (step, M1, learned), by default the last step's alone."""
        directory = self.directory / "cells" / self._planned(phase, name, seed)
        checkpoints = rows or [(375, m1, learned)]
        samples = {step: samples_with(value, seed=noise_seed) for step, value, _ in [(0, 0.90, 0.0), *checkpoints]}
        if vectors:
            for step, array in samples.items():
                stored = PersonaVectors({LAYER: array}, [f"p{i}" for i in range(PERSONAS)])
                stored.save(directory / "vectors" / f"step-{step:06}.safetensors")

        def row(step: int, value: float, share: float) -> dict[str, Any]:
            interval = bootstrap_m1(samples[step], resamples=100) if vectors else (value - 1e-3, value + 1e-3)
            flags = {"learned": 9.0, "registered_pass": True, "substantive_pass": True, "collapsed": True}  # lies
            return {"step": step, "m1": value, "m1_ci95": list(interval), "eval_loss": 2.0 - share, **flags}

        result = {
            "protocol": self.protocol,
            "base": row(0, 0.90, 0.0),
            "baseline": None,
            "checkpoints": [row(*checkpoint) for checkpoint in checkpoints],
            "best": 1,
        }
        self._write(directory / "result.json", result)
        self._write(
            directory / "cell.json",
            {"phase": phase, "name": name, "hash": "0" * 12, "seed": seed, "knobs": {}, "labels": list(labels), **more},
        )
        if answers is not None:
            self._write(directory / "behaviour.json", answers)
        return directory

    def baseline(self, m1: float = 0.98, early: float = 0.91, **more: Any) -> Path:
        """Phase 1 in six checkpoints, from an M1 near the base's to the final one."""
        rows = [(10, early, 0.05), (25, early + 0.01, 0.2), (50, early + 0.045, 0.5), (375, m1, 1.0)]
        return self.cell("1", "baseline", rows=rows, **more)

    def missing(self, phase: str, name: str, seed: int = 42) -> None:
        """A planned cell that nobody has begun."""
        self._planned(phase, name, seed)

    def event(self, phase: str, name: str, event: str, **more: Any) -> None:
        """A planned cell of which the ledger says something, and which has no directory."""
        line = {"time": len(self.plan), "cell": self._planned(phase, name, 42), "phase": phase, "name": name,
                "event": event, "attempt": 1, **more}  # fmt: skip
        with open(self.directory / "ledger.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def frontier(self, points: list[tuple[float, float, float]], vectors: bool = True) -> None:
        """(scale, M1, learned) of the baseline's update scaled down."""
        rows = []
        for scale, m1, learned in points:
            rows.append(
                {"scale": scale, "m1": m1, "m1_ci95": [m1, m1], "eval_loss": 2.0 - learned, "delta_norm": scale}
            )
            if vectors:
                stored = PersonaVectors({LAYER: samples_with(m1)}, [f"p{i}" for i in range(PERSONAS)])
                stored.save(self.directory / "frontier" / f"scale-{scale:.1f}.safetensors")
        self._write("frontier.json", {"points": rows})

    def file(self, name: str, content: Any) -> None:
        """Any other file."""
        self._write(name, content)

    def read(self) -> StudyResults:
        """The study as its directory now says."""
        self._write("plan.json", {"cells": self.plan})
        return read_study(self.directory)

    def _planned(self, phase: str, name: str, seed: int) -> str:
        cell = f"{phase}-{name.replace(' ', '-').replace(':', '-')}-{len(self.plan):012}"
        self.plan.append({"phase": phase, "name": name, "seed": seed, "knobs": {}, "cell": cell})
        return cell

    def _write(self, name: str | Path, content: Any) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
