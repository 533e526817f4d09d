"""From names to local files: a model that is embedded, on disk or on the Hugging Face Hub, and single pinned files.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub, which reads them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from minipersona.errors import Unreachable, UserError, redact
from minipersona.files import FULL, data_dir, room, sha256, sweep_temporaries, user_path, write_atomically

# A name without a revision means this one, so that two runs a year apart load the same weights.
PINNED = {
    "Qwen/Qwen2.5-7B-Instruct": "a09a35458c702b33eeacc393d103063234e8bc28",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
}

HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"

Result = TypeVar("Result")


def pinned_revision(name: str, revision: str | None = None) -> str | None:
    """The revision that is asked for: the caller's, else the pinned one, else the hub's newest (None)."""
    return revision or PINNED.get(name)


def locate(name_or_path: str, files: Sequence[str], *, revision: str | None = None) -> Path:
    """A local directory that holds those of `files` which exist there.

    `name_or_path` is a directory, `tiny` (the embedded model) or a hub id such as ``Qwen/Qwen2.5-7B-Instruct``, of
    which only `files` are downloaded into the Hub's cache. UserError where the name leads nowhere.
    """
    if name_or_path == "tiny":
        return data_dir() / "tiny"
    path = user_path(name_or_path)
    if os.path.isdir(path):  # pathlib would raise an OSError where the name is too long
        return path
    if os.path.exists(path):
        raise UserError(f"{name_or_path}: is a file; name the directory that holds it, with safetensors weights")
    if not re.fullmatch(HUB_ID, name_or_path):
        raise UserError(
            f"{redact(name_or_path)}: no such directory; give a directory, a hub id such as "
            "Qwen/Qwen2.5-7B-Instruct, or tiny"
        )
    return _download(name_or_path, files, pinned_revision(name_or_path, revision))


def resolved_revision(directory: Path) -> str | None:
    """The commit that a directory of the Hub's cache holds (``snapshots/<commit>``), or None elsewhere."""
    return directory.name if directory.parent.name == "snapshots" else None


def _download(repository: str, files: Sequence[str], revision: str | None) -> Path:
    # Imported here: the embedded model and local directories must not pay for the network client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = repository if revision is None else f"{repository} at {revision}"
    why = hub_unreachable()

    def snapshot() -> str:
        return snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(files),
            local_files_only=why is not None,
        )

    with explained(name):
        try:
            return Path(patiently(snapshot))
        except LocalEntryNotFoundError:
            if why is None:
                raise
            raise Unreachable(f"{name}: not in the local cache, and {why}") from None


def cache_dir(kind: str) -> Path:
    """Where files of ours that came over the network are kept: beside the Hub's own cache, under HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "minipersona" / kind


def make_cache_dir(kind: str) -> None:
    """See that there is one, and clear up after writers that were killed; UserError where it cannot be made."""
    try:
        cache_dir(kind).mkdir(parents=True, exist_ok=True)
        sweep_temporaries(cache_dir(kind), older_than=24 * 3600)  # others may be writing there
    except OSError as error:
        raise UserError(
            f"cannot make {cache_dir(kind)}: {error.strerror}; set HF_HOME to a directory that can be written"
        ) from None


# ---------------------------------------------------------------- whether there is a server

ANSWER_SECONDS = 3.0  # for any answer at all; the client alone tries for 25


def hub_unreachable() -> str | None:
    """`unreachable` of the Hub."""
    from huggingface_hub import constants

    return unreachable(constants.ENDPOINT, "HF_ENDPOINT")


def unreachable(base: str, variable: str) -> str | None:
    """Why the server at `base` cannot be asked, and the mend; None if it answers, be it with a refusal.

    `variable` is the name of the environment variable that says where the server is.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it to fetch this once"
    if reason := _no_answer(base):
        return f"{redact(base)} cannot be reached ({reason}); check the network, the proxy and {variable}"
    return None


@cache
def _no_answer(base: str) -> str | None:
    """Why a server gives no answer, or None if it does. Asked once a process."""
    from huggingface_hub import get_session

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_without_secrets)  # it logs the addresses that it asks again
    answers: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(base, timeout=ANSWER_SECONDS, follow_redirects=False)
            answers.append(None)
        except Exception as error:  # also where the client cannot be made: a SOCKS proxy needs another package
            answers.append(reason_of(error))

    # In a thread, because the client's timeout covers neither the look-up of a name nor all addresses of a server.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else f"no answer within {ANSWER_SECONDS:.0f} seconds"


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


# ---------------------------------------------------------------- what goes wrong on the way

PATIENCE = 120.0  # seconds in all that a busy server is waited for
BUSY = (429, 500, 502, 503, 504)


def patiently(call: Callable[[], Result]) -> Result:
    """What `call` returns; it is called again while the server says that it is busy, as late as the server asks."""
    deadline, pause = time.monotonic() + PATIENCE, 0.5
    while True:
        try:
            return call()
        except Exception as error:
            asked = _asked_to_wait(error)
            if asked is None or time.monotonic() + max(asked, pause) > deadline:
                raise
            time.sleep(max(asked, pause))
            pause *= 2


