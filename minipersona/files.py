"""Files that are whole or absent: atomic writes, digests, JSON, logs of JSON lines, and where the shipped data lies."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minipersona.errors import DiskFull, UserError, require

PACKAGE = Path(__file__).parent


def data_dir() -> Path:
    """The folder of shipped data: inside the package once installed, beside it in a checkout."""
    return _shipped("data")


def configs_dir() -> Path:
    """The folder of shipped run configs, found in the same two places."""
    return _shipped("configs")


def _shipped(name: str) -> Path:
    installed = PACKAGE / "shipped" / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def user_path(text: str | Path) -> Path:
    """The path that a user wrote, ``~`` and ``~name`` as home directories. UserError where there is no such home."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # no such user, or no user's name at all
        raise UserError(f"{text}: the home directory that ~ stands for is not known; write the whole path") from None


# ---------------------------------------------------------------- atomic writes


@contextlib.contextmanager
def write_atomically(path: str | Path, needs: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, durably, with the umask's mode.

    A kill at any moment leaves either the old file or the new one. A disk that is full or cannot be written leaves
    the old one and becomes a UserError, also where safetensors reports it; it names the bytes that are free, and
    those that `needs` says will be written.
    """
    path = Path(path)
    with explained(path, needs):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            # The writer may have replaced the file (safetensors does, with mode 0600), so mode and sync come last.
            os.chmod(temporary, umask_mode(0o666))
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """UserError where a file could not be written there: before the work whose result it is to hold, not after."""
    path = Path(path)
    with explained(path, None):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"):
            pass


@contextlib.contextmanager
def write_directory_atomically(path: str | Path, needs: int | None = None) -> Iterator[Path]:
    """The same for a directory: files are written into a temporary one, which then takes the name of `path`.

    No one call replaces a directory, so the old one is moved aside first. What a kill between the two moves leaves
    aside is put back by the next write, or by `sweep_temporaries`.
    """
    path = Path(path)
    with explained(path, needs):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.????????.old"):
            _put_back(left, path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        aside = temporary.with_suffix(".old")
        try:
            yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    os.chmod(Path(folder, name), umask_mode(0o666))
                    _sync(Path(folder, name))
                os.chmod(folder, umask_mode(0o777))
                _sync(Path(folder))
            if os.path.lexists(path):
                os.rename(path, aside)
            os.rename(temporary, path)
            _sync(path.parent)
        finally:
            _put_back(aside, path)
            _remove(temporary)


def _put_back(aside: Path, path: Path) -> None:
    """Undo a replacement that was not finished; clear up after one that was."""
    if os.path.lexists(path):
        _remove(aside)
    elif os.path.lexists(aside):
        os.rename(aside, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def umask_mode(base: int) -> int:
    """The mode that a new file gets which asks for `base`."""
    mask = os.umask(0)
    os.umask(mask)
    return base & ~mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no such thing for a directory
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file atomically."""
    content = text.encode("utf-8")
    with write_atomically(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """Replace a JSON file atomically; not-a-number is refused, since no other reader takes it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sweep_temporaries(*directories: Path, older_than: float = 0.0) -> None:
    """Clear up after killed writers of ours: remove what they began, put back what they only moved aside.

    Call it while holding the lock on the directories, or with an age in seconds that no writer at work reaches.
    """
    latest = time.time() - older_than
    for directory in directories:
        for left in directory.glob(".*.????????.*"):  # as tempfile names them
            if left.suffix in (".tmp", ".old") and left.lstat().st_mtime <= latest:
                if left.suffix == ".old":
                    _put_back(left, directory / left.name[1 : -len(".12345678.old")])
                else:
                    _remove(left)


@contextlib.contextmanager
def explained(path: Path, needs: int | None = None) -> Iterator[None]:
    """What the system says against writing `path`, as a UserError, DiskFull where that is it.

    Counts free bytes after the temporary is gone.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        if isinstance(error, SafetensorError):  # it passes the system's errors on as text
            if (told := re.search(r"\(os error (\d+)\)", reason)) is None:
                raise
            code, reason = int(told[1]), os.strerror(int(told[1]))
        # Inside a directory that is being written, its final name says more than the temporary one.
        shown = re.sub(r"(?:^|(?<=/))\.([^/]+)\.\w{8}\.tmp(?=/)", r"\1", str(path))
        problem = f"cannot write {shown}: {reason}"
        if code in FULL:
            raise DiskFull(f"{problem}; {room(path, needs)}; free some space or choose another --out") from error
        raise UserError(f"{problem}; check its permissions or choose another --out") from error


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # how a system says that there is no room


def room(path: Path, needs: int | None = None) -> str:
    """The bytes that are needed, if that is known, and those that are free where `path` lies, in words."""
    parent = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    wanted = "" if needs is None else f"{_mebibytes(needs)} are needed and "
    return f"{wanted}{_mebibytes(shutil.disk_usage(parent).free)} are free there"


def _mebibytes(count: int) -> str:
    return f"{count:,} bytes" if count < 2**20 else f"{count / 2**20:,.0f} MiB"


# ---------------------------------------------------------------- reading

LARGEST_JSON = 64_000_000  # bytes; a file of settings or prompts that is longer is another file


def read_json(path: str | Path) -> Any:
    """A JSON file's value; anything wrong with the file is a UserError that names it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise UserError(f"{path}: is longer than {LARGEST_JSON:,} bytes; check that it is the right file")
        check_uncompressed(content, str(path))
        return parse_json(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file or make it again") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text. ValueError also where an object has a key twice; RecursionError."""
    return json.loads(text, object_pairs_hook=each_key_once)


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of JSON's decoder that refuses a key which an object has twice. ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} is there twice")
    return found


def sha256(*paths: str | Path) -> str:
    """Hex SHA-256 of the concatenated contents."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sampled_sha256(path: str | Path, pieces: int = 64, size: int = 1 << 16) -> str:
    """Hex SHA-256 of a file's length and of some pieces of it, all of a small file.

    It tells files of weights apart without reading 15 GB: training changes nearly all of them.
    """
    length = os.path.getsize(path)
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for start in sorted({max(0, length - size) * piece // (pieces - 1) for piece in range(pieces)}):
            file.seek(start)
            digest.update(file.read(size))
    return digest.hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()


def check_uncompressed(content: bytes, name: str) -> None:
    """UserError where a file's first bytes are gzip's."""
    require(not content.startswith(b"\x1f\x8b"), f"{name}: is gzip-compressed; decompress it (gunzip)")


# ---------------------------------------------------------------- JSON lines that outlive a kill


def append_jsonl(path: str | Path, row: dict[str, Any], ascii: bool = False, durable: bool = True) -> None:
    """Append one line. What a kill or a full disk left of a line at the end is dropped.

    ascii    escape all else: for text that a model wrote, which may hold line separators or half a surrogate pair
    durable  wait until the disk has it. Without, a kill loses nothing either, only a machine that goes down does
    """
    line = (json.dumps(row, ensure_ascii=ascii, allow_nan=False) + "\n").encode("utf-8")
    path = Path(path)
    with explained(path, len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:  # a buffer would write again what failed once
            end = _whole_lines(file)
            file.truncate(end)
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        if end == 0 and durable:
            _sync(path.parent)


def _whole_lines(file: io.FileIO) -> int:
    """How many bytes of a file are lines that were written to their end."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            return file.read().rfind(b"\n") + 1
    return size


def read_jsonl(path: str | Path, torn: bool = True, mend: str = "mend or delete that line") -> list[dict[str, Any]]:
    """The rows of a log of ours; a torn last line (a kill in mid-write) is left out. Missing file: no rows.

    With `torn` false, for a file that a user wrote, that line is a line like any other, and the file may not be
    longer than `LARGEST_JSON`.
    """
    path = Path(path)
    rows = []
    try:
        with open(path, "rb") as file:
            content = file.read(-1 if torn else LARGEST_JSON + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable JSONL file") from None
    if len(content) > LARGEST_JSON and not torn:
        raise UserError(f"{path}: is longer than {LARGEST_JSON:,} bytes; check that it is the right file")
    if not torn:
        check_uncompressed(content, str(path))
    lines = content.split(b"\n")
    # A line without its end is torn even where it is whole JSON: the next append drops it, so it does not count yet.
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            try:
                rows.append(parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); {mend}") from None
    return rows


def read_objects(path: str | Path) -> list[dict[str, Any]]:
    """`read_jsonl` of a log of which every line is a JSON object; UserError where one is not."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        require(isinstance(row, dict), f"{path}: line {number} is not a JSON object; delete that line")
    return rows


def rewrite_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Replace a log atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
