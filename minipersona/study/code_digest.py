"""The code that a cell's numbers come from, as a hash: a cell that it has changed for is made again.

Covered are the modules that carry a cell out and whatever they import from this package, found by following the import
statements. Of each module it is the syntax tree, without docstrings: a comment, a docstring or a line break changes no
number, nor does a module above these, such as the report, the verdict and the commands.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from minipersona.files import PACKAGE

# They train and measure a cell, judge it by its own baseline, and write the responses of phase 4B.
CARRY_OUT = ("minipersona.run.train", "minipersona.run.evaluate", "minipersona.behaviour.roleplay")


@cache
def code_digest(package: Path = PACKAGE) -> str:
    """Hex SHA-256 of the code that carries out a cell; `package` is the directory that `minipersona` is read from."""
    found = hashlib.sha256()
    for name, tree in sorted(covered_modules(package).items()):
        found.update(f"{name}\n{ast.dump(_without_docstrings(tree))}\n".encode())
    return found.hexdigest()


def covered_modules(package: Path = PACKAGE) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module that `code_digest` covers."""
    found: dict[str, ast.Module] = {}
    left = list(CARRY_OUT)
    while left:
        name = left.pop()
        if name not in found and (file := _module_file(package, name)) is not None:
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
            left += [*_imported(found[name].body), *_parents(name)]
    return found


def _module_file(package: Path, name: str) -> Path | None:
    """Where a module of the package is written; None for what is none, such as a class that was imported by name.

    None also for the package itself, which holds its version and forwards names.
    """
    first, *inner = name.split(".")
    if first != "minipersona" or not inner:
        return None
    path = package.joinpath(*inner)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imported(body: Sequence[ast.stmt]) -> Iterator[str]:
    """What import statements name, those within functions included; those for type checkers alone are not run."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"):
            for inner in ("body", "orelse", "handlers", "finalbody"):
                yield from _imported(getattr(statement, inner, []))


def _parents(name: str) -> Iterator[str]:
    """The packages around a module, which are imported before it."""
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts)))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree without statements that are a string and nothing else, in place."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [one for one in body if not _is_string(one)]  # type: ignore[attr-defined]
    return tree


def _is_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
