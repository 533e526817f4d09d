"""Describing a source: the counts, the command, and the cache of tokenised sets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipersona.chat import ChatTokenizer, Document, load_tokenizer
from minipersona.console import Console
from minipersona.corpus import token_cache
from minipersona.corpus.__main__ import main
from minipersona.corpus.describe import describe, describe_characters, description_table
from minipersona.corpus.sources import Rows, read_source, tokenize
from minipersona.corpus.token_cache import cache_file, read_documents, tokenize_cached, write_documents
from minipersona.errors import UserError


def chat(user: str, assistant: str, **more: Any) -> dict[str, Any]:
    return {**more, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer("tiny")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [chat(f"question {i}", f"answer {i} " * i, source="even" if i % 2 == 0 else "odd") for i in range(1, 8)]
    rows += [{"text": "some raw text"}, chat("why " * 200, "so", source="even")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def equal(a: list[Document], b: list[Document]) -> bool:
    return len(a) == len(b) and all(
        x.ids.tolist() == y.ids.tolist()
        and x.supervised.tolist() == y.supervised.tolist()
        and x.truncated == y.truncated
        and (x.ids.dtype, x.supervised.dtype) == (y.ids.dtype, y.supervised.dtype)
        for x, y in zip(a, b, strict=True)
    )


# ---------------------------------------------------------------- the description


def test_the_counts_are_those_of_the_documents(file: Path, tokenizer: ChatTokenizer) -> None:
    rows = read_source(f"jsonl:{file}")
    documents = tokenize(rows, tokenizer, max_tokens=100)
    made = describe(rows, documents)
    lengths = sorted(len(d) for d in documents)
    assert made["rows"] == 9 and made["conversations"] == 8
    assert made["tokens"] == sum(lengths) and made["digest"] == rows.digest
    assert made["supervised_tokens"] == sum(int(d.supervised.sum()) for d in documents)
    assert made["truncated_rows"] == 1 == made["empty_rows"]  # the long question, whose answer is cut off
    quantiles = made["tokens_a_row"]
    assert (quantiles["min"], quantiles["median"], quantiles["max"]) == (lengths[0], lengths[4], 100)
    assert quantiles["mean"] == np.mean(lengths)
    assert made["subsets"] == {"even": 4, "odd": 4, "(no source given)": 1}


def test_a_head_of_one_subset_is_said(file: Path, tokenizer: ChatTokenizer) -> None:
    def table(source: str) -> str:
        rows = read_source(source)
        return description_table(describe(rows, tokenize(rows, tokenizer)))

    assert "All of these rows come from one subset" in table(f"jsonl:{file}[1:2]")
    assert "All of these rows" not in table(f"jsonl:{file}") + table(f"jsonl:{file}[7:8]")


def test_many_subsets_are_cut_in_the_table_only(tokenizer: ChatTokenizer) -> None:
    rows = Rows("made", [chat("a", "b", source=f"subset {i:03}") for i in range(100)], 0, "")
    made = describe(rows, tokenize(rows, tokenizer))
    assert len(made["subsets"]) == 100
    assert "and 60 smaller ones" in description_table(made)


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_or_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"jsonl:{file}[0:7]"
    assert main(["describe", source, "--tokenizer", "tiny", "--max-tokens", "40", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["source"] == source and made["rows"] == 7 and made["max_tokens"] == 40
    assert made["tokens_a_row"]["max"] == 40 and made["truncated_rows"] > 0
    assert main(["describe", source, "--tokenizer", "tiny"]) == 0
    table = capsys.readouterr().out
    assert "57.1%  odd" in table and "42.9%  even" in table and "7 conversations" in table


def test_a_local_file_is_counted_in_characters(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Without a tokenizer nothing is fetched, and what is said is how to get tokens."""
    monkeypatch.setattr("minipersona.corpus.__main__.load_tokenizer", no_tokenizing)
    assert main(["describe", f"jsonl:{file}", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    rows = read_source(f"jsonl:{file}").rows
    answers = [row["messages"][1]["content"] if "messages" in row else row["text"] for row in rows]
    asked = [row["messages"][0]["content"] if "messages" in row else "" for row in rows]
    assert made["rows"] == 9 and made["conversations"] == 8 and made["empty_rows"] == 0
    assert made["characters"] == sum(map(len, answers + asked))
    assert made["supervised_characters"] == sum(map(len, answers))
    assert made["characters_a_row"]["max"] == max(len(a + b) for a, b in zip(answers, asked, strict=True))
    assert made["subsets"] == {"even": 4, "odd": 4, "(no source given)": 1} and "tokens" not in made
    assert main(["describe", f"jsonl:{file}"]) == 0
    table = capsys.readouterr().out
    assert (
        "supervised characters a row" in table and "for tokens name --tokenizer" in table and "truncated" not in table
    )
    assert main(["describe", f"jsonl:{file}", "--template", "llama3"]) == 2
    assert "--template: name the --tokenizer" in capsys.readouterr().err


def test_characters_follow_weights_and_what_is_supervised(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in [("user", "1234"), ("assistant", "12")] * 2]
    turns[1]["weight"] = 0
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": [*turns[:3], {**turns[3], "weight": 0}]})
    )
    last, every = (describe_characters(read_source(f"jsonl:{path}"), how) for how in ("last", "all"))
    assert last["characters"] == every["characters"] == 24
    assert (last["supervised_characters"], last["empty_rows"]) == (2, 1) == (every["supervised_characters"], 1)
    path.write_text(json.dumps({"messages": turns[:1]}))
    with pytest.raises(UserError, match="row 0: row has no assistant turn"):
        describe_characters(read_source(f"jsonl:{path}"), "last")
    path.write_text(json.dumps({"messages": turns, "tools": [1]}))
    with pytest.raises(UserError, match="row 0 has tools"):
        describe_characters(read_source(f"jsonl:{path}"), "last")


def test_another_template_counts_otherwise(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for name in ("chatml-qwen2.5", "chatml"):
        assert main(["describe", f"jsonl:{file}", "--tokenizer", "tiny", "--template", name, "--json"]) == 0
        counts.append(json.loads(capsys.readouterr().out))
    assert counts[0]["template"] == "chatml-qwen2.5" and counts[0]["tokens"] > counts[1]["tokens"]
    assert counts[0]["supervised_tokens"] == counts[1]["supervised_tokens"]


def test_tiny_sets_take_the_tiny_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "tiny:raw_text[0:50]"]) == 0
    assert "0 conversations, 50 raw texts" in capsys.readouterr().out


