"""Mixtures: shares exact to the row, token counts matched, nothing that is trained on or held out drawn twice."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.chat import ChatTokenizer, Document, load_tokenizer
from minipersona.chat.template import QWEN2_5_SYSTEM_PROMPT
from minipersona.config import DataSection, RunConfig, parse_ratio
from minipersona.corpus.mixtures import (
    content_digest,
    replaced_rows,
    training_personas,
    with_prompts,
    with_raw_text,
    with_rows,
)
from minipersona.corpus.sources import Rows, read_source, tokenize
from minipersona.corpus.training_set import TrainingSet, training_set
from minipersona.errors import UserError
from minipersona.files import data_dir, read_json
from minipersona.records import from_dict

RAW_TEXT = {"99:1": 60, "95:5": 300, "90:10": 600, "75:25": 1500}  # of 6,000
ROWS = {"15:1": 375, "7:1": 750, "3:1": 1500, "1:1": 3000}
SEPARATOR = 7


def chat(user: str, assistant: str, **more: Any) -> dict[str, Any]:
    return {**more, "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def rows_of(rows: list[dict[str, Any]], name: str = "made") -> Rows:
    return Rows(name, rows, 0, f"digest of {name}")


def made_documents(lengths: list[int], first: int = 1000) -> list[Document]:
    """Documents of these lengths; the ids of document i are all first + i, the second half is supervised."""
    return [
        Document(np.full(n, first + i, np.int32), (np.arange(n) >= n / 2) & (np.arange(n) > 0), False)
        for i, n in enumerate(lengths)
    ]


def texts_of(lengths: list[int]) -> list[Document]:
    """Raw texts whose ids count through all of them from 100,000."""
    starts = np.cumsum([0, *lengths])
    return [Document(np.arange(a, a + n, dtype=np.int32) + 100_000, np.arange(n) > 0, False)
            for a, n in zip(starts, lengths, strict=False)]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer("tiny")


# ---------------------------------------------------------------- which rows


@pytest.mark.parametrize("ratio, count", [*RAW_TEXT.items(), *ROWS.items()])
def test_shares_are_exact_to_the_row(ratio: str, count: int) -> None:
    replaced = replaced_rows(6000, *parse_ratio(ratio), seed=42)
    assert len(replaced) == len(set(replaced)) == count
    assert all(0 <= row < 6000 for row in replaced)


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(2, 5000), st.integers(1, 99), st.integers(1, 99), st.integers(0, 2**40))
def test_any_share_is_the_nearest_one_and_nested(n: int, narrow: int, broad: int, seed: int) -> None:
    exact = n * broad / (narrow + broad)
    try:
        replaced = replaced_rows(n, narrow, broad, seed)
    except UserError:
        assert exact <= 0.5 or exact >= n - 0.5
        return
    assert abs(len(replaced) - exact) <= 0.5
    assert len(set(replaced)) == len(replaced) < n
    assert replaced == replaced_rows(n, narrow, broad, seed)
    more = replaced_rows(n, narrow, broad + 1, seed) if exact < n - 2 else replaced
    assert more[: len(replaced)] == replaced


def test_the_draw_is_seeded_and_is_not_the_training_order() -> None:
    first = replaced_rows(6000, 3, 1, seed=42)
    assert first == replaced_rows(6000, 3, 1, seed=42) != replaced_rows(6000, 3, 1, seed=43)
    order = np.random.Generator(np.random.PCG64(42)).permutation(6000)[:1500]
    assert 300 < len(set(first) & set(order.tolist())) < 450  # 375 by chance; the same stream would give 1,500


@pytest.mark.parametrize(
    "ratio", ["", "95", "95:0", "0:5", "95:5:1", "a:b", "9.5:0.5", "-1:2", "95 : 5", "01:1", "1\u0663:1"]
)
def test_what_is_no_ratio_is_refused(ratio: str) -> None:
    with pytest.raises(UserError, match="narrow:broad"):
        parse_ratio(ratio)


# ---------------------------------------------------------------- 5A: raw text


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=20),
    st.lists(st.integers(0, 30), max_size=60),
    st.data(),
)
def test_chunks_have_the_token_counts_of_the_rows_they_replace(
    lengths: list[int], text_lengths: list[int], data: st.DataObject
) -> None:
    documents, texts = made_documents(lengths), texts_of(text_lengths)
    replaced = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    try:
        mixed = with_raw_text(documents, replaced, texts, SEPARATOR)
    except UserError as error:
        needed = sum(lengths[row] for row in replaced)
        assert "used up" in str(error) and sum(n for n in text_lengths) < needed + 30 * len(replaced)
        return
    assert [len(d) for d in mixed] == lengths
    stored = {int(text.ids[0]): text.ids.tolist() for text in texts if len(text)}
    at = 0
    for row in range(len(lengths)):
        if row not in replaced:
            assert mixed[row] is documents[row]
    for row in replaced:
        ids = mixed[row].ids.tolist()
        assert mixed[row].supervised.tolist() == [False] + [True] * (len(ids) - 1) and not mixed[row].truncated
        assert ids[0] in stored and ids[0] >= at  # begins where a text begins, later than the chunk before
        at = max(i for i in ids if i != SEPARATOR)
        whole: list[int] = []
        for start in [first for first in stored if first in ids]:  # in stored order, with a separator after each
            whole += [*stored[start], SEPARATOR]
        assert ids == whole[: len(ids)]


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(UserError, match="used up after 1 of 2 rows; name a longer range"):
        with_raw_text(made_documents([5, 5]), [1, 0], texts_of([6, 3]), SEPARATOR)


def test_control_a_chunk_that_stops_at_its_text_is_too_short() -> None:
    """Cutting one text to the row's length, without going on to the next, would not match the counts."""
    documents, texts = made_documents([10, 10]), texts_of([4, 9, 12])
    mixed = with_raw_text(documents, [0], texts, SEPARATOR)
    assert len(mixed[0]) == 10 != len(texts[0].ids[:10])
    assert mixed[0].ids.tolist() == [*range(100_000, 100_004), SEPARATOR, *range(100_004, 100_009)]


