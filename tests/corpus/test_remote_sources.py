"""Datasets on the Hub, against a hub on loopback: only what is needed is fetched, once, and every failure is a line."""

from __future__ import annotations

import io
import json
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Fault, LoopbackHub, Repository

from minipersona.corpus.remote import NAMED, hub_dataset
from minipersona.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TULU, FINEWEB = NAMED["tulu"], NAMED["fineweb-edu"]
GROUP, GROUPS, SHARDS = 50, 4, 3  # rows a row group, groups a shard, shards
ROWS = GROUP * GROUPS * SHARDS


def noise(source: random.Random, characters: int) -> str:
    return f"{source.getrandbits(4 * characters):0{characters}x}"


def shard(number: int, column: str) -> bytes:
    """A Parquet file of about 800 kB, of which a quarter is in a column that nobody needs."""
    source = random.Random(number)
    first, rows = number * GROUP * GROUPS, GROUP * GROUPS
    texts = [f"row {first + i} {noise(source, 4000)}" for i in range(rows)]
    chats = [[{"content": text, "role": "user"}, {"content": "yes", "role": "assistant"}] for text in texts]
    table = {"id": list(range(rows)), column: chats if column == "messages" else texts}
    table["source"] = [f"subset {number}"] * rows
    table["unneeded"] = [noise(source, 1300) for _ in range(rows)]
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(table), file, row_group_size=GROUP, write_page_checksum=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards() -> dict[str, bytes]:
    return {f"data/train-{number:05d}-of-{SHARDS:05d}.parquet": shard(number, "messages") for number in range(SHARDS)}


@pytest.fixture
def hub(tmp_path: Path, shards: dict[str, bytes]) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "home") as hub:
        hub.repositories[f"datasets/{TULU.repository}"] = Repository(
            {"README.md": b"a card", "data/notes.txt": b"none", **shards}, commit=TULU.revision
        )
        yield hub


READ = """
from minipersona.corpus.sources import read_source
def read(source):
    rows = read_source(source)
    numbers = [int((r["messages"][0]["content"] if "messages" in r else r["text"]).split()[1]) for r in rows.rows]
    return [numbers, rows.digest, rows.revision, rows.first, rows.step, sorted(rows.rows[0])]
def error_of(source):
    try:
        read_source(source)
    except UserError as error:
        return str(error)
"""


def read(hub: LoopbackHub, *sources: str, **environment: str) -> Any:
    return hub.run(f"{READ}\nresult = [read(source) for source in {sources!r}]", **environment)


def errors(hub: LoopbackHub, *sources: str, before: str = "", **environment: str) -> list[str]:
    """The one line that each source ends in."""
    lines = hub.run(f"{READ}\n{before}\nresult = [error_of(source) for source in {sources!r}]", **environment)
    assert all(line and "\n" not in line for line in lines), lines
    return list(lines)


# ---------------------------------------------------------------- what is fetched


def test_the_first_rows_cost_their_row_groups_only(hub: LoopbackHub, shards: dict[str, bytes]) -> None:
    first, second, third = shards
    [rows] = read(hub, "tulu[0:60]")
    assert rows == [list(range(60)), rows[1], TULU.revision, 0, 1, ["messages", "source"]]
    assert hub.served[second] == hub.served[third] == 0
    group = len(shards[first]) / GROUPS
    footer = 65_536  # pyarrow reads that much of a file's end
    # Two of the four groups, of which the needed column is three quarters.
    assert footer + group < hub.served[first] < footer + 0.85 * 2 * group
    assert hub.served[first] < 0.5 * len(shards[first])


def test_control_all_rows_fetch_every_shard(hub: LoopbackHub, shards: dict[str, bytes]) -> None:
    [rows] = read(hub, "tulu")
    assert rows[0] == list(range(ROWS))
    assert all(hub.served[path] >= len(content) for path, content in shards.items())


def test_ranges_go_through_the_shards_in_order(hub: LoopbackHub) -> None:
    ranges = {"[190:210]": slice(190, 210), "[590:]": slice(590, None), "[5::100]": slice(5, None, 100)}
    for rows, wanted in zip(read(hub, *(f"tulu{text}" for text in ranges)), ranges.values(), strict=True):
        assert rows[0] == list(range(ROWS))[wanted] and rows[3:5] == [wanted.start, wanted.step or 1]


def test_ranges_outside_are_refused_without_fetching_rows(hub: LoopbackHub) -> None:
    outside = ["tulu[0:601]", "tulu[600:]"]
    malformed = ["tulu[3:3]", "tulu[4:2]", "tulu[::0]", "tulu:x", "tulu@main"]  # refused before any request
    lines = errors(hub, *outside, *malformed)
    assert all("has 600 rows" in line for line in lines[:2]) and all("range" in line for line in lines[2:])
    assert sum(hub.served.values()) == len(outside) * SHARDS * 65_536  # the footers


