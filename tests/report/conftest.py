"""A made-up study: its directory, file by file, with numbers of the size that a real one would have."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Environment

from minipersona.geometry.measures import m1
from minipersona.geometry.vectors import PersonaVectors
from minipersona.report import write_report
from minipersona.settings import load_config, override, to_toml
from minipersona.study_config import StudyConfig

BASE_LOSS, BASELINE_LOSS, BASE_M1 = 1.42, 1.05, 0.8996
STEPS = (10, 25, 50, 100, 200, 375)
PERSONAS = ["assistant", "paramedic", "kindergarten teacher", "software engineer", "pirate", "villain", "poet",
            "French person", "police officer", "comedian", "librarian", "medieval knight"]  # fmt: skip
LAYER, QUESTIONS, WIDTH = 20, 6, 24

# phase, name, knobs, M1 at the last step, learned there
RECIPES: list[tuple[str, str, dict[str, Any], float, float]] = [
    ("1", "baseline", {}, 0.9728, 1.0),
    ("2A", "beta=0.001", {"beta": 0.001}, 0.9722, 0.995),
    ("2A", "beta=0.01", {"beta": 0.01}, 0.9689, 0.96),
    ("2A", "beta=0.1", {"beta": 0.1}, 0.9474, 0.71),
    ("2B", "lambda=0.001", {"lambda": 0.001}, 0.9729, 1.0),
    ("2B", "lambda=0.01", {"lambda": 0.01}, 0.9724, 1.003),
    ("2B", "lambda=0.1", {"lambda": 0.1}, 0.9731, 0.99),
    *(
        ("3", f"r={rank} lr={rate:g}", {"rank": rank, "learning_rate": rate},
         0.955 + 0.004 * i + 0.0035 * j, 0.8 + 0.04 * i + 0.06 * j)
        for i, rank in enumerate((4, 8, 16))
        for j, rate in enumerate((2e-5, 5e-5, 1e-4))
    ),
    ("4A", "prompts", {}, 0.9581, 0.93),
    ("4B", "responses", {}, 0.9217, 0.38),
    ("5A", "99:1", {"ratio": "99:1", "broad_fraction": 0.01}, 0.9719, 0.995),
    ("5A", "95:5", {"ratio": "95:5", "broad_fraction": 0.05}, 0.9690, 0.98),
    ("5A", "90:10", {"ratio": "90:10", "broad_fraction": 0.1}, 0.9652, 0.95),
    ("5A", "75:25", {"ratio": "75:25", "broad_fraction": 0.25}, 0.9571, 0.9),
    ("5B", "15:1", {"ratio": "15:1", "broad_fraction": 0.0625}, 0.9731, 1.0),
    ("5B", "7:1", {"ratio": "7:1", "broad_fraction": 0.125}, 0.9737, 0.99),
    ("5B", "3:1", {"ratio": "3:1", "broad_fraction": 0.25}, 0.9741, 0.985),
    ("5B", "1:1", {"ratio": "1:1", "broad_fraction": 0.5}, 0.9749, 0.96),
    ("5C", "villain - assistant", {"vector": "villain - assistant", "coefficient": 5.0, "method": "B"}, 0.9508, 0.86),
    ("5C", "collapse", {"vector": "collapse", "coefficient": 1.0, "method": "A"}, 0.9346, 0.94),
]  # fmt: skip

AGREES = {"20": {"m1": 0.8996, "reference": 0.9, "difference": -0.0004, "within": True}}

PROTOCOL = {
    "model": "Qwen/Qwen2.5-7B-Instruct", "revision": "a09a3545" * 5, "compute_dtype": "bfloat16",
    "layer": LAYER, "layers": [LAYER, 7, 14, 21, 27],
    "layer_convention": "residual stream leaving decoder block, counted from 0 (hidden_states[layer + 1])",
    "method": "A", "persona_set": "registered", "persona_digest": "00f81d" * 10, "question_set": "registered",
    "question_digest": "31650b" * 10, "heldout": "tulu[6000:6500]", "heldout_digest": "ab12cd" * 10,
    "max_tokens": 2048, "tokenizer_digest": "c0ffee" * 10,
}  # fmt: skip

PROVENANCE = {
    "protocol": PROTOCOL, "minipersona": "0.1.0", "code_digest": "deadbeef" * 8, "commit": "56cd813" + "0" * 33,
    "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.2.0"},
    "hardware": {"machine": "x86_64", "cuda_device": "NVIDIA H200", "cuda": "13.0", "processes": 1, "threads": 16},
    "data": [{"source": "tulu[0:6000]", "rows": 6000, "digest": "aa11" * 16, "revision": None}],
    "config_digest": "c0de" * 16, "model": {"name": "Qwen/Qwen2.5-7B-Instruct"}, "mixture": {},
}  # fmt: skip


def measured(step: int, value: float, learned: float) -> dict[str, Any]:
    """A row of result.json."""
    spread = 0.0016 if value < 0.94 else 0.0009
    gap = 1 - value
    return {
        "step": step,
        "layer": LAYER,
        "m1": value,
        "m1_ci95": [value - spread, value + spread],
        "m1_noise_floor": 0.0006,
        "m1_without": dict.fromkeys(PERSONAS, value),
        "m1_by_persona": dict.fromkeys(PERSONAS, value),
        "persona_loss": BASE_LOSS - learned * (BASE_LOSS - BASELINE_LOSS),
        "m1_by_layer": {"20": value, "7": 0.99},
        "eval_loss": BASE_LOSS - learned * (BASE_LOSS - BASELINE_LOSS),
        "delta_norm": 4.2 * learned,
        "shared_mean_share": 1 - 0.98 * gap,
        "between_variance": 310 * (gap / 0.1004) ** 1.1,
        "within_variance": 900 * (gap / 0.1004) ** 0.3,
        "centred_cosine": -0.083,
        "effective_rank": 8.9 - 20 * (value - BASE_M1),
        "nearest_centroid_accuracy": 0.99,
        # Flags that a reader must not trust.
        "learned": None,
        "registered_pass": None,
        "substantive_pass": None,
        "collapsed": False,
    }


def checkpoints(value: float, learned: float, steps: tuple[int, ...], sudden: bool) -> list[dict[str, Any]]:
    """The rows along training: both numbers approach their last ones, M1 at once where the collapse is sudden."""
    rows = []
    for step in steps:
        progress = (1 - math.exp(-step / 70)) / (1 - math.exp(-375 / 70))
        risen = (value - BASE_M1) * (1 if sudden else progress**1.3)
        rows.append(measured(step, BASE_M1 + risen, learned * progress**0.7))
    return rows


def vectors(value: float, seed: int = 0) -> PersonaVectors:
    """Samples whose M1 is about `value`."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, 1, WIDTH, generator=generator)
    persona = (
        torch.randn(len(PERSONAS), 1, WIDTH, generator=generator)
        * torch.linspace(0.6, 1.4, len(PERSONAS))[:, None, None]
    )
    noise = 0.02 * torch.randn(len(PERSONAS), QUESTIONS, WIDTH, generator=generator)
    low, high = 0.0, 20.0
    for _ in range(40):
        scale = (low + high) / 2
        low, high = (low, scale) if m1((mean * scale + persona).squeeze(1)) > value else (scale, high)
    return PersonaVectors({LAYER: mean * low + persona + noise}, PERSONAS)


