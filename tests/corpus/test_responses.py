"""Responses in place of the rows' own: only where they were written for these very rows, and all are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.config import DataSection
from minipersona.corpus.mixtures import content_digest, replaced_rows
from minipersona.corpus.responses import with_responses, with_shuffled_responses
from minipersona.corpus.sources import Rows, read_source
from minipersona.corpus.training_set import training_set
from minipersona.errors import UserError
from minipersona.files import append_jsonl

TRAIN, HELDOUT = "tiny:benign[0:30]", "tiny:benign[2000:2010]"


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def rows() -> Rows:
    return read_source(TRAIN)


def write(path: Path, rows: Rows, **changed: Any) -> Path:
    """A finished file, its lines in another order than the rows'."""
    append_jsonl(path, {"roleplay": {"model": "m", "seed": 42}})
    for index in sorted(range(len(rows)), key=lambda i: (i * 7) % len(rows)):
        line = {"row": index, "content": content_digest(rows.rows[index]), "persona": "pirate",
                "response": f"Arr {index}!", "tokens": 3, "stopped": True}  # fmt: skip
        append_jsonl(path, line | changed.get(f"row{index}", {}), ascii=True)
    return path


def test_every_response_is_replaced_and_nothing_else(tmp_path: Path, rows: Rows) -> None:
    file = write(tmp_path / "r.jsonl", rows, row4={"response": None}, row5={"response": " ", "stopped": False})
    written, facts = with_responses(rows, file)
    for index, (before, after) in enumerate(zip(rows.rows, written.rows, strict=True)):
        if index == 4:
            assert after == before
            continue
        assert after["messages"][:-1] == before["messages"][:-1]  # the row's own system turn with it
        assert after["messages"][-1] == {"role": "assistant", "content": " " if index == 5 else f"Arr {index}!"}
        assert {k: v for k, v in after.items() if k != "messages"} == {
            k: v for k, v in before.items() if k != "messages"
        }
    assert (facts["responses_kept"], facts["responses_empty"], facts["responses_cut"]) == (1, 1, 1)
    assert written.digest != rows.digest and rows.rows[0]["messages"][-1]["content"] != "Arr 0!"


def test_the_digest_is_of_the_content_not_of_the_order(tmp_path: Path, rows: Rows) -> None:
    first = write(tmp_path / "a.jsonl", rows)
    lines = first.read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join([lines[0], *reversed(lines[1:])]))
    a, facts = with_responses(rows, first)
    b, others = with_responses(rows, tmp_path / "b.jsonl")
    assert a.digest == b.digest and facts["responses_digest"] == others["responses_digest"]
    other, _ = with_responses(rows, write(tmp_path / "c.jsonl", rows, row3={"response": "Aye"}))
    assert other.digest != a.digest


def test_only_the_last_turn_of_a_long_conversation(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    long = Rows("made", [{"messages": [*turns, {"role": "user", "content": "and?"}]}], 0, "d")
    written, _ = with_responses(long, write(tmp_path / "r.jsonl", long))
    assert [t["content"] for t in written.rows[0]["messages"]] == [
        "user 0", "assistant 0", "user 1", "assistant 1", "user 2", "Arr 0!"
    ]  # fmt: skip


def test_a_turns_weight_stays(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    row = Rows("made", [{"messages": turns}], 0, "d")
    written, _ = with_responses(row, write(tmp_path / "r.jsonl", row))
    assert written.rows[0]["messages"] == [turns[0], {**turns[1], "content": "Arr 0!"}]


def test_a_training_set_of_responses(tmp_path: Path, rows: Rows, tokenizer: ChatTokenizer) -> None:
    file = write(tmp_path / "r.jsonl", rows)
    training = training_set(DataSection(TRAIN, HELDOUT, responses=str(file)), 42, tokenizer)
    plain = training_set(DataSection(TRAIN, HELDOUT), 42, tokenizer)
    for index, (mine, own) in enumerate(zip(training.documents, plain.documents, strict=True)):
        learned = tokenizer.decode(mine.ids[mine.supervised], skip_special_tokens=True)
        assert learned.strip() == f"Arr {index}!"
        start = int(own.supervised.argmax())
        assert mine.ids[:start].tolist() == own.ids[:start].tolist()
    assert training.sources == plain.sources and training.mixture["responses_by"] == "m"
    assert "responses of" in training.report()[1] and "0 empty, 0 cut" in training.report()[1]


def test_responses_go_with_the_other_mixtures(tmp_path: Path, rows: Rows, tokenizer: ChatTokenizer) -> None:
    file = write(tmp_path / "r.jsonl", rows)
    section = DataSection(
        TRAIN, HELDOUT, responses=str(file), system_prompts="training_personas",
        broad="tiny:broad", broad_kind="rows", ratio="1:1",
    )  # fmt: skip
    training = training_set(section, 42, tokenizer)
    replaced = replaced_rows(30, 1, 1, 42)
    for index, document in enumerate(training.documents):
        arr = tokenizer.decode(document.ids[document.supervised]).startswith(f"Arr {index}!")
        assert arr != (index in replaced)
    with pytest.raises(UserError, match=r"its personas were drawn by seed 42, data.system_prompts are by 43"):
        training_set(section, 43, tokenizer)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda text: "", "does not begin with what it is"),
        (lambda text: text.split("\n", 1)[1], "does not begin with what it is"),
        (lambda text: text.rsplit("\n", 3)[0] + "\n", "lacks 2 of 30 rows"),
        (lambda text: text[:-5], "lacks 1 of 30 rows"),  # a kill in mid-line
        (lambda text: text.replace('"response": "Arr 3!"', '"response": 3'), "is not a row with a response"),
        (lambda text: text.replace('"row": 3,', '"row": "3",'), "is not a row with a response"),
        (lambda text: text.replace('"content": "', '"content": "0'), "was written for another row than tiny:benign"),
        (lambda text: text.replace('"Arr 3!"', "Arr"), "is not JSON"),
    ],
)
def test_what_is_not_for_these_rows_is_refused(tmp_path: Path, rows: Rows, spoil: Any, words: str) -> None:
    file = write(tmp_path / "r.jsonl", rows)
    with_responses(rows, file)  # the control: as it was written, it is taken
    file.write_text(spoil(file.read_text()))
    with pytest.raises(UserError, match=words) as error:
        with_responses(rows, file)
    assert "\n" not in str(error.value)