def test_raw_text_and_too_many_rows(hub: LoopbackHub) -> None:
    files = {f"sample/10BT/{number:03d}_00000.parquet": shard(number, "text") for number in range(2)}
    hub.repositories[f"datasets/{FINEWEB.repository}"] = Repository(files, commit=FINEWEB.revision)
    limit = "from minipersona.corpus import ranges; ranges.MOST_ROWS = 300"
    rows, line = hub.run(f"{READ}\n{limit}\nresult = [read('fineweb-edu[0:3]'), error_of('fineweb-edu')]")
    assert rows[0] == [0, 1, 2] and rows[5] == ["source", "text"]
    assert "has 400 rows, too many" in line and "[0:10000]" in line


def test_a_file_of_any_dataset(hub: LoopbackHub, shards: dict[str, bytes]) -> None:
    lines = "".join(json.dumps({"text": f"row {i} {'a' * 1000}"}) + "\n\n" for i in range(9000)).encode()
    alpaca = json.dumps(
        [{"instruction": f"row {i}", "input": "", "output": "yes"} for i in range(3)], indent=2
    ).encode()
    files = {"a/rows.jsonl": lines, "a/whole.jsonl": lines, "b.parquet": shards[min(shards)], "c.json": alpaca}
    hub.repositories["datasets/me/mine"] = Repository(files)
    named = ["me/mine/b.parquet[7:8]", f"me/mine/b.parquet@{COMMIT}[7:8]", f"me/mine@{COMMIT}/b.parquet[7:8]"]
    named += ["me/mine/a/rows.jsonl[1:4]", "me/mine/a/whole.jsonl"]
    small = "from minipersona.corpus import remote; remote.SMALL = 0"
    named += ["me/mine/c.json[1:]"]
    code = f"result = [read('hub:' + name) for name in {named!r}], error_of('hub:me/mine/a/whole.jsonl[0:9001]')"
    (*piece, some, whole, listed), line = hub.run(f"{READ}\n{small}\n{code}")
    assert listed[0] == [1, 2] and listed[5] == ["messages"]
    assert all(rows[0] == [7] and rows[2] == COMMIT for rows in piece)
    assert some[0] == [1, 2, 3] and some[2] == COMMIT
    assert hub.served["a/rows.jsonl"] == 1 << 22 < len(lines)  # one block
    assert whole[0] == list(range(9000)) and "has 9,000 rows" in line


@pytest.mark.parametrize(
    "address", ["", "rows.jsonl", "me/mine", "me/mine/rows.csv", "me/mine@a/x.jsonl@b", "/me/mine/x.jsonl"]
)
def test_addresses_that_name_no_file_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"write hub:OWNER/NAME/PATH"):
        hub_dataset(address)


# ---------------------------------------------------------------- once


def test_a_second_run_needs_no_network_and_reads_the_same(hub: LoopbackHub) -> None:
    [first] = read(hub, "tulu[100:160]")
    requests = len(hub.requests)
    assert requests and read(hub, "tulu[100:160]", HF_HUB_OFFLINE="1") == [first]
    hub.close()
    again, line = hub.run(f"{READ}\nresult = [read('tulu[100:160]'), error_of('tulu[100:161]')]")
    assert again == first and "check the network" in line  # the control: other rows are not there
    assert len(hub.requests) == requests


def test_a_branch_stays_at_the_commit_that_it_was_first_read_at(hub: LoopbackHub) -> None:
    repository = hub.repositories["datasets/me/mine"] = Repository({"x.jsonl": b'{"text": "row 1"}\n'})
    [before] = read(hub, "hub:me/mine/x.jsonl")
    repository.commit, repository.files = "f" * 40, {"x.jsonl": b'{"text": "row 2"}\n'}
    same, after = read(hub, "hub:me/mine/x.jsonl", "hub:me/mine/x.jsonl@main[0:1]")  # another range is another read
    assert same == before and (before[0], before[2], after[0], after[2]) == ([1], COMMIT, [2], "f" * 40)


def test_rows_altered_in_the_cache_are_an_error(hub: LoopbackHub) -> None:
    code = """
    from minipersona.hub import cache_dir
    before, found = read("tulu[0:5]"), []
    [path] = cache_dir("rows").glob("*.jsonl")
    content = path.read_bytes()
    for damaged in (content.replace(b"row 3", b"row 4"), content[:-9], content + b"{}"):
        path.write_bytes(damaged)
        found.append(error_of("tulu[0:5]"))
    path.unlink()
    result = [str(path), found, before == read("tulu[0:5]")]
    """
    path, lines, same = hub.run(READ + textwrap.dedent(code))
    assert len(lines) == 3 and all(path in line and "delete it" in line for line in lines) and same


def test_the_digest_is_of_the_rows(hub: LoopbackHub) -> None:
    hub.repositories["datasets/me/copy"] = hub.repositories[f"datasets/{TULU.repository}"]
    a, b, c = read(hub, "tulu[0:5]", "hub:me/copy/data/train-*.parquet[0:5]", "tulu[1:6]")
    assert a[1] == b[1] != c[1]


# ---------------------------------------------------------------- what goes wrong


