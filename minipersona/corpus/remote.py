"""Rows of datasets on the Hugging Face Hub, read over the network as far as they are needed, once."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, cast

from minipersona.console import Console
from minipersona.corpus.cache import Kept, load, store
from minipersona.corpus.jsonl import iterate_rows, select
from minipersona.corpus.parquet import read_parquet, require_pyarrow
from minipersona.errors import Unreachable, UserError
from minipersona.hub import HUB_ID, explained, hub_unreachable, patiently


@dataclass(frozen=True)
class HubDataset:
    """Files of a dataset repository, whose rows follow one another in the order of the files' names."""

    repository: str
    files: str  # a .jsonl, .json or .parquet path in the repository; * stands for any part of a name
    revision: str = "main"


NAMED = {
    "tulu": HubDataset(
        "allenai/tulu-3-sft-mixture", "data/train-*.parquet", "b14afda60f1bbebe55d5d2fa1e4df5042f97f8be"
    ),
    "fineweb-edu": HubDataset(
        "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    ),
}

_ADDRESS = re.compile(
    rf"(?P<repository>{HUB_ID})(?:@(?P<before>[^/@]+))?/(?P<files>[^@?\[\]]+\.(?:jsonl?|parquet))(?:@(?P<after>[^@]+))?"
)


def hub_dataset(address: str) -> HubDataset:
    """What ``REPO/FILE``, ``REPO/FILE@REVISION`` or the Hub's own ``REPO@REVISION/FILE`` names."""
    match = _ADDRESS.fullmatch(address)
    if match is None or (match["before"] and match["after"]):
        raise UserError(
            f"source hub:{address}: write hub:OWNER/NAME/PATH.jsonl, .json or .parquet, with @REVISION after it or none"
        )
    return HubDataset(match["repository"], match["files"], match["before"] or match["after"] or "main")


def read_dataset(dataset: HubDataset, wanted: slice, name: str) -> Kept:
    """The rows of a dataset that are meant, from the local cache where they are there.

    A branch is looked up once: what is kept of it stays at the commit that it was then. `name` is what errors call
    the source. UserError where the Hub, its answer, or a file is at fault.
    """
    what = {**asdict(dataset), "rows": [wanted.start, wanted.stop, wanted.step]}
    if kept := load(what):
        return kept
    if dataset.files.endswith(".parquet"):
        require_pyarrow()  # before anything is fetched
    if why := hub_unreachable():
        raise Unreachable(f"{name}: not in the local cache, and {why}")
    with explained(name):
        files = patiently(lambda: _find(dataset))
    return store(what, files[0].commit, _rows(files, wanted, name))


# ---------------------------------------------------------------- files

SMALL = 16_000_000  # bytes; git, not large-file storage, may hold such a text file, and then answers no ranges


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset repository at a commit."""

    filesystem: Any
    repository: str
    commit: str
    path: str

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.path}"

    @property
    def address(self) -> str:
        return f"datasets/{self.repository}@{self.commit}/{self.path}"

    def open(self, most: bool) -> BinaryIO:
        """Read in ranges, each exactly what is asked for; or, where nearly all is needed, the whole file at once."""
        if not most:
            return cast(BinaryIO, self.filesystem.open(self.address, "rb", cache_type="none"))
        from huggingface_hub import hf_hub_download

        return open(  # a download that broke off is resumed
            patiently(lambda: hf_hub_download(self.repository, self.path, repo_type="dataset", revision=self.commit)),
            "rb",
        )


def _find(dataset: HubDataset) -> list[HubFile]:
    """The files that a dataset's pattern names, at the commit that its revision now is."""
    from huggingface_hub import HfApi, HfFileSystem

    commit = HfApi().dataset_info(dataset.repository, revision=dataset.revision, timeout=30).sha
    assert commit is not None
    filesystem = HfFileSystem(skip_instance_cache=True)  # its cache would remember failures
    root = f"datasets/{dataset.repository}@{commit}/"
    # A glob of a name without a star would take any failure for an absence.
    found = sorted(filesystem.glob(root + dataset.files)) if "*" in dataset.files else [root + dataset.files]
    if not found:
        raise FileNotFoundError(f"{dataset.files} at {commit[:12]}")
    filesystem.info(found[0])
    return [HubFile(filesystem, dataset.repository, commit, path.removeprefix(root)) for path in found]


# ---------------------------------------------------------------- rows


def _rows(files: list[HubFile], wanted: slice, name: str) -> Iterator[dict[str, Any]]:
    with explained(name):
        if not files[0].path.endswith(".parquet"):
            yield from select(_lines(files, wanted), wanted, name)
            return
        count, rows = read_parquet(files, wanted, name)
        with Console().progress(f"reading {name}", count, "rows") as progress:
            for done, row in enumerate(rows, 1):
                yield row
                progress.advance(done)


def _lines(files: list[HubFile], wanted: slice) -> Iterator[dict[str, Any]]:
    for file in files:
        size = file.filesystem.info(file.address)["size"]
        with file.open(most=wanted.stop is None or size <= SMALL) as handle:
            yield from iterate_rows(io.BufferedReader(cast(Any, handle), 1 << 22), file.name)