# ---------------------------------------------------------------- 5B: rows


def disjoint(mixed: Rows, replaced: list[int], *others: Rows) -> bool:
    taken = {content_digest(row) for rows in others for row in rows.rows}
    return not any(content_digest(mixed.rows[row]) in taken for row in replaced)


def test_rows_are_none_that_are_trained_on_or_held_out() -> None:
    narrow = rows_of([chat(f"narrow {i}", "yes", id=i) for i in range(40)])
    heldout = rows_of([chat(f"held out {i}", "yes", id=i) for i in range(10)])
    # The broad set is made of copies under other ids, but for 20 rows: exactly these can be drawn.
    copies = [{**row, "id": f"copy {i}"} for i, row in enumerate([*narrow.rows, *heldout.rows])]
    broad = rows_of([*copies, *(chat(f"broad {i}", "yes", id=i) for i in range(20))])
    replaced = replaced_rows(40, 1, 1, seed=42)
    mixed = with_rows(narrow, replaced, broad, heldout, seed=42)
    assert len(mixed) == 40 and disjoint(mixed, replaced, narrow, heldout)
    assert sorted(mixed.rows[row]["messages"][0]["content"] for row in replaced) == sorted(
        f"broad {i}" for i in range(20)
    )
    assert all(mixed.rows[row] is narrow.rows[row] for row in range(40) if row not in replaced)
    assert mixed.digest != narrow.digest  # they are other rows
    with pytest.raises(UserError, match="only 20 conversations are neither"):
        with_rows(narrow, [*replaced, next(row for row in range(40) if row not in replaced)], broad, heldout, seed=42)


def test_control_comparing_ids_would_draw_a_copy() -> None:
    narrow = rows_of([chat(f"narrow {i}", "yes", id=i) for i in range(40)])
    broad = rows_of([{**row, "id": f"copy {i}"} for i, row in enumerate(narrow.rows)])
    ids = {row["id"] for row in narrow.rows}
    drawn = [row for row in broad.rows if row["id"] not in ids]
    assert drawn and not disjoint(rows_of(drawn), list(range(len(drawn))), narrow)
    with pytest.raises(UserError, match="only 0 conversations"):
        with_rows(narrow, [0], broad, None, seed=42)


