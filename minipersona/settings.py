"""Configs as TOML: read strictly, overridden on the command line, written back whole, compared.

An unknown or ill-typed key is an error that says which, and what was probably meant.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from minipersona.config import RunConfig
from minipersona.errors import UserError, require
from minipersona.files import configs_dir, user_path
from minipersona.records import from_dict, to_dict, unknown_key

# ---------------------------------------------------------------- reading

LONGEST_CONFIG = 1_000_000  # bytes
Config = TypeVar("Config")


def load_config(path: str, kind: type[Config]) -> Config:
    """Read a TOML file, or a shipped config by its bare name (``tiny_phase1``). UserErrors name the file."""
    file = find_config(path)
    values = read_toml(file)
    try:
        return from_dict(kind, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def find_config(path: str) -> Path:
    """The file that `path` means: itself, or, for a bare name, the shipped config of that name."""
    shipped, bare = configs_dir(), Path(path).name == path
    # What cannot be a file's name at all: ~nobody/x, one that is too long, one with a NUL character.
    with contextlib.suppress(OSError, UserError, ValueError):
        file = user_path(path)
        for candidate in (file, *((shipped / path, shipped / f"{path}.toml") if bare else ())):
            if candidate.is_file():
                return candidate
    known = ", ".join(sorted(file.stem for file in shipped.glob("*.toml")))
    raise UserError(f"{path}: no such config; give the path of a TOML file, or the name of a shipped one: {known}")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's table; a syntax error is a UserError with its line."""
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST_CONFIG + 1)
        require(len(content) <= LONGEST_CONFIG, f"{path}: is longer than {LONGEST_CONFIG:,} bytes; name a config")
        return tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable TOML file") from None
    except (ValueError, RecursionError) as error:  # also where a number has too many digits, or lists too many levels
        raise UserError(f"{path}: not valid TOML: {error}") from None


def override(config: Config, settings: list[str]) -> Config:
    """Apply ``section.key=value`` settings; a bare ``key=value`` will do where only one section has that key."""
    present, values = flatten(config), dict[str, Any]()
    for setting in settings:
        path, separator, text = setting.partition("=")
        require(bool(separator), f"--set {setting}: write section.key=value")
        # A shell passes bytes that are not UTF-8 on as surrogates, which no config file can hold.
        require(not re.search("[\ud800-\udfff]", setting), f"--set {setting!r}: is not valid Unicode")
        key, value = _qualify(config, path.strip()), _value(text.strip())
        is_text = isinstance(present[key], str)
        values[key] = text.strip() if is_text and not isinstance(value, str) else value  # --set out=2024
    return with_settings(config, values)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with these values under their dotted keys. UserError for an unknown key or a value of another type."""
    values, known = to_dict(config), list(flatten(config))
    for path, value in settings.items():
        require(path in known, unknown_key(path, known))
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[key] = value
    return from_dict(type(config), values)  # at the end, since settings may make sense only together


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # an unquoted string, as a shell user writes it


def flatten(config: Any, where: str = "") -> dict[str, Any]:
    """Every value under its dotted key."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value, f"{where}{f.name}.") if is_dataclass(value) else {where + f.name: value}
    return flat


def dotted(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Every value of nested tables under its dotted key; a key may be dotted already."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= dotted(value, f"{where}{key}.") if isinstance(value, Mapping) else {where + key: value}
    return flat


def _qualify(config: Any, path: str) -> str:
    keys = list(flatten(config))
    if path in keys:
        return path
    matches = [key for key in keys if key.rsplit(".", 1)[-1] == path]
    if len(matches) > 1:
        raise UserError(f"--set {path}: is ambiguous; name {' or '.join(matches)}")
    if not matches:
        raise UserError(unknown_key(path, keys))
    return matches[0]


# ---------------------------------------------------------------- writing


def to_toml(config: Any) -> str:
    """The complete config as TOML that `load_config` reads back to an equal one."""
    values = to_dict(config)
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if _is_array_of_tables(value)}
    lines = _lines({key: value for key, value in values.items() if key not in sections | tables})
    for name, section in sections.items():
        lines += ["", f"[{name}]", *_lines(section)]
    for name, rows in tables.items():
        for row in rows:
            lines += ["", f"[[{name}]]", *_lines(row)]
    return "\n".join(lines) + "\n"


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_literal(value)}" for key, value in table.items()]


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], dict)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _quoted(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def difference(mine: RunConfig, theirs: RunConfig) -> list[str]:
    """The keys in which two configs ask for different results, as ``key: theirs -> mine`` lines."""
    a, b = flatten(theirs), flatten(mine)
    ignored = ("out", "execution.")
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in a if a[key] != b[key] and not key.startswith(ignored)]
