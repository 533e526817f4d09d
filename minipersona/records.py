"""Frozen dataclasses from plain values, strictly, and back: configs (`settings.py`) and what is written as JSON.

An unknown or ill-typed key is an error that says which, and what was probably meant. Types of fields: bool, int, float,
str, Literal, another dataclass, `X | None`, unions of those, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`,
`dict[Literal[...], X]`, and Any, which is taken as it is. A str may hold half of a surrogate pair, as the name of a
file that is not UTF-8 does.
A field that `may_be_missing` is left out of the file where it has its default.
"""

from __future__ import annotations

import difflib
import functools
import json
import types
import typing
from dataclasses import MISSING, field, fields, is_dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal, TypeVar

from minipersona.errors import UserError, require
from minipersona.files import append_jsonl, read_json, read_jsonl, write_text

Record = TypeVar("Record")
LEFT_OUT = "left out where it has its default"


def may_be_missing(default: Any = None) -> Any:
    """A field whose key the file lacks where its value is the default."""
    return field(default=default, metadata={LEFT_OUT: True})


# ---------------------------------------------------------------- from plain values


def from_dict(kind: type[Record], values: dict[str, Any], where: str = "", what: str = "config") -> Record:
    """Build the dataclass `kind` from plain values; `where` precedes its keys in errors, `what` is said to hold them.

    UserError where a key is unknown, missing without a default, or of another type.
    """
    assert is_dataclass(kind)
    hints = _types(kind)
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            raise UserError(unknown_key(where + str(key), [where + name for name in known], what))
    built = {}
    for name, description in known.items():
        if name in values:
            built[name] = _typed(values[name], hints[name], where + name, what)
        elif description.default is MISSING and description.default_factory is MISSING:
            if is_dataclass(hints[name]):
                built[name] = from_dict(hints[name], {}, f"{where}{name}.", what)  # names the first missing key
            else:
                raise UserError(f"{where}{name} is missing" + ("; add it to the config" if what == "config" else ""))
    return kind(**built)


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def unknown_key(key: str, known: list[str], what: str = "config") -> str:
    """The message about a key that does not exist."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
    return f"unknown {what} key {key[:200]}; {mend}"


def _typed(value: Any, kind: Any, where: str, what: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        form = f"a section, written [{where}]" if what == "config" else "a table"
        require(isinstance(value, dict), f"{where} must be {form}")
        return from_dict(typing.cast(type, kind), value, f"{where}.", what)
    if origin is Literal:
        require(value in arguments, f"{where} = {brief(value)}: must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _of_union(value, arguments, where, what)
    if origin is tuple:
        return _tuple(value, arguments, where, what)
    if origin is dict:
        require(
            isinstance(value, dict) and all(isinstance(key, str) for key in value),
            f"{where} = {brief(value)}: must be a table",
        )
        return {
            _typed(key, arguments[0], f"a key of {where}", what): _typed(
                item, arguments[1], f"{where}.{key[:80]}", what
            )
            for key, item in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 1e300, f"{where} = {brief(value)}: must be finite")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where} = {brief(value)}: must be {_english(kind)}")
    if kind is float:
        require(value == value and abs(value) != float("inf"), f"{where} = {value}: must be finite")
    if what == "config" and kind is str:  # of which most are paths, or hold one
        require("\0" not in value, f"{where} = {brief(value)}: holds a NUL character, which no path can; leave it out")
    return value


def _of_union(value: Any, kinds: tuple[Any, ...], where: str, what: str) -> Any:
    """The first of the union's types that the value has; None where the union allows it."""
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds[:-1]:
        try:
            return _typed(value, kind, where, what)
        except UserError:
            continue
    return _typed(value, kinds[-1], where, what)


def _tuple(value: Any, kinds: tuple[Any, ...], where: str, what: str) -> tuple[Any, ...]:
    require(isinstance(value, (list, tuple)), f"{where} = {brief(value)}: must be a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_typed(item, kinds[0], where, what) for item in value)
    require(len(value) == len(kinds), f"{where} = {brief(value)}: must be a list of {len(kinds)}")
    return tuple(_typed(item, kind, where, what) for item, kind in zip(value, kinds, strict=True))


def _english(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]


# ---------------------------------------------------------------- to plain values


def to_dict(record: Any) -> dict[str, Any]:
    """The nested plain values of a record."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    missing = {f.name for f in fields(record) if LEFT_OUT in f.metadata and values[f.name] == f.default}
    return {name: _plain(value) for name, value in values.items() if name not in missing}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


# ---------------------------------------------------------------- as JSON


def read_record(path: Path, kind: type[Record], mend: str) -> Record:
    """The record in a JSON file. UserError, naming the file and the `mend`, where it is not one."""
    return _read(read_json(path), kind, str(path), path.name, mend)


def read_records(path: Path, kind: type[Record], mend: str) -> list[Record]:
    """The records in a file of JSON lines; an empty list if the file does not exist. UserError as in `read_record`."""
    rows = enumerate(read_jsonl(path, mend=mend), 1)
    return [_read(row, kind, f"{path}: line {number}", path.name, mend) for number, row in rows]


def _read(value: Any, kind: type[Record], where: str, what: str, mend: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a table; {mend}")
    try:
        return from_dict(kind, value, what=what)
    except UserError as error:
        raise UserError(f"{where}: {error}; {mend}") from None


def write_record(path: Path, record: Any) -> None:
    """Write a record as JSON, all or nothing. ASCII, since a name or an error may hold half of a surrogate pair."""
    write_text(path, json.dumps(to_dict(record), indent=2, allow_nan=False) + "\n")


def append_record(path: Path, record: Any) -> None:
    """Append a record to a file of JSON lines."""
    append_jsonl(path, to_dict(record))