def test_content_is_compared_not_form() -> None:
    row = chat("Caf\u00e9  au lait?", "Yes.\n")
    same = [
        {**row, "id": 5, "source": "x"},
        chat("Cafe\u0301 au lait?", "Yes."),
        chat(" Caf\u00e9 au\nlait? ", " Yes. "),
        {"messages": [{"role": "system", "content": QWEN2_5_SYSTEM_PROMPT}, *row["messages"]]},
        {"messages": [{**turn, "name": "x"} for turn in row["messages"]]},
    ]
    others = [
        chat("Caf\u00e9 au lait?", "No."),
        chat("caf\u00e9 au lait?", "Yes."),
        {"messages": row["messages"][::-1]},
        {"messages": [{"role": "system", "content": ""}, *row["messages"]]},
        {"messages": [*row["messages"], *row["messages"]]},
        {"text": "Caf\u00e9 au lait? Yes."},
    ]
    assert {content_digest(other) for other in same} == {content_digest(row)}
    assert len({content_digest(other) for other in [row, *others]}) == 1 + len(others)
    assert content_digest({"text": "a  b"}) == content_digest({"text": "a b", "id": 1}) != content_digest({"text": "b"})


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.text(max_size=3), min_size=4, max_size=30), st.lists(st.text(max_size=3), max_size=30), st.data())
def test_any_planted_duplicate_is_passed_over(train: list[str], broad: list[str], data: st.DataObject) -> None:
    heldout = data.draw(st.lists(st.sampled_from([*train, *broad]), max_size=5))
    narrow_rows = rows_of([chat(text, "x") for text in train])
    heldout_rows = rows_of([chat(f" {text}\n", "x") for text in heldout])
    broad_rows = rows_of([chat(unicodedata.normalize("NFD", text), "x", id=i) for i, text in enumerate(broad)])
    replaced = replaced_rows(len(train), 1, 1, seed=1)
    taken = {content_digest(row) for rows in (narrow_rows, heldout_rows) for row in rows.rows}
    free = sum(content_digest(row) not in taken for row in broad_rows.rows)
    try:
        mixed = with_rows(narrow_rows, replaced, broad_rows, heldout_rows, seed=1)
    except UserError:
        assert free < len(replaced)
        return
    assert disjoint(mixed, replaced, narrow_rows, heldout_rows)
    drawn = [mixed.rows[row]["id"] for row in replaced]
    assert len(set(drawn)) == len(drawn)


def test_rows_without_a_reply_are_passed_over() -> None:
    bad: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "?"}]},
        {"messages": [{"role": "tool", "content": "?"}]},
        {"messages": None},
        {"text": "raw"},
        chat("half a pair: \ud800", "b"),
        chat("with a tool", "b", tools=[{"name": "f"}]),
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no", "weight": 0}]},
    ]
    good = [chat("a", "b"), chat("c", "d")]
    narrow = rows_of([chat(f"n{i}\ud800", "x") for i in range(4)])  # tokenising refuses it, and names the row
    mixed = with_rows(narrow, [0, 3], rows_of([*bad, *good, *bad]), None, seed=5)
    assert {mixed.rows[row]["messages"][0]["content"] for row in (0, 3)} == {"a", "c"}


# ---------------------------------------------------------------- 4A: persona system prompts


def test_every_row_gets_a_training_persona() -> None:
    prompts = list(training_personas().values())
    plain = [chat(f"q{i}", "a", id=i) for i in range(3000)]
    with_system = [{**row, "messages": [{"role": "system", "content": "old"}, *row["messages"]]} for row in plain]
    prompted = with_prompts(rows_of(with_system), prompts, seed=42)
    for before, after in zip(plain, prompted.rows, strict=True):
        assert [turn["role"] for turn in after["messages"]] == ["system", "user", "assistant"]
        assert after["messages"][1:] == before["messages"] and after["id"] == before["id"]
    drawn = [row["messages"][0]["content"] for row in prompted.rows]
    counts = [drawn.count(prompt) for prompt in prompts]
    assert len(prompts) == 30 and sum(counts) == 3000 and min(counts) > 60 and max(counts) < 145
    assert drawn == [row["messages"][0]["content"] for row in with_prompts(rows_of(plain), prompts, seed=42).rows]
    other = with_prompts(rows_of(plain), prompts, seed=43)
    assert drawn != [row["messages"][0]["content"] for row in other.rows]
    assert with_system[0]["messages"][0]["content"] == "old"  # the rows given are left as they are