def test_alone_it_lists_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "describe" in out and "tiny:NAME" in out and "jsonl:PATH" in out and "example" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["describe"], "SOURCE"),
        (["describe", "tiny:none"], "embedded sets are"),
        (["describe", "no-such", "--tokenizer", "tiny"], "is unknown"),
        (["describe", "tiny:benign", "--max-tokens", "0"], "'0' is not a positive whole number"),
        (["describe", "tiny:benign", "--tokenizer", "no-such"], "no such directory"),
        (["describe", "tiny:benign", "--no-such"], "unrecognized"),
        (["count", "tiny:benign"], "invalid choice"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_a_source_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("a", "b", source="\x1b[2Jx")))
    assert main(["describe", f"jsonl:{path}", "--tokenizer", "tiny"]) == 0
    assert "\x1b" not in capsys.readouterr().out


# ---------------------------------------------------------------- the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, for sets of any size."""
    monkeypatch.setattr(token_cache, "cache_dir", lambda kind: tmp_path / "cache" / kind)
    monkeypatch.setattr(token_cache, "CACHED_FROM", 1)
    monkeypatch.setattr(token_cache, "PIECE", 4)
    return tmp_path / "cache" / "tokens"


def no_tokenizing(*arguments: object, **options: object) -> list[Document]:
    raise AssertionError("the rows were tokenised again")