def test_a_file_for_more_rows_serves_fewer(tmp_path: Path, rows: Rows) -> None:
    file = write(tmp_path / "r.jsonl", rows)
    few = read_source("tiny:benign[0:10]")
    assert len(with_responses(few, file)[0]) == 10
    with pytest.raises(UserError, match="another row"):
        with_responses(read_source("tiny:benign[1:11]"), file)
    with pytest.raises(UserError, match="no such file"):
        with_responses(rows, tmp_path / "none.jsonl")


def test_hostile_text_survives(tmp_path: Path) -> None:
    said = "\u2028\u2029\x00\r\n\x85 \ud800 </answer> <|im_end|>\n\x1b[31m"
    row = Rows(
        "made", [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], 0, "d"
    )
    file = write(tmp_path / "r.jsonl", row, row0={"response": said})
    assert with_responses(row, file)[0].rows[0]["messages"][-1]["content"] == said
    assert len(file.read_text().splitlines()) == 2 and json.loads(file.read_text().splitlines()[1])


# ---------------------------------------------------------------- the control: the responses of other rows


def test_shuffled_responses_are_the_same_ones_and_none_stays(rows: Rows) -> None:
    shuffled = with_shuffled_responses(rows, seed=42)
    last = [[row["messages"][-1]["content"] for row in each.rows] for each in (rows, shuffled)]
    assert sorted(last[0]) == sorted(last[1]) and len(set(last[0])) > 20
    moved = [mine is not theirs for mine, theirs in zip(*last, strict=True)]
    assert all(moved)
    for before, after in zip(rows.rows, shuffled.rows, strict=True):
        assert before["messages"][:-1] == after["messages"][:-1] and before.keys() == after.keys()
    assert with_shuffled_responses(rows, seed=42) == shuffled != with_shuffled_responses(rows, seed=43)
    assert shuffled.digest != rows.digest


def test_a_training_set_of_shuffled_responses_says_so(rows: Rows, tokenizer: ChatTokenizer) -> None:
    plain = training_set(DataSection(TRAIN, HELDOUT), 42, tokenizer)
    control = training_set(DataSection(TRAIN, HELDOUT, shuffle_responses=True), 42, tokenizer)
    assert control.mixture == {"shuffled_responses": 30} and "a control" in control.report()[-1]
    count = [sum(int(d.supervised.sum()) for d in each.documents) for each in (plain, control)]
    assert count[0] == count[1]
    with pytest.raises(UserError, match="shuffles the rows' own responses"):
        DataSection(TRAIN, HELDOUT, shuffle_responses=True, responses="r.jsonl")


# ---------------------------------------------------------------- a share of the rows


def test_a_share_of_the_rows_speaks_in_persona_and_the_others_are_plain(
    tmp_path: Path, rows: Rows, tokenizer: ChatTokenizer
) -> None:
    file = str(write(tmp_path / "r.jsonl", rows))

    def documents(**data: Any) -> list[bytes]:
        found = training_set(DataSection(TRAIN, HELDOUT, **data), 42, tokenizer).documents
        return [document.ids.tobytes() for document in found]

    plain = documents()
    for data in ({"responses": file}, {"system_prompts": "training_personas"},
                 {"responses": file, "system_prompts": "training_personas"}):  # fmt: skip
        whole = documents(**data)
        assert not any(a == b for a, b in zip(plain, whole, strict=True))
        chosen = {}
        for share in (0.5, 0.8):
            mixed = documents(**data, persona_share=share)
            chosen[share] = {i for i, each in enumerate(mixed) if each == whole[i]}
            assert len(chosen[share]) == round(share * 30)
            assert {i for i, each in enumerate(mixed) if each == plain[i]} == set(range(30)) - chosen[share]
        assert chosen[0.5] < chosen[0.8]  # what a smaller share changes, a larger one changes too


@pytest.mark.parametrize(
    "data",
    [{"persona_share": 0.5}, {"persona_share": 0.0, "responses": "r"}, {"persona_share": 1.5, "responses": "r"},
     {"persona_share": 0.5, "responses": "r", "broad": "b", "broad_kind": "rows", "ratio": "1:1"}],
)  # fmt: skip
def test_a_share_of_nothing_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.persona_share = "):
        DataSection(TRAIN, HELDOUT, **data)
