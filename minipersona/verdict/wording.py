"""Names as a verdict and a report write them."""

from __future__ import annotations

import re


def without_folders(name: str) -> str:
    """A source or a model without the folders that it lies in: what is published does not say whose disk it was.

    ``jsonl:/data/rows.jsonl[0:9]`` -> ``rows.jsonl[0:9]``; a hub id, ``tiny`` or ``tulu[0:6000]`` stays as it is.
    """
    return re.sub(r"^(jsonl:|parquet:)(.*/)?|^(random:)?(?=[/.~]).*/", r"\3", name)
