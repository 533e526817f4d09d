"""The ledger: what is appended is read, the newest entry of a cell counts, and a kill leaves a readable file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipersona.errors import UserError
from minipersona.verdict import ledger
from minipersona.verdict.ledger import LEDGER, LedgerEntry, read_entries, read_ledger


def entry(cell: str, event: ledger.Event = "started", time: float = 1.0, error: str | None = None) -> LedgerEntry:
    return LedgerEntry(time, cell, "3", "é", event, 1, error)


def test_what_is_appended_is_read_and_the_newest_entry_of_a_cell_counts(tmp_path: Path) -> None:
    assert read_entries(tmp_path) == [] and read_ledger(tmp_path) == {}
    entries = [
        entry("x"), entry("y"), entry("x", "failed", 3.0, "not UTF-8: \udcff, NUL: \0"), entry("y", "done", 2.0),
        entry("x", time=2.5),  # a clock that was set back
    ]  # fmt: skip
    for one in entries:
        ledger.append(tmp_path, one)
    assert read_entries(tmp_path) == entries
    assert read_ledger(tmp_path) == {"x": entries[4], "y": entries[3]}


@given(cut=st.integers(1, 300))
def test_a_torn_last_line_is_left_out(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("ledger")
    for number in range(3):
        ledger.append(directory, entry(str(number)))
    file = directory / LEDGER
    before = file.read_bytes()[: max(0, len(file.read_bytes()) - cut)]
    file.write_bytes(before)
    whole = [str(number) for number in range(before.count(b"\n"))]
    assert list(read_ledger(directory)) == whole
    ledger.append(directory, entry("after"))  # and the next line does not run into it
    assert list(read_ledger(directory)) == [*whole, "after"]


@pytest.mark.parametrize(
    "line",
    ['{"time": 3}', "[]", '{"time": 1, "cell": "x", "phase": "9", "name": "n", "event": "done", "attempt": 1}',
     '{"time": 1, "cell": "x", "phase": "3", "name": "n", "event": "claimed", "attempt": 1}',
     '{"time": 1, "cell": "x", "phase": "3", "name": "n", "event": "done", "attempt": 1, "runner": "r"}'],
)  # fmt: skip
def test_a_line_that_is_not_an_entry_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    ledger.append(tmp_path, entry("x"))
    ledger.append(tmp_path, entry("y"))
    with open(tmp_path / LEDGER, "a") as file:
        file.write(line + "\n")
    ledger.append(tmp_path, entry("z"))
    with pytest.raises(UserError) as refused:
        read_ledger(tmp_path)
    assert str(refused.value) == f"{tmp_path / LEDGER}: line 3 is not a ledger entry; delete it"
