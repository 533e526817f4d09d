"""What a cell is, as a hash: its config and the contents of everything that the config only names.

Nothing large is read for it: a model or a data set on the Hub is its commit, a local model its sizes and small files,
a local data file its bytes. So a study knows all of its cells before it has fetched the data of the later ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from minipersona.config import ModelSection
from minipersona.corpus.sources import source_identity
from minipersona.files import PACKAGE, digest, sha256
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.hub import locate, resolved_revision
from minipersona.model.load import RANDOM
from minipersona.records import to_dict
from minipersona.study.recipes import Recipe

# The code that a cell's numbers come from. A change to the report or the verdict leaves finished cells valid.
FOLDERS = ("model", "chat", "corpus", "objective", "training", "geometry")
FILES = (
    "behaviour/roleplay.py",
    "run/directory.py",
    "run/resources.py",
    "run/measurement.py",
    "run/train.py",
    "run/steering.py",
    "run/evaluate.py",
)


@dataclass(frozen=True)
class Cell:
    """A recipe and the name that its results have on disk."""

    recipe: Recipe
    hash: str

    @property
    def id(self) -> str:
        """``3-r-4-lr-2e-05-0123456789ab``."""
        return f"{self.recipe.slug}-{self.hash[:12]}"

    @property
    def about(self) -> tuple[str, str, str]:
        """How the ledger names it: id, phase, name."""
        return self.id, self.recipe.phase, self.recipe.name


def identify(recipes: list[Recipe]) -> list[Cell]:
    """The cells of resolved recipes. The first is the baseline, which is part of the identity of all others."""
    baseline = ""
    cells = []
    for recipe in recipes:
        cell = Cell(recipe, digest({**_content(recipe), "baseline": baseline}))
        baseline = baseline or cell.hash
        cells.append(cell)
    return cells


def _content(recipe: Recipe) -> dict[str, Any]:
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
        "model": _model_identity(config.model),
        "code": cell_code(),
    }


@cache
def _model_identity(section: ModelSection) -> Any:
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


@cache
def cell_code() -> str:
    """One SHA-256 over the source files that a cell's numbers come from."""
    files = [file for folder in FOLDERS for file in sorted((PACKAGE / folder).rglob("*.py"))]
    return sha256(*files, *[PACKAGE / name for name in FILES])
