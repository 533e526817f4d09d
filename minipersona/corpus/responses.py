"""Other responses in place of the rows' own: those of a file that another model wrote, or those of other rows.

The first line says what the file is, {"roleplay": {...}}; then a line a row, in the order in which they were finished:

    {"row": 17, "content": digest of the row, "persona": name, "response": text, "tokens": 212, "stopped": true}

`row` counts from the source's first row. A response of null leaves the row as it is: it could not be asked for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minipersona.corpus.mixtures import WHICH_RESPONSE, content_digest, generator
from minipersona.corpus.sources import Rows
from minipersona.errors import UserError
from minipersona.files import digest, read_jsonl

HEADER = "roleplay"
MEND = "write it with python -m minipersona.behaviour roleplay"


def read_responses(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """What made the file, and its lines by row. UserErrors name the file and the line."""
    if not path.is_file():
        raise UserError(f"data.responses {path}: no such file; {MEND}")
    lines = read_jsonl(path)
    if not lines or not isinstance(lines[0], dict) or not isinstance(lines[0].get(HEADER), dict):
        raise UserError(f"data.responses {path}: does not begin with what it is; {MEND}")
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines[1:], 2):
        response = line.get("response", 0) if isinstance(line, dict) else 0
        if not (response is None or isinstance(response, str)) or type(line.get("row")) is not int:
            raise UserError(f"data.responses {path}: line {number} is not a row with a response; delete that line")
        found[line["row"]] = line
    return lines[0][HEADER], found


def last_response(messages: list[dict[str, Any]]) -> int | None:
    """The place of the last assistant turn, or None."""
    places = [i for i, turn in enumerate(messages) if isinstance(turn, dict) and turn.get("role") == "assistant"]
    return places[-1] if places else None


def with_shuffled_responses(rows: Rows, seed: int) -> Rows:
    """The rows, each with the last response of another: a control that teaches how to respond, and not to what.

    The responses go round a cycle through all rows in an order that the seed draws, so that none stays where it was.
    Rows without a response stay as they are.
    """
    places = [last_response(row["messages"]) if isinstance(row.get("messages"), list) else None for row in rows.rows]
    answered = [index for index, place in enumerate(places) if place is not None]
    order = [answered[i] for i in generator(seed, WHICH_RESPONSE).permutation(len(answered))]
    shuffled = list(rows.rows)
    for index, other in zip(order, order[1:] + order[:1], strict=True):
        place, taken = places[index], places[other]
        assert place is not None and taken is not None
        turns = rows.rows[index]["messages"]
        response = {**turns[place], "content": rows.rows[other]["messages"][taken]["content"]}
        shuffled[index] = {**rows.rows[index], "messages": [*turns[:place], response]}
    return replace(rows, rows=shuffled, digest=digest([rows.digest, "responses shuffled", seed]))


def with_responses(rows: Rows, path: Path) -> tuple[Rows, dict[str, Any]]:
    """The rows, each with the file's response as its last assistant turn, and what the file came to.

    All else of a row stays, its own system turn too; what follows the response is dropped. UserError where the file
    was made for other rows or is not finished.
    """
    made_by, responses = read_responses(path)
    written, kept = [], 0
    missing = [index for index in range(len(rows)) if index not in responses]
    if missing:
        raise UserError(
            f"data.responses {path}: lacks {len(missing):,} of {len(rows):,} rows, row {missing[0]} first; "
            "the command that wrote it goes on where it stopped"
        )
    for index, row in enumerate(rows.rows):
        line = responses[index]
        if line.get("content") != content_digest(row):
            where = f"{rows.source}: row {rows.first + index * rows.step}"
            raise UserError(
                f"data.responses {path}: was written for another row than {where}; write it for this source"
            )
        place = None if line["response"] is None else last_response(row["messages"])
        kept += place is None
        if place is not None:
            turns = row["messages"]
            row = {**row, "messages": [*turns[:place], {**turns[place], "content": line["response"]}]}
        written.append(row)
    lines = [responses[index] for index in range(len(rows))]
    content = digest([line["response"] for line in lines])
    asked = [line for line in lines if line["response"] is not None]
    facts = {
        "responses": str(path),
        "responses_digest": content,
        "responses_by": made_by.get("model"),
        "responses_seed": made_by.get("seed"),
        "responses_personas": sorted({name for line in asked if isinstance(name := line.get("persona"), str) and name}),
        "responses_kept": kept,
        "responses_empty": sum(not line["response"].strip() for line in asked),
        "responses_cut": sum(line.get("stopped") is False for line in asked),
    }
    return replace(rows, rows=written, digest=digest([rows.digest, content])), facts
