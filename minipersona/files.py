"""Files that are whole or absent: atomic writes, digests, JSON lines, locks, and where the shipped data lies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minipersona.errors import UserError

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


# ---------------------------------------------------------------- atomic writes


def _umask_mode(base: int) -> int:
    mask = os.umask(0)
    os.umask(mask)
    return base & ~mask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, path: Path) -> UserError:
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(parent).free
        mend = f"{free / 2**20:,.0f} MiB are free there; free some space or choose another --out"
    else:
        mend = "check its permissions or choose another --out"
    return UserError(f"cannot write {path}: {error.strerror or error}; {mend}")


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, durably, with the umask's mode.

    A kill at any moment leaves either the old file or the new one. An OSError (disk full, no permission)
    leaves the old one and becomes a UserError.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        # The writer may have replaced the file (safetensors does, with mode 0600), so mode and fsync come last.
        os.chmod(temporary, _umask_mode(0o666))
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_directory_atomically(path: str | Path) -> Iterator[Path]:
    """The same for a directory: files are written into a temporary one, which then takes the name of `path`."""
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        yield temporary
        for file in temporary.iterdir():
            os.chmod(file, _umask_mode(0o666))
            _fsync(file)
        os.chmod(temporary, _umask_mode(0o777))
        if path.exists():  # a checkpoint that is written again after a resume; a kill between the two is a redo
            shutil.rmtree(path)
        os.rename(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Replace a JSON file atomically; not-a-number is refused, since no other reader takes it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sweep_temporaries(*directories: Path) -> None:
    """Remove what a killed writer of ours left in them. Call it only while holding the lock on them."""
    for directory in directories:
        for leftover in directory.glob(".*.????????.tmp"):  # as tempfile names them
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


# ---------------------------------------------------------------- reading


def read_json(path: str | Path) -> Any:
    """A JSON file's value; anything wrong with the file is a UserError that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a readable JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file or make it again") from None


def sha256(*paths: str | Path) -> str:
    """Hex SHA-256 of the concatenated contents."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()


# ---------------------------------------------------------------- JSON lines that outlive a kill


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one line in a single write; a torn line that a kill left at the end is dropped first."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            _drop_torn_line(file)
            file.write(line.encode("utf-8"))
    except OSError as error:
        raise _explain(error, path) from error


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut a file that does not end with a line end back to its last one."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read_jsonl(path: str | Path, torn: bool = True) -> list[dict[str, Any]]:
    """The rows of a log of ours; a torn last line (a kill in mid-write) is left out. Missing file: no rows.

    With `torn` false, for a file that a user wrote, that line is an error like any other.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            if torn and number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON; delete that line or the file") from None
    return rows


def rewrite_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Replace a log atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


# ---------------------------------------------------------------- one writer a directory

_STARTED = time.time()
STALE_SECONDS = 24 * 3600  # for locks of other hosts, whose processes cannot be looked up


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold `directory/.lock`; a second holder is refused with the first one's host and pid.

    A lock whose process is gone (same host) or that is older than a day (another host) is stale and is taken over.
    """
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(error, directory) from error
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except PermissionError as error:
            raise _explain(error, path) from error
        except FileExistsError:
            if not _stale(path):
                holder = _holder(path)
                raise UserError(
                    f"{directory} is in use by pid {holder['pid']} on {holder['host']}; "
                    f"wait for it, or delete {path} if that process is gone"
                ) from None
            path.unlink(missing_ok=True)
    with os.fdopen(descriptor, "w") as file:
        json.dump(mine, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()  # where nothing came of it; a directory with files stays


def _holder(path: Path) -> dict[str, Any]:
    try:
        return {"pid": "?", "host": "?", **json.loads(path.read_text())}
    except (OSError, ValueError, TypeError):  # it is being written this moment
        return {"pid": "?", "host": "?"}


def _stale(path: Path) -> bool:
    try:
        holder = json.loads(path.read_text())
        if holder["host"] == socket.gethostname() and holder["pid"] == os.getpid() and holder["time"] < _STARTED:
            return True  # our pid, before we began: the holder died, in a container perhaps, and its pid came round
        if holder["host"] != socket.gethostname():
            return bool(time.time() - holder["time"] > STALE_SECONDS)
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    except (OSError, ValueError, KeyError, TypeError):  # killed between creating the file and filling it
        return path.exists() and time.time() - path.stat().st_mtime > 5
    return False
