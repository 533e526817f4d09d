"""The rows of a text file, which may be gigabytes: lines, JSON lines, or the items of one JSON list, one at a time."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from minipersona.errors import UserError, require
from minipersona.files import check_uncompressed, each_key_once, parse_json

LONGEST_LINE = 16_000_000  # bytes of one row; a longer line is not a conversation, and must not fill the memory


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """The lines of an open text file that are not blank, each with its number from 1. UserErrors name the line."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if number == 1:
            check_uncompressed(line, name)
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{name}: line {number} is longer than {LONGEST_LINE:,} bytes; write one JSON object a line"
            )
        if line.strip():
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{name}: line {number} is not valid UTF-8; convert the file to it") from None
            yield number, text


def read_values(file: io.BufferedReader, name: str) -> Iterator[tuple[str, Any]]:
    """The values of an open file of JSON lines, or the items of one JSON list, each with where it stands.

    The file is read as far as values are asked for. UserErrors name the line, or the item (counted from 0).
    """
    if file.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _list_items(file, name)
        return
    for number, line in read_lines(file, name):
        where = f"{name}: line {number}"
        try:
            value = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON ({error}); correct or delete the line") from None
        yield where, value


def _list_items(file: io.BufferedReader, name: str) -> Iterator[tuple[str, Any]]:
    """The items of a file that is one JSON list, which may be gigabytes: a part of its text is in memory at a time."""
    decoder = json.JSONDecoder(object_pairs_hook=each_key_once)
    chunks = codecs.iterdecode(iter(lambda: file.read(1 << 20), b""), "utf-8-sig")
    where, index, text, at = name, 0, "", 0  # `at` is where in `text` the next item begins
    try:
        text = next(chunks).lstrip()[1:]  # without the bracket
        while True:
            where = f"{name}: item {index}"
            try:
                found = _item(decoder, text, at)
            except ValueError as error:  # perhaps only because the text ends within the item
                chunk = next(chunks, "")
                problem = getattr(error, "msg", error)
                if not chunk or len(text) - at > LONGEST_LINE:
                    raise UserError(f"{where} is not valid JSON ({problem}); correct or delete it") from None
                text, at = text[at:] + chunk, 0
                continue
            if found is None:
                break
            value, at = found
            yield where, value
            index += 1
        rest = text[at:].lstrip()[1:] + "".join(chunks)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not valid UTF-8; convert the file to it") from None
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON ({error}); correct or delete it") from None
    require(not rest.strip(), f"{name}: text follows the end of the list; write one list, or one row a line")


_SPACE = re.compile(r"[ \t\r\n]*")


def _item(decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int] | None:
    """The item that begins at `at`, and where the next one would begin; None at the end of the list.

    ValueError where what is there is not JSON, or ends within the item.
    """
    start = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if text.startswith("]", start):
        return None
    value, end = decoder.raw_decode(text, start)
    end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    if text.startswith(",", end):
        return value, end + 1
    if text.startswith("]", end):
        return value, end
    raise ValueError("no comma follows it")
