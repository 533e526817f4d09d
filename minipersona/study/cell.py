"""A study's cells: a recipe each, the hash that stands for all that its numbers depend on, and its place on disk.

The hash covers the config, the contents of everything that the config only names, and the code. Nothing large is read
for it: a model or a data set on the Hub is its commit, a local model its sizes and small files, a local data file its
bytes. So a study knows all of its cells before it has fetched the data of the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from minipersona.config import ModelSection, ObjectiveSection, RunConfig
from minipersona.corpus.sources import source_identity
from minipersona.files import digest, sha256
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.hub import locate, resolved_revision
from minipersona.model.load import RANDOM
from minipersona.records import to_dict
from minipersona.run.anchors import anchor_sets
from minipersona.study.code_digest import code_digest
from minipersona.study.recipes import BASELINE_PLACEHOLDER, RESPONSES_PLACEHOLDER, Recipe
from minipersona.study_config import StudyConfig


@dataclass(frozen=True)
class Cell:
    """A recipe and the hash of all that its numbers depend on."""

    recipe: Recipe
    hash: str

    @property
    def id(self) -> str:
        """The name of its directory: ``3-r-4-lr-2e-05-0123456789ab``."""
        return f"{self.recipe.slug}-{self.hash[:12]}"


@dataclass(frozen=True)
class Study:
    """A study's resolved config, its directory, and every cell that it may come to, in order.

    cells/<cell>            a finished cell, which got its name by one rename
    cells/.attempts/<cell>  a cell at work, or what an attempt that ended early has left
    """

    config: StudyConfig
    directory: Path
    cells: tuple[Cell, ...]

    @property
    def baseline(self) -> Cell:
        """The unregularised cell that all others are judged against."""
        return self.cells[0]

    @property
    def base(self) -> Path:
        """What was measured of the untouched model."""
        return self.directory / "base"

    @property
    def attempts(self) -> Path:
        """Where jobs work, and hold their locks."""
        return self.directory / "cells" / ".attempts"

    def cell_directory(self, cell: Cell) -> Path:
        """Where a cell's results are published."""
        return self.directory / "cells" / cell.id

    def published(self, cell: Cell) -> bool:
        """Whether a cell's results are there."""
        return (self.cell_directory(cell) / "cell.json").is_file()

    def responses_file(self, seed: int) -> Path:
        """What the base model writes in persona for phase 4B; another base or other rows have another file."""
        return self.directory / "role_play" / f"{self.baseline.hash[:12]}-seed-{seed}.jsonl"

    def placed_config(self, cell: Cell) -> RunConfig:
        """The cell's config with the paths of this study in it."""
        config = cell.recipe.config
        probe, data = config.probe, config.data
        if probe.baseline == BASELINE_PLACEHOLDER:
            probe = replace(probe, baseline=str(self.cell_directory(self.baseline)))
        if data.responses == RESPONSES_PLACEHOLDER:
            data = replace(data, responses=str(self.responses_file(config.seed)))
        return replace(config, out=str(self.cell_directory(cell)), probe=probe, data=data)


# ---------------------------------------------------------------- the hash


def hash_cells(recipes: Sequence[Recipe]) -> tuple[Cell, ...]:
    """The cells of resolved recipes. The first is the baseline, on which the numbers of all others depend."""
    cells: list[Cell] = []
    for recipe in recipes:
        baseline = cells[0].hash if cells else ""
        cells.append(Cell(recipe, digest({**_contents(recipe), "baseline": baseline})))
    return tuple(cells)


def _contents(recipe: Recipe) -> dict[str, Any]:
    config = recipe.config
    values = to_dict(config)
    for left_out in ("out", "execution"):
        del values[left_out]
    data, probe = config.data, config.probe
    sources = [source for source in (data.train, data.heldout, data.broad) if source]
    return {
        "config": values,
        "knobs": recipe.knobs,
        "data": [source_identity(source) for source in sources],
        "personas": load_personas(probe.personas).digest,
        "questions": load_questions(probe.questions).digest,
        "anchors": _anchor_digests(config.objective),
        "model": _model_contents(config.model),
        "code": code_digest(),
    }


def _anchor_digests(section: ObjectiveSection) -> list[str]:
    if not section.anchored:
        return []
    return [anchors.digest for anchors in anchor_sets(section)]


@cache
def _model_contents(section: ModelSection) -> Any:
    if section.revision or section.name.startswith(RANDOM):
        return [section.name, section.revision]
    directory = locate(section.name, ["config.json"])
    if commit := resolved_revision(directory):
        return [section.name, commit]
    return [
        [file.name, file.stat().st_size, sha256(file) if file.suffix == ".json" else None]
        for file in sorted(directory.iterdir())
        if file.suffix in (".json", ".safetensors")
    ]