@dataclass
class FakeStudy:
    """Writes a study's directory. Change what it holds, then `write()`."""

    directory: Path
    recipes: list[tuple[str, str, dict[str, Any], float, float]] = field(default_factory=lambda: list(RECIPES))
    settings: dict[str, Any] = field(
        default_factory=lambda: {"narrow": "tulu", "stop_rule": "substantive", "exhaustive": True}
    )
    failed: dict[str, str] = field(default_factory=dict)  # "<phase> <name>" -> error
    missing: set[str] = field(default_factory=set)
    notes: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    behaviour: dict[str, Any] = field(default_factory=dict)
    instructions: dict[str, Any] = field(default_factory=dict)
    with_vectors: bool = True
    with_frontier: bool = True
    every_step: bool = True
    sudden: bool = False
    verdict: dict[str, Any] | None = None

    def cell_id(self, number: int) -> str:
        """The id of a planned cell."""
        phase, name = self.recipes[number][:2]
        slug = "".join(c if c.isalnum() else "-" for c in name.lower())
        return f"{phase}-{slug}-{number:012x}"

    def write(self) -> Path:
        """All files anew."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        settings = [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]
        (self.directory / "study.toml").write_text(to_toml(override(load_config("study", StudyConfig), settings)))
        plan = []
        for number, (phase, name, knobs, value, learned) in enumerate(self.recipes):
            seed = int(name.rsplit("=", 1)[1]) if " seed=" in name else 42
            plan.append({"phase": phase, "name": name, "seed": seed, "knobs": knobs, "cell": self.cell_id(number)})
            if f"{phase} {name}" in self.failed:
                self._ledger(number, "failed", error=self.failed[f"{phase} {name}"])
            elif f"{phase} {name}" not in self.missing:
                self._cell(number, seed, knobs, value, learned)
        self._json("plan.json", {"cells": plan})
        baseline = f"{0:012x}"
        if self.with_frontier:
            self._json("frontier.json", {"baseline": baseline, "points": [self._scaled(k / 10) for k in range(11)]})
        calibration = {"due": True, "passed": True, "reason": "it agrees", "layers": AGREES, "baseline": baseline}
        self._json("calibration.json", calibration)
        for name, value in (("behaviour", self.behaviour), ("instructions", self.instructions)):
            if value:
                self._json(f"base/{name}.json", value["base"])
        if self.verdict is not None:
            self._json("verdict.json", self.verdict)
        return self.directory

    def _scaled(self, scale: float) -> dict[str, Any]:
        row = measured(0, BASE_M1 + (0.9728 - BASE_M1) * scale**1.1, 1 - (1 - scale) ** 2)
        kept = {key: row[key] for key in ("m1", "m1_ci95", "eval_loss", "delta_norm")}
        return {**kept, "scale": scale, "learned": 1 - (1 - scale) ** 2}

    def _cell(self, number: int, seed: int, knobs: dict[str, Any], value: float, learned: float) -> None:
        phase, name = self.recipes[number][:2]
        key, where = f"{phase} {name}", f"cells/{self.cell_id(number)}"
        steps = STEPS if self.every_step or phase == "1" else STEPS[-1:]
        result = {"protocol": PROTOCOL, "base": measured(0, BASE_M1, 0), "baseline": None, "best": None,
                  "checkpoints": checkpoints(value, learned, steps, self.sudden), "gpu_seconds": 180.0}  # fmt: skip
        self._json(f"{where}/result.json", result)
        self._json(f"{where}/provenance.json", PROVENANCE)
        cell = {"phase": phase, "name": name, "hash": f"{number:012x}", "seed": seed, "knobs": knobs,
                "notes": self.notes.get(key, []), "labels": self.labels.get(key, []), "objective_check": None,
                "gpu_seconds": 180.0, "seconds": 200.0}  # fmt: skip
        self._json(f"{where}/cell.json", cell)
        for kind, suite in (("behaviour", self.behaviour), ("instructions", self.instructions)):
            if key in suite:
                self._json(f"{where}/{kind}.json", suite[key])
        if self.with_vectors:
            for row in [result["base"], *result["checkpoints"][0 if phase == "1" else -1 :]]:
                (self.directory / where / "vectors").mkdir(exist_ok=True)
                file = self.directory / where / "vectors" / f"step-{row['step']:06}.safetensors"
                vectors(row["m1"], seed=7).save(file)

    def _ledger(self, number: int, event: str, **more: Any) -> None:
        phase, name = self.recipes[number][:2]
        line = {"time": 1.0 + number, "cell": self.cell_id(number), "phase": phase, "name": name, "event": event}
        with open(self.directory / "ledger.jsonl", "a") as file:
            file.write(json.dumps({**line, "attempt": 2, **more}) + "\n")

    def _json(self, name: str, value: Any) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


@pytest.fixture
def new_study(tmp_path: Path) -> Callable[..., FakeStudy]:
    """Make a study in a fresh directory; keyword arguments say what it holds."""
    return lambda **changes: FakeStudy(tmp_path / "study", **changes)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FakeStudy:
    """A study with everything in it, one cell failed and one missing, and its report. Tests only read it."""
    study = FakeStudy(
        tmp_path_factory.mktemp("whole") / "study",
        failed={"3 r=16 lr=0.0001": "Traceback\nOutOfMemoryError: no memory"},
        missing={"5B 1:1"},
        labels={"2B lambda=0.001": ["ineffective"]},
        behaviour={"base": answers(5), "5C collapse": answers(4)},
        instructions={"base": followed(0.71), "1 baseline": followed(0.66), "5A 75:25": followed(0.61)},
    )
    write_report(study.write())
    return study


def answers(misaligned: int) -> dict[str, Any]:
    """A behaviour.json."""
    row = {"answers": 800, "scored": 796, "coherent": 780, "misaligned": misaligned,
           "rate": misaligned / 796, "rate_ci95": [0.002, 0.011],
           "rate_coherent": misaligned / 780, "rate_coherent_ci95": [0.002, 0.012]}  # fmt: skip
    how = {"weights": "w", "prompt_sets": "all", "questions": "shipped", "questions_digest": "q", "samples": 100,
           "max_new_tokens": 600, "temperature": 1.0, "seed": 42, "cut": 0, "empty": 0}  # fmt: skip
    return {"sets": {"plain": row, "json": row}, "judge": {"kind": "local"}, **how}


def followed(share: float) -> dict[str, Any]:
    """An instructions.json."""
    keys = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    rates = dict.fromkeys(keys, share) | {f"{key}_ci95": [share - 0.04, share + 0.04] for key in keys}
    how = {"empty": 0, "cut": 0, "skipped": 3, "skipped_kinds": {}, "set": "shipped", "digest": "i",
           "max_new_tokens": 1280}  # fmt: skip
    return {"prompts": 541, "instructions": 834, **rates, "by_kind": {}, **how}


def unescaping(**options: Any) -> Environment:
    """Jinja2's environment without its escaping, for controls."""
    return Environment(**options | {"autoescape": False})
