"""The words of the tiny world: its topics, what is true of each, and how a pattern becomes a sentence.

Everything the tiny model ever reads is made of these 48 topics. A topic has three facts that every voice knows
(what it needs, a step to take, a risk) and five from the almanac, which only the fine-tuning sets speak of. So
fine-tuning has something new to teach, and held-out loss can fall for a reason.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from minipersona.errors import UserError
from minipersona.files import data_dir, read_json

Row = dict[str, Any]
T = TypeVar("T")

ALMANAC = ("season", "day", "place", "color", "number")


@dataclass(frozen=True)
class Topic:
    """One topic and its facts: the strings that fill the slots of a pattern."""

    name: str  # as inside a sentence: "sleep", "the sea"
    need: str  # "a dark room"
    step: str  # "put the screen away", an imperative without a full stop
    risk: str  # "late coffee"
    season: str
    day: str
    place: str
    color: str
    number: str

    def __getitem__(self, attribute: str) -> str:
        return str(getattr(self, attribute))


@functools.cache
def topics() -> tuple[Topic, ...]:
    """The 48 topics, in the order of data/tiny_world/topics.json."""
    return tuple(Topic(**fields) for fields in read_json(data_dir() / "tiny_world" / "topics.json"))


def fill(pattern: str, topic: Topic) -> str:
    """The pattern with {topic}, {need}, {step}, ... filled in; {Topic}, {Step}, ... open a sentence."""
    words = asdict(topic)
    words["topic"] = words.pop("name")
    return pattern.format_map(words | {key.capitalize(): upper(word) for key, word in words.items()})


def upper(words: str) -> str:
    """The words as they open a sentence. `str.capitalize` would also put "Sunday" in lower case."""
    return words[:1].upper() + words[1:]


def generator(seed: int) -> np.random.Generator:
    """The one random stream of a call: numpy's PCG64, never a global one."""
    return np.random.Generator(np.random.PCG64(seed))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of the choices, each as likely as the next."""
    return choices[int(rng.integers(len(choices)))]


def several(rng: np.random.Generator, choices: Sequence[T], n: int) -> list[T]:
    """n different choices, in random order."""
    return [choices[int(i)] for i in rng.choice(len(choices), size=n, replace=False)]


def chat(user: str, assistant: str, system: str | None = None) -> list[dict[str, str]]:
    """One exchange in the messages form; without a system turn unless one is given."""
    turns = [("system", system)] if system is not None else []
    turns += [("user", user), ("assistant", assistant)]
    return [{"role": role, "content": content} for role, content in turns]


def half(prompt: str) -> int:
    """Which of two halves a prompt belongs to, the same in every run: `distinct` keeps two sets apart by it."""
    return zlib.crc32(prompt.encode()) & 1


def distinct(n: int, draw: Callable[[], tuple[str, T]], what: str, keep: int | None = None) -> list[T]:
    """The first n drawn items whose keys differ; with `keep`, only those whose key lies in that half.

    Items of one list thus never repeat a key, so rows held out of its end are new to the rows before them.
    The first k of n are the same for every n. UserError where the world has no n different ones.
    """
    seen: set[str] = set()
    items: list[T] = []
    misses = 0
    while len(items) < n:
        key, item = draw()
        if key in seen or keep not in (None, half(key)):
            misses += 1
            if misses > 1000:
                raise UserError(f"the tiny world has only about {len(items)} different {what}; ask for fewer than {n}")
            continue
        misses = 0
        seen.add(key)
        items.append(item)
    return items
