"""What a source holds: how many rows and tokens, how long they are, and which subsets they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minipersona.chat import Document
from minipersona.chat.messages import check_messages, check_text, is_learned
from minipersona.chat.rows import check_row
from minipersona.chat.tokenizer import Supervise
from minipersona.corpus.sources import Rows, naming
from minipersona.errors import UserError, require

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
NO_SUBSET = "(no source given)"
MOST_SUBSETS = 40  # lines of the table


def describe(rows: Rows, documents: Sequence[Document]) -> dict[str, Any]:
    """The description of rows and their documents, one for one, as plain values.

    Lengths are tokens a row, after truncation. An empty row has no supervised token: it teaches nothing.
    """
    supervised = [int(d.supervised.sum()) for d in documents]
    counts = _counts(rows, "tokens", [len(d) for d in documents], supervised)
    return {**counts, "truncated_rows": sum(d.truncated for d in documents)}


def describe_characters(rows: Rows, supervise: Supervise) -> dict[str, Any]:
    """The same without a tokenizer: lengths are characters of content a row, without the template, and nothing is cut.

    UserErrors name the row that could not be tokenised either.
    """
    lengths, supervised = [], []
    with naming(rows, range(len(rows))):
        for index, row in enumerate(rows.rows):
            check_row(row, f"rows[{index}]")
            try:
                length, learned = _characters(row, supervise)
            except UserError as error:
                raise UserError(f"rows[{index}]: {error}") from None
            lengths.append(length)
            supervised.append(learned)
    return _counts(rows, "characters", lengths, supervised)


def _characters(row: dict[str, Any], supervise: Supervise) -> tuple[int, int]:
    """The characters of a row, and those that are learned."""
    if "messages" not in row:
        check_text(row["text"], "text")
        return len(row["text"]), len(row["text"])
    check_messages(row["messages"])
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    require(bool(answers), "row has no assistant turn, so nothing to learn from; add a reply, or drop the row")
    taught = answers[-1:] if supervise == "last" else answers
    return (
        sum(len(turn["content"]) for turn in row["messages"]),
        sum(len(turn["content"]) for turn in taught if is_learned(turn)),
    )


def _counts(rows: Rows, unit: str, lengths: Sequence[int], supervised: Sequence[int]) -> dict[str, Any]:
    subsets = Counter(str(row.get("source") or NO_SUBSET) for row in rows.rows)
    return {
        "source": rows.source,
        "digest": rows.digest,
        "rows": len(rows),
        "conversations": sum("messages" in row for row in rows.rows),
        unit: sum(lengths),
        f"supervised_{unit}": sum(supervised),
        "empty_rows": sum(not count for count in supervised),
        f"{unit}_a_row": _quantiles(np.array(lengths)),
        f"supervised_{unit}_a_row": _quantiles(np.array(supervised)),
        "subsets": dict(subsets.most_common()),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    stored = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")  # values that occur
    return {name: int(value) for name, value in zip(QUANTILES, stored, strict=True)} | {"mean": float(values.mean())}


def description_table(description: dict[str, Any]) -> str:
    """The same for reading."""
    rows, subsets = description["rows"], description["subsets"]
    unit = "tokens" if "tokens" in description else "characters"
    share = description[f"supervised_{unit}"] / max(1, description[unit])
    width = len(f"supervised {unit} a row")
    named = {
        "source": description["source"],
        "rows": f"{rows:,}: {description['conversations']:,} conversations, "
        f"{rows - description['conversations']:,} raw texts",
        unit: f"{description[unit]:,}",
        f"supervised {unit}": f"{description[f'supervised_{unit}']:,} ({share:.1%})",
    }
    if "truncated_rows" in description:
        named["truncated rows"] = f"{description['truncated_rows']:,} ({description['truncated_rows'] / rows:.1%})"
    named["empty rows"] = f"{description['empty_rows']:,} ({description['empty_rows'] / rows:.1%}), which teach nothing"
    lines = [f"{name:<{width - 4}}{value}" for name, value in named.items()]
    lines += ["", " " * width + "".join(f"{name:>9}" for name in [*QUANTILES, "mean"])]
    for title, key in ((f"{unit} a row", f"{unit}_a_row"), (f"supervised {unit} a row", f"supervised_{unit}_a_row")):
        lines.append(f"{title:<{width}}" + "".join(f"{value:9,.0f}" for value in description[key].values()))
    lines += ["", f'{"rows":>9}  {"share":>6}  subset (the rows\' own "source")']
    for name, count in list(subsets.items())[:MOST_SUBSETS]:
        lines.append(f"{count:9,}  {count / rows:6.1%}  {name}")
    if len(subsets) > MOST_SUBSETS:
        lines.append(f"and {len(subsets) - MOST_SUBSETS:,} smaller ones; --json lists all")
    if len(subsets) == 1 and NO_SUBSET not in subsets:
        lines.append("All of these rows come from one subset.")
    return "\n".join(lines)
