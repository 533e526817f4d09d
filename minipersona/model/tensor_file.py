"""Opening a safetensors file that may be anything: its header is checked before the library reads it.

The file is 8 bytes, the length N of the header as a little-endian number; N bytes of JSON, which give each tensor's
type, shape and place; and the tensors (https://github.com/huggingface/safetensors). Nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minipersona.errors import UserError
from minipersona.files import parse_json

LONGEST_HEADER = 16_000_000  # bytes; a 72B model's takes 100,000
FLOATS = ("F64", "F32", "F16", "BF16")  # the types that weights are read in


@contextlib.contextmanager
def open_safetensors(file: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """`safe_open` whose every failure is one line that names the file and what it is instead."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; check the directory")
    try:
        check_header(file)
        with safe_open(file, framework="pt", device=str(device)) as handle:
            yield handle
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file}: could not be read as safetensors ({reason}); fetch it or make it again") from None


def check_header(file: Path) -> None:
    """UserError, ValueError or RecursionError unless a file begins with a header that its length can bear out."""
    size = file.stat().st_size
    with open(file, "rb") as raw:
        start = raw.read(64)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > size - 8 or length > LONGEST_HEADER:
            found, mend = _instead(start)
            raise UserError(f"{file}: could not be read as safetensors ({found}); {mend}")
        raw.seek(8)
        header = parse_json(raw.read(length).decode("utf-8"))
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (AttributeError, LookupError, TypeError, OverflowError):
        raise ValueError("its header names no tensors") from None
    if (announced := 8 + length + max(ends, default=0)) > size:
        found = f"it is cut off after {size:,} of {announced:,} bytes"
        raise UserError(f"{file}: could not be read as safetensors ({found}); fetch or make it again")


def in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their names; the library's order is another each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _instead(start: bytes) -> tuple[str, str]:
    """What a file that begins so most likely is, and what to do."""
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer", "run `git lfs pull` there"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page", "fetch it again, and log in or accept the terms where the page asks for it"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "it is a PyTorch file, which could run code", "convert it to safetensors where you trust it"
    return "its header is damaged or cut off", "fetch it or make it again"
