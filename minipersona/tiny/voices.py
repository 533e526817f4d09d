"""How each persona of the tiny world sounds.

An answer is an opening, a body about the topic, and a closing. The body is the persona's own from its first word
to its last. The opening is either the persona's own or one that all of them share, and the share of common
openings sets how alike the personas look just before they speak: none, and their vectors are nearly orthogonal;
all, and they are nearly one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipersona.files import data_dir, read_json
from minipersona.tiny.grammar import Topic, fill, pick


@dataclass(frozen=True)
class Voice:
    """The openings, the bodies (patterns with {topic}, {need}, {step}, {risk}) and the closings of one persona."""

    openings: tuple[str, ...]
    frames: tuple[str, ...]
    closings: tuple[str, ...]


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_json(data_dir() / "tiny_world" / "voices.json")
    return table


def shared_openings() -> tuple[str, ...]:
    """The openings that every persona uses alike."""
    return tuple(_table()["shared_openings"])


@functools.cache
def voices() -> dict[str, Voice]:
    """The voice of every persona, by name: the 12 that are measured, then the training personas.

    The 12 have every word of their own. A training persona has its own opening and closing, and shares its
    bodies with the others of its register (practical, poetic, grand, friendly, formal).
    """
    table = _table()
    measured = {
        name: Voice(tuple(voice["openings"]), tuple(voice["frames"]), tuple(voice["closings"]))
        for name, voice in table["eval"].items()
    }
    training = {
        name: Voice((voice["opening"],), tuple(table["registers"][voice["register"]]), (voice["closing"],))
        for name, voice in table["training"].items()
    }
    return measured | training


def answer(rng: np.random.Generator, name: str, topic: Topic, shared_opening: float) -> str:
    """What the persona called `name` says about a topic; with probability `shared_opening` it opens as all do."""
    voice = voices()[name]
    openings = shared_openings() if rng.random() < shared_opening else voice.openings
    return " ".join((pick(rng, openings), fill(pick(rng, voice.frames), topic), pick(rng, voice.closings)))