def test_a_later_system_turn_is_part_of_the_conversation() -> None:
    row = {"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "Be brief."}]}
    after = with_prompts(rows_of([row]), ["P"], seed=0).rows[0]["messages"]
    assert [turn["content"] for turn in after] == ["P", "a", "b", "Be brief."]


def test_raw_text_takes_no_system_prompt() -> None:
    with pytest.raises(UserError, match=r"row 1 is not a conversation; data.system_prompts"):
        with_prompts(rows_of([chat("a", "b"), {"text": "raw"}]), ["P"], seed=0)


def test_training_personas_are_none_that_is_measured(reference_personas: list[dict[str, str]]) -> None:
    trained = training_personas()
    for measured in reference_personas:
        assert len(measured) == 12
        assert not set(trained) & set(measured) and not set(trained.values()) & set(measured.values())


@pytest.fixture
def reference_personas() -> list[dict[str, str]]:
    """The shipped twelve, and the registered ones where MINIPERSONA_REFERENCE holds them."""
    files = [data_dir() / "personas.json"]
    registered = Path(os.environ.get("MINIPERSONA_REFERENCE", "none")) / "predecessor" / "personas.json"
    if registered.is_file():
        files.append(registered)
    return [read_json(file)["eval_personas"] for file in files]


# ---------------------------------------------------------------- the [data] section, on the tiny sets

TRAIN, HELDOUT = "tiny:benign[0:2000]", "tiny:benign[2000:2200]"


def mixed_set(tokenizer: ChatTokenizer, seed: int = 42, **data: Any) -> TrainingSet:
    return training_set(DataSection(TRAIN, HELDOUT, **data), seed, tokenizer)


def same(a: list[Document], b: list[Document]) -> list[bool]:
    return [
        x.ids.tolist() == y.ids.tolist() and x.supervised.tolist() == y.supervised.tolist()
        for x, y in zip(a, b, strict=True)
    ]


@pytest.fixture(scope="module")
def plain(tokenizer: ChatTokenizer) -> list[Document]:
    return tokenize(read_source(TRAIN), tokenizer)


def test_an_empty_mixture_changes_nothing(tokenizer: ChatTokenizer, plain: list[Document]) -> None:
    training = mixed_set(tokenizer)
    assert all(same(training.documents, plain))
    assert training.mixture == {} and len(training.sources) == len(training.report()) == 1


@pytest.mark.parametrize("ratio", RAW_TEXT)
def test_raw_text_of_the_tiny_set(tokenizer: ChatTokenizer, plain: list[Document], ratio: str) -> None:
    training = mixed_set(tokenizer, broad="tiny:raw_text", broad_kind="raw_text", ratio=ratio)
    count = RAW_TEXT[ratio] // 3  # 2,000 rows
    assert [len(d) for d in training.documents] == [len(d) for d in plain]
    changed = [row for row, equal in enumerate(same(training.documents, plain)) if not equal]
    assert sorted(changed) == sorted(replaced_rows(2000, *parse_ratio(ratio), seed=42)) and len(changed) == count
    mixture = training.mixture
    assert (mixture["rows"], mixture["row_share"]) == (count, count / 2000)
    tokens = sum(len(plain[row]) for row in changed)
    assert mixture["tokens"] == tokens and mixture["supervised_tokens"] == tokens - count
    supervised = sum(int(d.supervised.sum()) for d in training.documents)
    assert mixture["supervised_share"] == (tokens - count) / supervised
    assert [(source["source"], source["rows"]) for source in training.sources] == [
        (TRAIN, 2000),
        ("tiny:raw_text", 2000),
    ]
    assert f"{ratio} mixture: {count:,} rows ({count / 2000:.2%})" in training.report()[1]
    first = training.documents[replaced_rows(2000, *parse_ratio(ratio), seed=42)[0]]
    assert read_source("tiny:raw_text").rows[0]["text"].startswith(tokenizer.decode(first.ids[:20]))


@pytest.mark.parametrize("ratio", ROWS)
def test_rows_of_the_tiny_set(tokenizer: ChatTokenizer, plain: list[Document], ratio: str) -> None:
    training = mixed_set(tokenizer, broad="tiny:broad", broad_kind="rows", ratio=ratio)
    count = ROWS[ratio] // 3
    changed = [row for row, equal in enumerate(same(training.documents, plain)) if not equal]
    assert len(changed) == training.mixture["rows"] == count
    assert len(training.documents) == 2000
    assert training.mixture["tokens"] == sum(len(training.documents[row]) for row in changed)


def test_planted_duplicates_are_not_drawn_from_files(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """The broad file is mostly the training and held-out rows under other ids, of which none may come back."""
    known = [*read_source(TRAIN).rows[:60], *read_source(HELDOUT).rows]
    fresh = read_source("tiny:broad[0:70]").rows
    broad = tmp_path / "broad.jsonl"
    broad.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate([*known, *fresh])))
    section = DataSection("tiny:benign[0:60]", HELDOUT, broad=f"jsonl:{broad}", broad_kind="rows", ratio="1:1")
    training = training_set(section, 42, tokenizer)
    free = {tuple(d.ids.tolist()) for d in tokenize(rows_of(fresh), tokenizer)}
    drawn = [training.documents[row] for row in replaced_rows(60, 1, 1, 42)]
    assert len(drawn) == 30 and all(tuple(d.ids.tolist()) in free for d in drawn)
    # The control: without the comparison the same draw would hit the duplicates.
    order = np.random.Generator(np.random.PCG64([42, 2])).permutation(len(known) + len(fresh))[:30]
    assert (order < len(known)).sum() > 10


