"""Rows of a text file: JSON lines and one list hold the same values, read as far as they are asked for."""

from __future__ import annotations

import gzip
import io
import json

import pytest

from minipersona.errors import UserError
from minipersona.text_rows import read_values


def values(content: bytes) -> list[object]:
    return [value for _, value in read_values(io.BufferedReader(io.BytesIO(content)), "f")]


def test_lines_and_lists_hold_the_same_values() -> None:
    wanted = [{"a": 1}, [2], "é", None, 3.5]
    lines = "\n\n".join(json.dumps(value) for value in wanted[:1] + wanted[2:]).encode()
    assert values(lines) == wanted[:1] + wanted[2:]
    for indent in (None, 1):
        for mark in (b"", b"\xef\xbb\xbf", b" \n"):
            assert values(mark + json.dumps(wanted, indent=indent, ensure_ascii=False).encode() + b"\n") == wanted
    assert values(b"") == values(b"[]") == values(b"\n\n") == []


def test_a_list_is_read_as_far_as_it_is_asked_for() -> None:
    stream = io.BytesIO(json.dumps([{"n": n, "text": "é" * 1000} for n in range(5000)]).encode())
    items = read_values(io.BufferedReader(stream), "f")
    assert [next(items)[1]["n"] for _ in range(3)] == [0, 1, 2]
    assert stream.tell() < 3_000_000 < len(stream.getvalue())
    where, last = list(items)[-1]
    assert (where, last["n"]) == ("f: item 4999", 4999)


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"a": 1}\n{', "f: line 2 is not valid JSON"),
        (b"[1, 2", "f: item 1 is not valid JSON"),
        (b"[1 2]", "f: item 0 is not valid JSON .*comma"),
        (b"[1, x]", "f: item 1 is not valid JSON"),
        (b"[1, \xff]", "f.* is not valid UTF-8"),
        (b"[1] [2]", "f: text follows the end of the list"),
        (b"[" * 100_000, "f: item 0 is not valid JSON"),
        (b'["' + b"a" * 17_500_000, "f: item 0 is not valid JSON"),
        (gzip.compress(b"[1]", mtime=0), "f: is gzip-compressed; decompress it"),
    ],
)
def test_what_is_not_json_is_named_by_its_place(content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        values(content)
    assert "\n" not in str(error.value)
