"""From a model's name to a local directory: embedded, on disk, or from the Hugging Face Hub at a pinned revision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from minipersona.errors import UserError
from minipersona.files import data_dir

# A name without a revision means this one, so that two runs a year apart load the same weights.
PINNED = {"Qwen/Qwen2.5-7B-Instruct": "a09a35458c702b33eeacc393d103063234e8bc28"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name_or_path}: is a file; name the directory that holds it")
    if not _HUB_ID.fullmatch(name_or_path):
        raise UserError(
            f"{name_or_path}: no such directory; give a directory, a hub id such as Qwen/Qwen2.5-7B-Instruct, or tiny"
        )
    return _download(name_or_path, files, pinned_revision(name_or_path, revision))


def resolved_revision(directory: Path) -> str | None:
    """The commit that a directory of the Hub's cache holds (``snapshots/<commit>``), or None elsewhere."""
    return directory.name if directory.parent.name == "snapshots" else None


def _download(repository: str, files: Sequence[str], revision: str | None) -> Path:
    # Imported here: the embedded model and local directories must not pay for the network client.
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except GatedRepoError:
        raise UserError(f"{repository}: gated; accept its terms on the Hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"{repository}: has no revision {revision}; check --revision") from None
    except RepositoryNotFoundError:
        raise UserError(f"{repository}: not on the Hub, or private; check the name, or set HF_TOKEN") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repository}: not in the local cache and the Hub cannot be reached; "
            "connect once, or name a directory that holds the model"
        ) from None
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors; the first line holds no header, so no token
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{repository}: {reason}; check the network and HF_ENDPOINT, then try again") from None
