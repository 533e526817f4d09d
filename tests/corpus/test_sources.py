"""Sources by name, ranges, and rows to documents."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import sys
from pathlib import Path

import pytest

from minipersona.chat import load_tokenizer
from minipersona.corpus.sources import read_source, tokenize
from minipersona.errors import UserError
from minipersona.files import sha256


def chat(user: str, assistant: str) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [chat(f"question {i}", f"answer {i}") for i in range(5)] + [{"text": "some raw text"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize(
    "suffix, first, count",
    [("", 0, 6), ("[0:2]", 0, 2), ("[2:]", 2, 4), ("[:3]", 0, 3), ("[5:6]", 5, 1), ("[:]", 0, 6)],
)
def test_ranges(file: Path, suffix: str, first: int, count: int) -> None:
    rows = read_source(f"jsonl:{file}{suffix}")
    assert (rows.first, len(rows)) == (first, count)
    if first < 5:
        assert rows.rows[0]["messages"][0]["content"] == f"question {first}"


def test_every_second_row(file: Path) -> None:
    rows = read_source(f"jsonl:{file}[1:6:2]")
    assert (rows.first, rows.step, len(rows)) == (1, 2, 3)
    assert [row["messages"][0]["content"] for row in rows.rows[:2]] == ["question 1", "question 3"]
    assert rows.rows == read_source(f"jsonl:{file}").rows[1:6:2]


@pytest.mark.parametrize("suffix", ["[0:7]", "[3:3]", "[4:2]", "[6:]", "[-1:]", "[a:b]", "[::0]"])
def test_ranges_outside_the_file_are_refused(file: Path, suffix: str) -> None:
    with pytest.raises(UserError, match=r"range|no such file"):
        read_source(f"jsonl:{file}{suffix}")


@pytest.mark.parametrize(
    "source", ["", "rows.jsonl", "http://x", "csv:a", "tiny:", "tiny:../benign", "jsonl:", "tulus", "tulu:"]
)
def test_unknown_sources_are_refused(source: str) -> None:
    with pytest.raises(UserError):
        read_source(source)


def test_rows_become_documents_in_order(file: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    documents = tokenize(read_source(f"jsonl:{file}"), tokenizer)
    assert len(documents) == 6
    for i, document in enumerate(documents[:5]):
        taught = tokenizer.decode(document.ids[document.supervised])
        assert taught == f"answer {i}<|im_end|>\n"
    raw = documents[5]
    assert tokenizer.decode(raw.ids) == "some raw text" and raw.supervised.tolist() == [False] + [True] * (len(raw) - 1)


def test_a_bad_row_is_named_as_the_file_counts_it(tmp_path: Path) -> None:
    rows = [chat("a", "b"), {"text": "raw"}, chat("c", "d"), {"messages": [{"role": "user", "content": "alone"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"row 3.*assistant turn"):
        tokenize(read_source(f"jsonl:{path}[1:4]"), load_tokenizer("tiny"))
    path.write_text(json.dumps({"text": 5}))
    with pytest.raises(UserError, match=r"row 0.*text"):
        tokenize(read_source(f"jsonl:{path}"), load_tokenizer("tiny"))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 17_000_000)
    with pytest.raises(UserError, match="line 1 is longer"):
        read_source(f"jsonl:{path}")


FORMS = {
    "messages": chat("Hi", "Hello."),
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "completion": {"prompt": "Hi", "completion": "Hello."},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, chat("", "Hello.")["messages"][1]]
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["lines", "BOM", "list", "indented list", "Parquet"])
def test_every_form_in_every_layout_is_the_same_row(tmp_path: Path, form: str, layout: str) -> None:
    path, row = tmp_path / "rows.json", FORMS[form]
    source = f"jsonl:{path}"
    if layout == "Parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        if form == "parts":
            row = {"messages": [{**turn, "content": [{"type": "text", "text": text}]} for turn, text in
                                zip(row["messages"], ("Hi", "Hello."), strict=True)]}  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
        source = f"parquet:{path}"
    elif "list" in layout:
        path.write_text(json.dumps([row, row], indent=2 if "indented" in layout else None))
    else:
        path.write_bytes(b"\xef\xbb\xbf" * (layout == "BOM") + f"{json.dumps(row)}\n{json.dumps(row)}\n".encode())
    assert read_source(source).rows == [chat("Hi", "Hello.")] * 2
    assert read_source(f"{source}[1:2]").rows == [chat("Hi", "Hello.")]


def test_a_list_that_is_broken_or_long_is_named_by_item(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [chat(f"question {i}", "a" * i) for i in range(3000)]
    path.write_text(json.dumps(rows))  # some megabytes, so that it is read in several pieces
    assert read_source(f"jsonl:{path}[2990:]").rows == rows[2990:]
    for content, words in {
        '[{"text": "a"}, {"text": 1, "text": 2}]': r"item 1 is not valid JSON \(key 'text' is there twice",
        '[{"text": "a"}, {"txt": "b"}]': 'item 1 is not a row; give it "messages"',
        '[{"text": "a"} {"text": "b"}]': "item 0 is not valid JSON .*comma",
        '[{"text": "a"},': "item 1 is not valid JSON",
        '[{"text": "a"}]\n[{"text": "b"}]\n': "text follows the end of the list",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            read_source(f"jsonl:{path}")


def test_compressed_rows_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(chat("a", "b")).encode()))
    with pytest.raises(UserError, match=r"rows.jsonl.gz: is gzip-compressed; decompress it"):
        read_source(f"jsonl:{path}")


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"tools": [{"type": "function"}]}, r"row 1 has tools"),
        ({"images": ["a.png"]}, r"row 1 has images"),
        ({"messages": chat("a", "b")["messages"][:1]}, "row 1: row has no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, r"row 1: messages\[0\]: weight is 2"),
    ],
)
def test_what_a_row_asks_for_is_honoured_or_refused(tmp_path: Path, extra: dict, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [chat("a", "b"), {**chat("c", "d"), **extra}]))
    with pytest.raises(UserError, match=words):
        tokenize(read_source(f"jsonl:{path}"), load_tokenizer("tiny"))
    assert len(tokenize(read_source(f"jsonl:{path}[0:1]"), load_tokenizer("tiny"))) == 1


def test_parquet_names_the_row_with_two_forms(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{**chat("a", "b"), "text": "a b"}] * 3 + [{**chat("a", "b"), "text": "another"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_source(f"parquet:{tmp_path}/rows.parquet[0:3]").rows == [chat("a", "b")] * 3
    with pytest.raises(UserError, match=r'row 3 has "messages" and a "text" without its turns'):
        read_source(f"parquet:{tmp_path}/rows.parquet[1:4:2]")


@pytest.mark.parametrize(
    "source", ["data/tulu", "jsonl:benign", "jsonl:tiny/benign.jsonl", "tiny:tiny/benign", "./tulu"]
)
def test_only_a_bare_name_is_a_shipped_set(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        read_source(source)


def test_the_digest_is_the_files(file: Path) -> None:
    before = read_source(f"jsonl:{file}[0:2]").digest
    assert before == read_source(f"jsonl:{file}").digest
    file.write_text(file.read_text().replace("answer 4", "answer 5"))
    assert before != read_source(f"jsonl:{file}[0:2]").digest


# ---------------------------------------------------------------- Parquet


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two files of 7 and 5 conversations in row groups of 3."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, rows in (("b", range(7, 12)), ("a", range(7))):
        messages = [chat(f"question {i}", f"answer {i}")["messages"] for i in rows]
        table = pyarrow.table({"id": list(rows), "messages": messages, "text": [""] * len(rows)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
    return tmp_path


@pytest.mark.parametrize(
    "suffix, wanted",
    [("", slice(0, 12)), ("[5:9]", slice(5, 9)), ("[11:]", slice(11, 12)), ("[1:12:4]", slice(1, 12, 4))],
)
def test_parquet_files_follow_one_another(shards: Path, suffix: str, wanted: slice) -> None:
    rows = read_source(f"parquet:{shards}/*.parquet{suffix}")
    assert rows.rows == [chat(f"question {i}", f"answer {i}") for i in range(12)][wanted]
    assert (rows.first, rows.step) == (wanted.start, wanted.step or 1)


def test_every_range_is_the_slice(shards: Path) -> None:
    everything = read_source(f"parquet:{shards}/*.parquet").rows
    for first, last, step in itertools.product(range(12), range(1, 13), (1, 2, 5, 20)):
        if first < last:
            assert read_source(f"parquet:{shards}/*.parquet[{first}:{last}:{step}]").rows == everything[first:last:step]


def test_parquet_digests_cover_every_file(shards: Path) -> None:
    both = read_source(f"parquet:{shards}/*.parquet[0:1]").digest
    assert both == sha256(shards / "a.parquet", shards / "b.parquet")
    assert read_source(f"parquet:{shards}/a.parquet").digest == sha256(shards / "a.parquet") != both


def test_parquet_whose_footer_counts_other_rows_is_refused(shards: Path) -> None:
    """Such a file would shift the rows of those that follow it."""
    parquet = pytest.importorskip("pyarrow.parquet")
    path = shards / "a.parquet"
    good, rows, said = path.read_bytes(), 7, set()
    assert len(read_source(f"parquet:{shards}/*.parquet")) == 12  # the control
    for at in range(len(good) - 8 - int.from_bytes(good[-8:-4], "little"), len(good) - 8):
        if good[at] not in (2 * rows, 2 * 3):  # of the file, of a group, as thrift writes numbers
            continue
        path.write_bytes(good[:at] + bytes([good[at] + 2]) + good[at + 1 :])
        with contextlib.suppress(OSError):
            footer = parquet.read_metadata(path)
            groups = sum(footer.row_group(number).num_rows for number in range(footer.num_row_groups))
            if (footer.num_rows, groups) != (rows, rows):
                with pytest.raises(UserError, match=r"a\.parquet: damaged: its footer says "):
                    read_source(f"parquet:{shards}/*.parquet")
                said.add((footer.num_rows, groups))
    assert {(rows + 1, rows), (rows, rows + 1)} <= said


def test_parquet_that_cannot_be_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has 12 rows; choose a range"):
        read_source(f"parquet:{shards}/*.parquet[0:13]")
    with pytest.raises(UserError, match="no such file"):
        read_source(f"parquet:{shards}/c*.parquet")
    (shards / "c.parquet").write_bytes((shards / "a.parquet").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"c\.parquet: damaged"):
        read_source(f"parquet:{shards}/c.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'minipersona\[data\]'"):
        read_source(f"parquet:{shards}/a.parquet")
