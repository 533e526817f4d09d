"""A disk that is full while something is written: the old state stays, and one line says what is missing where."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from conftest import SIZES
from safetensors import SafetensorError
from torch import nn

from minipersona import hub
from minipersona.chat import load_tokenizer
from minipersona.config import LoraConfig
from minipersona.corpus import cache
from minipersona.corpus.token_cache import write_documents
from minipersona.errors import DiskFull, UserError
from minipersona.files import (
    append_jsonl,
    read_jsonl,
    rewrite_jsonl,
    write_atomically,
    write_directory_atomically,
    write_json,
    write_text,
)
from minipersona.geometry.vectors import PersonaVectors
from minipersona.locks import lock
from minipersona.model.adapter_files import save_adapter
from minipersona.model.lora import apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.save import save_model
from minipersona.run.steering import save_steering
from minipersona.training.checkpoint import Position, save_state
from minipersona.training.distributed import Distributed
from minipersona.training.optimizer import AdamW, Flat, Layout

ROOM = 3000  # bytes that a file may have


@contextlib.contextmanager
def no_room(room: int = ROOM) -> Iterator[None]:
    """Within this context no file can grow beyond `room`: the system says EFBIG to Python and to Rust alike."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def state(path: Path, value: float) -> None:
    weights = {"w": nn.Parameter(torch.full((4000,), value))}
    optimizer = AdamW(Flat(list(weights.values())), 0.9, 0.999, 1e-8, 0.0)
    save_state(path, Position(step=int(value)), weights, optimizer, Distributed(0, 1, torch.device("cpu")))


def shards(path: Path, value: float) -> None:
    """The part that one of two ranks writes, which nobody waits for here."""
    weights = {"w": nn.Parameter(torch.full((4000,), value))}
    whole = Flat(list(weights.values()))
    shards = SimpleNamespace(
        weights=whole.weights, exp_avg=whole.exp_avg, exp_avg_sq=whole.exp_avg_sq, saved_rows=whole.saved_rows
    )
    optimizer = AdamW(cast(Layout, shards), 0.9, 0.999, 1e-8, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distributed, "barrier", lambda self: None)
        patch.setattr(Distributed, "broadcast", lambda self, value: value)
        save_state(path, Position(step=int(value)), weights, optimizer, Distributed(0, 2, torch.device("cpu")))


def adapter(path: Path, value: float) -> None:
    config = LoraConfig(rank=8, alpha=value, targets=("down_proj",))
    save_adapter(apply_lora(Qwen2(SIZES), config), path)


def kept(path: Path, value: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(path))
        cache.store({"of": "x"}, "c" * 40, [{"text": f"{value} " * 3000}])


WRITERS: dict[str, Callable[[Path, float], object]] = {
    "text": lambda path, value: write_text(path, f"{value} " * 3000),
    "json": lambda path, value: write_json(path, [value] * 3000),
    "log": lambda path, value: rewrite_jsonl(path, [{"value": value}] * 3000),
    "vectors": lambda path, value: PersonaVectors({1: torch.full((3, 9, 99), value)}, ["a", "b", "c"]).save(path),
    "documents": lambda path, value: write_documents(
        path, [load_tokenizer("tiny").encode_text(f"{value} " * 3000, 9999)]
    ),
    "model": lambda path, value: save_model(Qwen2(SIZES), path, stop_tokens=[int(value)]),
    "adapter": adapter,
    "state": state,
    "shards": shards,
    "steering": lambda path, value: save_steering(path, {6: torch.full((4000,), value)}),
    "rows": kept,
}


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file): file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_and_the_old_state_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    WRITERS[kind](path, 1.0)
    old = content(tmp_path)
    with no_room(), pytest.raises(DiskFull) as caught:
        WRITERS[kind](path, 2.0)
    line = str(caught.value)
    assert line.startswith(f"cannot write {path}") and "\n" not in line and ".tmp" not in line
    assert re.search(r"File too large; ([\d,]+ (bytes|MiB) are needed and )?[\d,]+ MiB are free there; free some", line)
    assert ("needed" in line) == (kind != "rows")  # those are not known beforehand
    assert content(tmp_path) == old
    assert not [p for p in tmp_path.rglob(".*") if p.name not in (".lock",)]
    WRITERS[kind](path, 2.0)  # the same command, once there is room
    assert content(tmp_path) != old


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_jsonl(path, {"a": 1})
    old = path.read_bytes()
    with no_room(), pytest.raises(UserError, match=r"log: File too large; 4,010 bytes are needed and .* free there"):
        append_jsonl(path, {"a": "x" * 4000})
    assert path.read_bytes() == old  # not even the part for which there was room
    append_jsonl(path, {"a": 2})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_a_download_that_finds_no_room_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught, hub.explained("me/model"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "blob"))
    line = str(caught.value)
    assert line.startswith("me/model: [Errno 28] No space left on device") and str(tmp_path / "blob") in line
    assert re.search(r"; [\d,]+ MiB are free there; free some in .*, or set HF_HOME", line)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_to_say_full(tmp_path: Path, code: int) -> None:
    for error in (OSError(code, os.strerror(code)), SafetensorError(f"Error: I/O error: no (os error {code})")):
        for write in (write_atomically, write_directory_atomically):
            with pytest.raises(UserError) as caught, write(tmp_path / "f", needs=5 * 2**20):
                raise error
            assert f"f: {os.strerror(code)}; 5 MiB are needed and" in str(caught.value)
            assert list(tmp_path.iterdir()) == []


def test_a_lock_that_finds_no_room_is_one_line_and_free_again(tmp_path: Path) -> None:
    held = lock(tmp_path / "run")
    with no_room(5), pytest.raises(DiskFull, match=r"cannot write .*run/.lock: File too large; .* are free"), held:
        pytest.fail("held")
    with lock(tmp_path / "run"):
        pass


def test_a_directory_that_may_not_be_written_has_another_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="permissions or choose another"):
        write_text(tmp_path / "file" / "inside", "x")
    with pytest.raises(UserError, match="Permission denied; check its permissions"), write_atomically(tmp_path / "f"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_control_what_is_no_fault_of_the_disk_passes(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="another fault"), write_atomically(tmp_path / "f"):
        raise SafetensorError("another fault")
    with no_room():
        write_text(tmp_path / "f", "x" * (ROOM - 1))
    assert (tmp_path / "f").stat().st_size == ROOM - 1
