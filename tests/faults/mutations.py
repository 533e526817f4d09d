"""Ways to damage a valid file: blindly (bits, cuts, splices) and knowingly (values of its JSON, its header)."""

from __future__ import annotations

import json
import random
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 10**12, 10**400, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\x00",
    "../x", "/etc/passwd", "\ud800", "\u202e", "x" * 10_000, [], {}, [None], [[]], {"": None}, [0] * 1000,
]  # fmt: skip


def damaged(content: bytes, rng: random.Random, name: str) -> bytes:
    """One damaged version of a file, by its name's ending and a random choice."""
    knowing = {".json": damaged_json, ".jsonl": damaged_lines, ".safetensors": damaged_header}
    suffix = "." + name.rpartition(".")[2]
    if suffix in knowing and rng.random() < 0.6:
        return knowing[suffix](content, rng)
    return damaged_blindly(content, rng)


def damaged_blindly(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, splice, or put something else in its place."""
    some = bytearray(content)

    def place() -> int:
        # What says how to read the rest stands at the beginning or at the end.
        return rng.choice(
            [rng.randrange(len(some)), rng.randrange(min(len(some), 400)), -rng.randint(1, min(len(some), 400))]
        )

    match rng.randrange(7):
        case 0 | 1:
            for _ in range(rng.choice([1, 1, 2, 8, 64])):
                some[place()] ^= 1 << rng.randrange(8)
        case 2:
            del some[place() :]
        case 3:
            at = place() % len(some)
            some[at : at + rng.randrange(64)] = rng.randbytes(rng.randrange(64))
        case 4:
            at, source = place() % len(some), place() % len(some)
            some[at:at] = some[source : source + rng.choice([1, 8, 100, 5000])]
        case 5:
            some[place()] = rng.choice(b'\x00\xff"{}[],:\n\\')
        case 6:
            prefixes = [
                b"version https://git-lfs.github.com/spec/v1\n",
                b"<!DOCTYPE html>",
                b"PK\x03\x04",
                b"\xef\xbb\xbf",  # a byte order mark
                b"\x1f\x8b\x08\x00",  # gzip's
                b"",
            ]
            some[:0] = rng.choice(prefixes)
            del some[rng.choice([0, 50, len(some)]) :]
    return bytes(some)


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, delete, double or nest a value somewhere in a JSON text."""
    value = json.loads(content)
    text = json.dumps(changed(value, rng))
    if rng.random() < 0.1:
        text = text.replace("{", '{"r": 1, "r": 2, ', 1)
    if rng.random() < 0.05:
        text = text.replace(":", ": " + "[" * 5000, 1)
    return text.encode()


def changed(value: Any, rng: random.Random) -> Any:
    """`value` with something nasty in the place of one of its parts."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.15 else {**rest, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], *([] if rng.random() < 0.15 else [changed(value[at], rng)]), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice([-1, 1, 7])
    return rng.choice(NASTY)


def damaged_lines(content: bytes, rng: random.Random) -> bytes:
    """Damage one line of JSON lines."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(lines[at], rng)
    return b"\n".join(lines)


def damaged_header(content: bytes, rng: random.Random) -> bytes:
    """Change a safetensors header; its length is right again, most of the time."""
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(content[8 : 8 + length], rng)
    claimed = rng.choice([len(header)] * 8 + [0, 2**63])
    return claimed.to_bytes(8, "little") + header + content[8 + length :]