def test_what_the_hub_refuses_is_one_line(hub: LoopbackHub) -> None:
    files = {"x.jsonl": b'{"text": "row 1"}\n'}
    canary = "hf_canaryCanaryCanary00"
    hub.repositories |= {
        "datasets/me/private": Repository(files, token="hf_" + "o" * 20),
        "datasets/me/gated": Repository(files, gated=True),
        "datasets/me/open": Repository(files),
    }
    names = ["private/x.jsonl", "absent/x.jsonl", "gated/x.jsonl", "open/y.jsonl", "open/a/*.jsonl"]
    sources = [f"hub:me/{name}" for name in [*names, "open/x.jsonl@nowhere"]]
    lines = errors(hub, *sources, HF_TOKEN=canary)
    expected = ["set HF_TOKEN", "check the name", "accept its terms", "check the path", "check the path", "revision"]
    for source, line, part in zip(sources, lines, expected, strict=True):
        assert line.startswith(source) and part in line
    assert "Repository not found" in lines[0]  # the Hub's own words
    assert "Access to me/gated is restricted" in lines[2]
    # The server was sent the token and said it back; nobody else sees it.
    assert any(
        headers.get("Authorization", headers.get("authorization")) == f"Bearer {canary}" for *_, headers in hub.requests
    )
    assert canary not in "".join(lines)
    [rows] = read(hub, "hub:me/private/x.jsonl", HF_TOKEN="hf_" + "o" * 20)
    assert rows[0] == [1]


def test_a_busy_hub_is_waited_for(hub: LoopbackHub) -> None:
    wait, long = {"Retry-After": "0"}, {"RateLimit": '"api";r=0;t=300'}
    once = [Fault("/api/datasets/allenai", status=429, headers=wait), Fault("/storage/", status=503, headers=wait)]
    down = [Fault("/me/busy", 99, 429, long), Fault("/me/mine/tree/", 99, 500)]
    hub.faults = [*once, *down]
    hub.repositories["datasets/me/mine"] = Repository({"x.jsonl": b"", "a/y.jsonl": b""})
    code = """
    from minipersona import hub
    result = [read("tulu[0:5]"), error_of("hub:me/busy/x.jsonl")]
    hub.PATIENCE = 0
    result += [error_of("hub:me/mine/x.jsonl"), error_of("hub:me/mine/a/*.jsonl")]
    """
    rows, *lines = hub.run(READ + textwrap.dedent(code))
    assert rows[0] == list(range(5)) and [fault.times for fault in once] == [0, 0]
    assert "429" in lines[0] and down[0].times == 98  # the control: five minutes are too long
    assert all("the Hub is busy" in line and "try again later" in line for line in lines), lines


def test_an_answer_that_breaks_off_is_asked_for_again(hub: LoopbackHub, shards: dict[str, bytes]) -> None:
    hub.faults = [Fault(f"train-0000{number}", break_off=100_000) for number in (0, 2)]
    first, third = read(hub, "tulu[0:200]", "tulu[400:410]")  # a shard as a whole, and a row group of another
    assert first[0] == list(range(200)) and third[0] == list(range(400, 410))
    assert [fault.times for fault in hub.faults] == [0, 0]


def test_damaged_files_are_named(hub: LoopbackHub, shards: dict[str, bytes]) -> None:
    content = shards[min(shards)]
    flipped = bytearray(content)
    flipped[100_000] ^= 0xFF  # in the first row group's data, which its checksum covers
    other = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["b"]}), other)
    files = {
        "flip": bytes(flipped),
        "cut": content[:-3000],
        "html": b"<html>" * 30_000,
        "none": b"",
        "columns": other.getvalue(),
    }
    hub.repositories["datasets/me/bad"] = Repository({f"{name}.parquet": data for name, data in files.items()})
    sources = [*(f"hub:me/bad/{name}.parquet[0:1]" for name in files), "hub:me/bad/flip.parquet"]  # and as a whole
    code = f"result = [error_of(source) for source in {sources!r}], read('hub:me/bad/flip.parquet[60:61]')"
    lines, sound = hub.run(f"{READ}\n{code}")
    for name, line in zip([*files, "flip"], lines, strict=True):
        assert f"me/bad/{name}.parquet: " in line and "\n" not in line
        assert ("prompt, answer" if name == "columns" else "damaged") in line
    assert sound[0] == [60]  # the control: another row group of the flipped file
    assert not list((hub.home / "minipersona" / "rows").glob(".*"))  # and nothing half-written is left


def test_offline_and_without_pyarrow(hub: LoopbackHub) -> None:
    [line] = errors(hub, "tulu[0:5]", HF_HUB_OFFLINE="1")
    assert line.startswith("tulu[0:5]: ") and "HF_HUB_OFFLINE is set" in line
    assert not hub.requests
    code = """
    import sys
    sys.modules["pyarrow"] = None
    before = error_of("tulu[0:5]")
    del sys.modules["pyarrow"]
    result = [before, read("tulu[0:5]")]
    sys.modules["pyarrow"] = None
    result.append(read("tulu[0:5]"))
    """
    line, fetched, kept = hub.run(READ + textwrap.dedent(code))
    assert "pip install 'minipersona[data]'" in line and fetched == kept  # the cache needs neither
    [line] = errors(hub, "tulu[0:6]", HF_HOME="/proc/none")
    assert "set HF_HOME" in line
