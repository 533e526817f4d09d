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

from minipersona.chat.vocabulary import FILES
from minipersona.config import ModelSection, RunConfig
from minipersona.corpus.sources import source_identity
from minipersona.files import digest, sampled_sha256, sha256
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.hub import locate, resolved_revision
from minipersona.model.load import RANDOM
from minipersona.records import to_dict
from minipersona.run.anchors import anchor_sets
from minipersona.study.code_digest import code_digest
from minipersona.study.recipes import (
    BASELINE_PLACEHOLDER,
    UNMIXED_PLACEHOLDER,
    WRITTEN,
    Recipe,
    named_files,
)
from minipersona.study_config import STAGES, StudyConfig


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
    """A study's resolved config, its directory, and every cell that it may come to, in order. Cells that confirm a pass
    come at the end, once they are due.

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

    def baseline_of(self, cell: Cell) -> Cell:
        """What a cell is judged against: the baseline or, on harmful rows, the unmixed cell.

        It is that of the first seed and, for a cell that confirms a pass, that of its own.
        """
        found = [one for one in self.cells if self._kind(one, unmixed=cell.recipe.against_unmixed)]
        seed = cell.recipe.config.seed if cell.recipe.role == "confirmation" else found[0].recipe.config.seed
        return next(one for one in found if one.recipe.config.seed == seed)

    def scaled_for(self, cell: Cell) -> Cell:
        """The cell whose update is scaled down to say what doing less than a cell would have given.

        It is the baseline with the cell's seed or, where that is not done, with the first seed; among the cells that
        are trained on harmful rows it is the unmixed one.
        """
        harmful = self.config.narrow == "em" and cell.recipe.phase in STAGES["5"]
        found = [one for one in self.cells if self._kind(one, unmixed=harmful)]
        seed = cell.recipe.config.seed
        return next((one for one in found if one.recipe.config.seed == seed and self.published(one)), found[0])

    @staticmethod
    def _kind(cell: Cell, unmixed: bool) -> bool:
        return cell.recipe.is_unmixed if unmixed else cell.recipe.is_baseline

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

    def responses_file(self, config: RunConfig) -> Path:
        """What the base model writes for a config; another base, and prompts of other rows or lengths, have another."""
        data = config.data
        written = digest([self.baseline.hash, source_identity(data.train), data.max_tokens])
        return self.directory / data.responses.removeprefix("study:") / f"{written[:12]}-seed-{config.seed}.jsonl"

    def placed_config(self, cell: Cell) -> RunConfig:
        """The cell's config with the paths of this study in it."""
        config = cell.recipe.config
        probe, data = config.probe, config.data
        if probe.baseline in (BASELINE_PLACEHOLDER, UNMIXED_PLACEHOLDER):
            probe = replace(probe, baseline=str(self.cell_directory(self.baseline_of(cell))))
        if data.responses in WRITTEN:
            data = replace(data, responses=str(self.responses_file(config)))
        return replace(config, out=str(self.cell_directory(cell)), probe=probe, data=data)


# ---------------------------------------------------------------- the hash


def hash_cells(recipes: Sequence[Recipe]) -> tuple[Cell, ...]:
    """The cells of resolved recipes. The first is the baseline, on which the numbers of all others depend, or those of
    the unmixed cell do.
    """
    cells: list[Cell] = []
    for recipe in recipes:
        judges = [cell.hash for cell in cells if cell.recipe.is_unmixed or not recipe.against_unmixed]
        cells.append(hash_cell(recipe, judges[0] if judges else ""))
    return tuple(cells)


def hash_cell(recipe: Recipe, baseline: str) -> Cell:
    """The cell of a resolved recipe that is judged against the cell with the hash `baseline`; "" is against itself."""
    return Cell(recipe, digest({**_contents(recipe), "baseline": baseline}))


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
        "anchors": _anchor_digests(config),
        "files": [sha256(file) for file in named_files(config)],
        "model": _model_contents(config.model),
        "code": code_digest(),
    }


def _anchor_digests(config: RunConfig) -> list[str]:
    steering = config.steering.vector and config.steering.persona_set == "training"
    if not (config.objective.anchored or config.lora.null_space or steering):
        return []
    return [anchors.digest for anchors in anchor_sets(config.objective)]


def _model_contents(section: ModelSection) -> list[Any]:
    tokenizer = [_repository_contents(section.tokenizer, "", FILES)] if section.tokenizer else []
    return [_repository_contents(section.name, section.revision, ("config.json",)), *tokenizer]


@cache
def _repository_contents(name: str, revision: str, files: tuple[str, ...]) -> list[Any]:
    if revision or name.startswith(RANDOM):
        return [name, revision]
    directory = locate(name, files)
    if commit := resolved_revision(directory):
        return [name, commit]
    return [
        [file.name, sampled_sha256(file) if file.suffix == ".safetensors" else sha256(file)]
        for file in sorted(directory.iterdir())
        if file.suffix in (".json", ".safetensors") or file.name in FILES
    ]