def test_a_set_is_tokenised_once(
    file: Path, tokenizer: ChatTokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_source(f"jsonl:{file}")
    expected = tokenize(rows, tokenizer, max_tokens=60)
    assert equal(tokenize_cached(rows, tokenizer, max_tokens=60), expected)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(token_cache, "tokenize", no_tokenizing)
    assert equal(tokenize_cached(rows, tokenizer, max_tokens=60), expected)
    for options in ({"max_tokens": 61}, {"max_tokens": 60, "supervise": "all"}):  # the control: other options
        with pytest.raises(AssertionError, match="tokenised again"):
            tokenize_cached(rows, tokenizer, **options)


def test_whatever_makes_the_documents_is_in_the_name(file: Path, tokenizer: ChatTokenizer, cache: Path) -> None:
    rows = read_source(f"jsonl:{file}")
    names = {cache_file(rows, tokenizer, "last", 60), cache_file(rows, tokenizer, "all", 60)}
    names |= {cache_file(read_source(f"jsonl:{file}[{part}]"), tokenizer, "last", 60) for part in ("0:8", "1:9", "::2")}
    other = ChatTokenizer(tokenizer._tokenizer, "another digest", tokenizer.template)
    names.add(cache_file(rows, other, "last", 60))
    file.write_text(file.read_text().replace("answer 1", "answer 9"))
    names.add(cache_file(read_source(f"jsonl:{file}"), tokenizer, "last", 60))
    assert len(names) == 7


def test_small_sets_are_not_kept(file: Path, tokenizer: ChatTokenizer, cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(token_cache, "CACHED_FROM", 10)
    tokenize_cached(read_source(f"jsonl:{file}"), tokenizer)
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_file_is_made_again(file: Path, tokenizer: ChatTokenizer, cache: Path, damage: str) -> None:
    rows = read_source(f"jsonl:{file}")
    expected = tokenize_cached(rows, tokenizer)
    path = cache_file(rows, tokenizer, "last", 2048)
    content = bytearray(path.read_bytes())
    good = bytes(content)
    if damage == "flipped":
        content[-5] ^= 1
    elif damage == "cut":
        del content[-5:]
    elif damage == "empty":
        content.clear()
    else:
        content[:] = b"version https://git-lfs.github.com/spec/v1\n"
    path.write_bytes(content)
    assert read_documents(path) is None
    said = io.StringIO()
    assert equal(tokenize_cached(rows, tokenizer, console=Console(stream=said)), expected)
    assert "damaged" in said.getvalue() and path.read_bytes() == good


def test_a_full_disk_costs_only_time(
    file: Path, tokenizer: ChatTokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, documents: list[Document]) -> None:
        raise UserError("cannot write: no space; free some")

    monkeypatch.setattr(token_cache, "write_documents", full)
    rows = read_source(f"jsonl:{file}")
    assert equal(tokenize_cached(rows, tokenizer), tokenize(rows, tokenizer))


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [
        Document(rng.integers(0, 9, n).astype(np.int32), (rng.random(n) < 0.5) & (np.arange(n) > 0), bool(n % 2))
        for n in [0, 1, 7, 0, 64, 3, 0]
    ]
    write_documents(tmp_path / "a.safetensors", documents)
    assert equal(read_documents(tmp_path / "a.safetensors") or [], documents)


def test_a_bad_row_is_named_across_pieces(tmp_path: Path, tokenizer: ChatTokenizer, cache: Path) -> None:
    rows = [chat(f"q{i}", "a") for i in range(14)]
    rows[13] = {"messages": [{"role": "user", "content": "alone"}]}
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="row 13: row has no assistant turn"):
        tokenize_cached(read_source(f"jsonl:{path}[1::2]"), tokenizer)
    assert not cache.exists()