def _asked_to_wait(error: BaseException) -> float | None:
    """The seconds that a busy server asks for (0 where it names none); None where waiting is no help."""
    from huggingface_hub.utils import parse_ratelimit_headers

    response = getattr(_root(error), "response", None)
    if response is None or response.status_code not in BUSY:
        return None
    if (seconds := response.headers.get("Retry-After", "")).isdigit():
        return float(seconds)
    limit = parse_ratelimit_headers(response.headers)
    return 0.0 if limit is None else float(limit.reset_in_seconds)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Whatever fails between here and the Hub becomes one line that begins with `name` and says what to mend."""
    try:
        yield
    except Exception as error:
        explanation = _explanation(_root(error))
        if explanation is None:
            raise
        raise UserError(f"{name}: {explanation}") from None


def _root(error: BaseException) -> BaseException:
    """The Hub's own answer, where the client has wrapped it in an error of its own."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error


def _explanation(error: BaseException) -> str | None:
    """A line on an error of the network, the Hub or its client; None for an error that is none of theirs."""
    from huggingface_hub import constants, errors

    reason, status = reason_of(error), getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"gated ({reason}); accept its terms on the Hub and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision ({reason}); check the name and the revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"not on the Hub, or private ({reason}); check the name, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):  # the network went after the Hub had answered
        return "not in the local cache, and the Hub cannot be reached; check the network and HF_ENDPOINT"
    if isinstance(error, (FileNotFoundError, errors.EntryNotFoundError)):
        return f"no such file on the Hub ({reason}); check the path and the revision"
    if getattr(error, "errno", None) in (*FULL, errno.EACCES, errno.EROFS):
        return (
            f"{reason}; {room(cache_dir('any'))}; free some in {constants.HF_HOME}, or set HF_HOME to another directory"
        )
    if status in (401, 403):
        return f"the Hub refuses ({reason}); check HF_TOKEN and what it permits"
    if status in BUSY:
        return f"the Hub is busy ({reason}); try again later"
    if of_the_network(error):
        return f"{reason}; check the network and HF_ENDPOINT, then try again"
    return None


def of_the_network(error: BaseException) -> bool:
    """Whether an error comes from the network or its client, whose own errors are not all of them OSErrors."""
    client = type(error).__module__.startswith(("huggingface_hub", "httpx", "httpcore"))
    return client or isinstance(error, (OSError, ValueError))


def reason_of(error: BaseException) -> str:
    """The reason that the server gave, else the error's own, in one line without a secret in it."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return redact(line)[:300].rstrip(".")


# ---------------------------------------------------------------- single files, pinned to the bit

RAW_BASE = "https://raw.githubusercontent.com"
RAW_SECONDS = 30.0  # without a byte before an attempt is given up


@dataclass(frozen=True)
class PinnedFile:
    """A file of a public GitHub repository, at a commit, with the SHA-256 that it must have."""

    repository: str
    commit: str
    path: str
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.path} at {self.commit[:12]}"


def fetch_pinned(file: PinnedFile) -> Path:
    """A local copy of a pinned file: fetched once, kept under HF_HOME, and verified each time.

    The address is BASE/OWNER/REPO/COMMIT/PATH; MINIPERSONA_RAW_BASE names another BASE than GitHub's, such as a
    mirror. UserError where it cannot be had, or is not, to the bit, the file that is pinned.
    """
    path = cache_dir("pinned") / f"{file.sha256[:16]}-{Path(file.path).name}"
    if not path.is_file():
        content = _fetch_raw(file)
        make_cache_dir("pinned")
        with write_atomically(path, len(content)) as temporary:
            temporary.write_bytes(content)
            _verify(file, temporary, "the server sent another file; check MINIPERSONA_RAW_BASE")
    _verify(file, path, f"delete {path} to fetch it again")
    return path


def _verify(file: PinnedFile, path: Path, mend: str) -> None:
    if (found := sha256(path)) != file.sha256:
        raise UserError(f"{file.name}: has SHA-256 {found}, not the pinned {file.sha256}; {mend}")


def _fetch_raw(file: PinnedFile) -> bytes:
    from huggingface_hub.utils import http_backoff

    base = os.environ.get("MINIPERSONA_RAW_BASE") or RAW_BASE
    if not re.match(r"https?://", base):
        raise UserError(
            f"MINIPERSONA_RAW_BASE={redact(base)}: is not an http address; unset it or give one such as {RAW_BASE}"
        )
    if why := unreachable(base, "MINIPERSONA_RAW_BASE"):
        raise Unreachable(f"{file.name}: not in the local cache, and {why}, or name a local copy")
    address = f"{base.rstrip('/')}/{file.repository}/{file.commit}/{file.path}"
    try:
        response = http_backoff("GET", address, timeout=RAW_SECONDS)  # again while it is busy, or where it breaks off
        response.raise_for_status()
        return response.content
    except Exception as error:
        if not of_the_network(error):
            raise
        raise UserError(
            f"{file.name}: cannot be fetched ({reason_of(error)}); check the network, or name a local copy"
        ) from None
