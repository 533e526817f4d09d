"""Questions about documented objects, answered by their docstrings: real text that needs no network.

The rows of `pydoc:numpy,torch.nn` are about the public functions, classes and methods of these two modules: those of a
module's ``__all__``, or without one those that its own package defines. Submodules count where they are named. A
module is imported as any program would import it, and nothing else is.

The answer is the prose that the docstring begins with. The rows are in the order of the SHA-256 of the objects' names,
so that any range is a sample of all.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

from minipersona.errors import UserError

SHORTEST, LONGEST = 40, 600  # characters of an answer: more than a reference elsewhere, and cheap to train on

QUESTIONS = {
    "function": (
        "What does {} do?",
        "Explain the function {}.",
        "What is {} for?",
        "I found {} in a Python program. What does it do?",
        "Tell me briefly what {} does.",
    ),
    "class": (
        "What is {}?",
        "Explain the class {}.",
        "What is the class {} for?",
        "I found {} in a Python program. What is it?",
        "Tell me briefly what {} is.",
    ),
    "method": (
        "What does {} do?",
        "Explain the method {}.",
        "What is the method {} for?",
        "I found a call of {} in a Python program. What does it do?",
        "Tell me briefly what the method {} does.",
    ),
}


def module_names(text: str) -> list[str]:
    """``"numpy,torch.nn"`` -> ["numpy", "torch.nn"]."""
    names = text.split(",")
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise UserError(f"source pydoc:{text}: {name!r} is not a module's name; write pydoc:numpy,torch.nn")
    return names


def versions(names: Sequence[str]) -> str:
    """What tells these modules' docstrings from others': the version of Python and of each module's distribution."""
    found = {"Python": platform.python_version()}
    for name in names:
        package = name.partition(".")[0]
        if package not in sys.stdlib_module_names:
            found[package] = _version(package)
    return ", ".join(f"{package} {version}" for package, version in found.items())


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    distributions = metadata.packages_distributions().get(package)  # slow, and needed where the two names differ
    if not distributions:
        raise UserError(f"source pydoc:{package}: {package} is not installed; pip install it")
    return metadata.version(distributions[0])


def read_docstrings(names: Sequence[str]) -> list[dict[str, Any]]:
    """A conversation of two turns an object; of objects with the same answer only the one with the shortest name.

    UserError where a module cannot be imported.
    """
    objects: dict[str, tuple[str, str, str]] = {}  # name -> package, kind and docstring
    with warnings.catch_warnings():  # of modules and attributes that are deprecated
        warnings.simplefilter("ignore")
        for module in names:
            package = module.partition(".")[0]
            objects |= {name: (package, kind, text) for name, kind, text in _documented(module)}
    answered: dict[str, str] = {}  # answer -> name
    for name in sorted(objects, key=lambda name: (len(name), name)):
        if len(answer := first_prose(objects[name][2])) >= SHORTEST:
            answered.setdefault(answer, name)
    rows = {_rank(name): _row(name, *objects[name][:2], answer) for answer, name in answered.items()}
    return [row for _, row in sorted(rows.items())]


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _row(name: str, package: str, kind: str, answer: str) -> dict[str, Any]:
    forms = QUESTIONS[kind]
    question = forms[int(_rank(name)[-8:], 16) % len(forms)].format(name)  # not by the digits that order the rows
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "source": package}  # fmt: skip


# ---------------------------------------------------------------- objects


def _documented(module_name: str) -> Iterator[tuple[str, str, str]]:
    """Name, kind and docstring of each public function, class and method of a module."""
    module = _import(module_name)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name in _public(module):
        thing = vars(module).get(name)  # not getattr, for which some modules import others
        if inspect.isclass(thing):
            members = [(key, value) for key, value in vars(thing).items() if not key.startswith("_")]
            methods = [(f"{name}.{key}", "method", value) for key, value in members if inspect.isroutine(value)]
            found: list[tuple[str, str, Any]] = [(name, "class", thing), *methods]
        elif callable(thing):
            found = [(name, "function", thing)]
        else:
            continue
        for path, kind, documented in found:
            docstring = getattr(documented, "__doc__", None)
            if isinstance(docstring, str):
                yield prefix + path, kind, docstring


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a module does when it is imported
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"source pydoc:{name}: cannot be imported ({reason}); check the name, or install it") from None


def _public(module: ModuleType) -> list[str]:
    stated = vars(module).get("__all__")
    if isinstance(stated, (list, tuple)):
        return [name for name in stated if isinstance(name, str) and not name.startswith("_")]
    package = module.__name__.partition(".")[0]
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and str(getattr(thing, "__module__", package)).partition(".")[0] == package
    ]


# ---------------------------------------------------------------- docstrings

_SIGNATURE = re.compile(r"[\w.]+\s?\(")
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?|Warnings?|Shape|Inputs?):?$")
_UNDERLINE = re.compile(r"[-=~^]{3,}$")
_NOT_PROSE = re.compile(r">>>|\.\. |[-*+|:#•] ?|\d+[.)] |\s")  # examples, directives, lists, tables, indentation
_REFERENCE = re.compile(r"(See|Refer to)\b")  # to another docstring
_MARKUP = (
    (re.compile(r":[\w:+-]+:`[~!]?\.?([^`<]+?)(\s*<[^`>]*>)?`"), r"\1"),  # :func:`~torch.abs` -> torch.abs
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),  # `a paper <address>`_ -> a paper
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"`([^`]+)`_+"), r"\1"),
)


def first_prose(docstring: str) -> str:
    """The prose that a docstring begins with, signatures aside, as plain text of at most `LONGEST` characters.

    Empty where there is none that can be understood without what follows it.
    """
    chosen: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = paragraph.splitlines() or [""]
        if not chosen and _SIGNATURE.match(paragraph) and not lines[0].endswith("."):
            continue
        if _SECTION.match(lines[0]) or _REFERENCE.match(lines[0]):
            break
        if any(_NOT_PROSE.match(line) or _UNDERLINE.match(line) for line in lines):
            break
        text = " ".join(" ".join(lines).split())
        for pattern, plain in _MARKUP:
            text = pattern.sub(plain, text)
        if not text.endswith((".", "!", "?", ".)")) or "\\" in text or ":`" in text:
            break  # it introduces something that is not prose, or is a formula
        if len("\n\n".join([*chosen, text])) > LONGEST:
            break
        chosen.append(text)
    return "\n\n".join(chosen)