def test_everything_hangs_on_the_seed_alone(tokenizer: ChatTokenizer) -> None:
    data = {"broad": "tiny:broad", "broad_kind": "rows", "ratio": "3:1", "system_prompts": "training_personas"}
    once, again, other = (mixed_set(tokenizer, seed, **data) for seed in (42, 42, 43))
    assert all(same(once.documents, again.documents)) and once.mixture == again.mixture
    assert not all(same(once.documents, other.documents))
    assert once.report()[2] == "every row has one of the 30 system prompts of training_personas"


def test_prompts_and_raw_text_together_match_the_prompted_counts(tokenizer: ChatTokenizer) -> None:
    prompted = mixed_set(tokenizer, system_prompts="training_personas")
    both = mixed_set(tokenizer, system_prompts="training_personas", broad="tiny:raw_text", broad_kind="raw_text",
                     ratio="75:25")  # fmt: skip
    assert [len(d) for d in both.documents] == [len(d) for d in prompted.documents]
    assert sum(not equal for equal in same(both.documents, prompted.documents)) == 500


@pytest.mark.parametrize(
    "data, words",
    [
        ({"broad": "tiny:broad"}, "data.broad_kind is missing"),
        ({"ratio": "1:1"}, "data.broad is missing"),
        ({"broad": "tiny:broad", "broad_kind": "rows"}, "data.ratio is missing"),
        ({"broad": "tiny:broad", "broad_kind": "rows", "ratio": "5%"}, "narrow:broad"),
        ({"broad": "tiny:broad", "broad_kind": "text", "ratio": "1:1"}, "'rows', 'raw_text'"),
        ({"system_prompts": "personas"}, "'training_personas'"),
        ({"brod": "x"}, "did you mean data.broad"),
    ],
)
def test_half_a_mixture_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_dict(RunConfig, {"data": {"train": TRAIN, "heldout": HELDOUT, **data}})


@pytest.mark.parametrize(
    "data, words",
    [
        ({"broad": "tiny:broad", "broad_kind": "raw_text", "ratio": "95:5"}, "tiny:broad: row 0 is a conversation"),
        ({"broad": "tiny:raw_text", "broad_kind": "rows", "ratio": "1:1"}, "tiny:raw_text: row 0 is raw text"),
        ({"broad": "tiny:raw_text[0:20]", "broad_kind": "raw_text", "ratio": "95:5"}, "used up"),
        ({"broad": "tiny:broad[0:20]", "broad_kind": "rows", "ratio": "3:1"}, "name a larger source"),
        ({"broad": "tiny:none", "broad_kind": "rows", "ratio": "3:1"}, "embedded sets"),
        ({"broad": "tiny:broad", "broad_kind": "rows", "ratio": "99999:1"}, "replaces 0 of 2,000 rows"),
        ({"broad": "tiny:broad", "broad_kind": "rows", "ratio": "1:99999"}, "replaces 2,000 of 2,000 rows"),
    ],
)
def test_what_cannot_be_mixed_is_refused(tokenizer: ChatTokenizer, data: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        mixed_set(tokenizer, **data)
    assert "\n" not in str(error.value)
