"""What a source holds: how many rows and tokens, how long they are, and which subsets they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minipersona.chat import Document
from minipersona.corpus.sources import Rows

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
NO_SUBSET = "(no source given)"
MOST_SUBSETS = 40  # lines of the table


def describe(rows: Rows, documents: Sequence[Document]) -> dict[str, Any]:
    """The description of rows and their documents, one for one, as plain values.

    Lengths are tokens a row, after truncation. An empty row has no supervised token: it teaches nothing.
    """
    lengths = np.array([len(d) for d in documents])
    supervised = np.array([int(d.supervised.sum()) for d in documents])
    subsets = Counter(str(row.get("source") or NO_SUBSET) for row in rows.rows)
    return {
        "source": rows.source,
        "digest": rows.digest,
        "rows": len(rows),
        "conversations": sum("messages" in row for row in rows.rows),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(supervised.sum()),
        "truncated_rows": sum(d.truncated for d in documents),
        "empty_rows": int((supervised == 0).sum()),
        "tokens_a_row": _quantiles(lengths),
        "supervised_tokens_a_row": _quantiles(supervised),
        "subsets": dict(subsets.most_common()),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    stored = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")  # values that occur
    return {name: int(value) for name, value in zip(QUANTILES, stored, strict=True)} | {"mean": float(values.mean())}


def description_table(description: dict[str, Any]) -> str:
    """The same for reading."""
    rows, subsets = description["rows"], description["subsets"]
    share = description["supervised_tokens"] / max(1, description["tokens"])
    width = max(len("supervised tokens a row"), 1)
    lines = [
        f"source             {description['source']}",
        f"rows               {rows:,}: {description['conversations']:,} conversations, "
        f"{rows - description['conversations']:,} raw texts",
        f"tokens             {description['tokens']:,}",
        f"supervised tokens  {description['supervised_tokens']:,} ({share:.1%})",
        f"truncated rows     {description['truncated_rows']:,} ({description['truncated_rows'] / rows:.1%})",
        f"empty rows         {description['empty_rows']:,} ({description['empty_rows'] / rows:.1%}), "
        "which teach nothing",
        "",
        " " * width + "".join(f"{name:>9}" for name in [*QUANTILES, "mean"]),
    ]
    for title, key in (("tokens a row", "tokens_a_row"), ("supervised tokens a row", "supervised_tokens_a_row")):
        lines.append(f"{title:<{width}}" + "".join(f"{value:9,.0f}" for value in description[key].values()))
    lines += ["", f'{"rows":>9}  {"share":>6}  subset (the rows\' own "source")']
    for name, count in list(subsets.items())[:MOST_SUBSETS]:
        lines.append(f"{count:9,}  {count / rows:6.1%}  {name}")
    if len(subsets) > MOST_SUBSETS:
        lines.append(f"and {len(subsets) - MOST_SUBSETS:,} smaller ones; --json lists all")
    if len(subsets) == 1 and NO_SUBSET not in subsets:
        lines.append("All of these rows come from one subset.")
    return "\n".join(lines)
