"""The files of a study's directory, read and checked. What is there and cannot be right is a UserError with a mend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from minipersona.errors import UserError
from minipersona.files import read_json
from minipersona.records import to_dict
from minipersona.verdict.ledger import read_ledger

Table = dict[str, Any]


def newest_events(directory: Path) -> dict[str, Table]:
    """The newest event of each cell."""
    return {entry.cell: to_dict(entry) for entry in read_ledger(directory)}


def read_result(path: Path) -> Table:
    """result.json, its rows checked."""
    if not path.is_file():
        raise UserError(f"{path.parent}: has a cell.json and no result.json; delete it and continue the study")
    result = read_table(path, ("protocol", "base", "checkpoints"))
    if not isinstance(result["protocol"], dict):
        raise UserError(f"{path}: protocol is no table; delete {path.parent} and continue the study")
    rows = result["checkpoints"]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: has no checkpoints; delete {path.parent} and continue the study")
    for row in [result["base"], *rows]:
        _check_row(path, row)
    return {**result, "checkpoints": sorted(rows, key=lambda row: row["step"])}


def _check_row(path: Path, row: Any) -> None:
    def bad(what: str) -> UserError:
        return UserError(f"{path}: {what}; delete {path.parent} and continue the study")

    if not isinstance(row, dict):
        raise bad("a row is no table")
    for key in ("step", "m1", "eval_loss"):
        if key not in row:
            raise bad(f"a row has no {key}")
        if (key, row[key]) == ("eval_loss", None):
            continue  # a study without held-out rows; its passes stay open
        if not _is_number(row[key]):
            raise bad(f"{key} = {brief(row[key])} is no number")
    if abs(row["m1"]) > 1 + 1e-6:
        raise bad(f"m1 = {row['m1']} is no mean cosine")
    interval = row.get("m1_ci95")
    if (
        not isinstance(interval, list)
        or len(interval) != 2
        or not all(map(_is_number, interval))
        or interval[0] > interval[1]
    ):
        raise bad(f"m1_ci95 = {brief(interval)} is no interval")


def _is_number(value: Any) -> bool:
    """Finite, and not beyond what a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def read_frontier(path: Path, baseline: str) -> list[Table]:
    """The points of frontier.json, by scale; none where there is no such file, or it is another baseline's."""
    frontier = read_optional(path, baseline)
    if frontier is None:
        return []
    points = frontier.get("points")
    for point in points if isinstance(points, list) else [points]:
        if not isinstance(point, dict) or not all(
            _is_number(point.get(key)) or (key == "eval_loss" and point.get(key, 0) is None)
            for key in ("scale", "m1", "eval_loss")
        ):
            raise UserError(f"{path}: {str(point)[:80]} is no point of a frontier; delete the file and continue")
    return sorted(points or [], key=lambda point: point["scale"])


def read_behaviour(path: Path) -> Table | None:
    """behaviour.json with the counts that a comparison of rates needs, None where there is none."""
    if not path.is_file():
        return None
    behaviour = read_table(path, ("sets",))
    sets = behaviour["sets"]
    if not isinstance(sets, dict) or not all(isinstance(row, dict) for row in sets.values()):
        raise UserError(f"{path}: sets must be a table of tables; delete the file and continue the study")
    for name, row in sets.items():
        counts = [row.get(key) for key in ("misaligned", "coherent", "scored", "answers")]
        if not all(isinstance(count, int) for count in counts) or counts != sorted(counts):
            raise UserError(f"{path}: {name} has no misaligned <= coherent <= scored <= answers; delete the file")
    return behaviour


def read_instructions(path: Path) -> Table | None:
    """instructions.json, None where there is none."""
    return read_optional(path, keys=("prompts",))


def read_sweep(path: Path) -> Table | None:
    """sweep.json, None where there is none."""
    sweep = read_optional(path, keys=("recipe", "layers"))
    layers = {} if sweep is None else sweep["layers"]
    if not isinstance(layers, dict) or not all(
        layer.isdecimal() and isinstance(layers[layer], dict) for layer in layers
    ):
        raise UserError(f"{path}: layers must be a table of tables by layer; delete the file and continue the study")
    return sweep


def read_table(path: Path, keys: Sequence[str]) -> Table:
    """A JSON object that has these keys."""
    value = read_json(path)
    if not isinstance(value, dict) or not set(keys) <= value.keys():
        whole = path.name in ("cell.json", "result.json")  # what a cell is published with, and nothing makes alone
        wanted = f"a table with {', '.join(keys)}" if keys else "a table"
        raise UserError(f"{path}: must be {wanted}; delete {path.parent if whole else path} and continue the study")
    return value


def read_optional(path: Path, baseline: str = "", keys: Sequence[str] = ()) -> Table | None:
    """A table, None where it is not there or carries the hash of another baseline than the one named."""
    if not path.is_file():
        return None
    value = read_table(path, keys)
    made_for = str(value.get("baseline") or "")
    length = min(len(made_for), len(baseline))  # an id holds the beginning of a hash
    return value if made_for[:length] == baseline[:length] else None


def frontier_vectors(directory: Path, scale: float) -> Path:
    """Where a study keeps the vectors of a point."""
    return directory / "frontier" / f"scale-{scale:.1f}.safetensors"
