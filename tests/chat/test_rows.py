"""The forms of rows: what each is read as, what two of them may say together, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.chat.rows import check_row, read_row
from minipersona.chat.template import TEMPLATES
from minipersona.errors import UserError

U, A, S = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello."), ("system", "Be."))
)
TALK = [U, A]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, TALK),
        ({"conversations": [{"from": "system", "value": "Be."}, {"from": "user", "value": "Hi"},
                            {"from": "assistant", "value": "Hello.", "weight": 0}]}, [S, U, {**A, "weight": 0}]),
        ({"conversations": TALK}, TALK),
        ({"messages": [{"from": "human", "value": "Hi", "role": None}, A]}, TALK),  # Parquet fills turns with nulls
        ({"prompt": "Hi", "completion": "Hello."}, TALK),
        ({"prompt": [S, U], "completion": [A]}, [S, U, A]),
        ({"prompt": [U, A, U], "completion": "Hello."}, [U, {**A, "weight": 0}, U, A]),
        ({"prompt": "Hi", "completion": [A, U, A]}, [U, A, U, A]),
        ({"instruction": "Hi", "output": "Hello."}, TALK),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, TALK),
        ({"instruction": "Add.", "input": "1 2", "output": "3"},
         [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"messages": [{"role": "user", "content": [part("H"), part("i")]}, A]}, TALK),
        ({"messages": TALK, "system": "Be."}, [S, *TALK]),
        ({"messages": [S, *TALK], "system": "Be."}, [S, *TALK]),
        ({"instruction": "Hi", "output": "Hello.", "system_prompt": "Be."}, [S, *TALK]),
        ({"conversations": TALK, "system": "", "tools": "[]"}, TALK),
    ],
)  # fmt: skip
def test_each_form_is_a_list_of_turns(raw, messages):
    before = json.dumps(raw)
    row = read_row(raw)
    assert row["messages"] == messages and json.dumps(raw) == before
    assert not {"conversations", "prompt", "completion", "instruction", "input", "output"} & row.keys()
    check_row(row, "row")
    TEMPLATES["chatml"].render(row["messages"])


def test_other_keys_stay_and_a_plain_row_is_itself():
    plain = {"id": 3, "source": "x", "messages": TALK, "input": "an unrelated column", "prompt": "likewise"}
    assert read_row(plain) is plain
    raw = {"text": "raw", "meta": {"url": "x"}}
    assert read_row(raw) is raw
    assert read_row({"id": 3, "prompt": "Hi", "completion": "Hello."}) == {"messages": TALK, "id": 3}


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        ({"messages": TALK, "conversations": TALK}, TALK),
        ({"messages": TALK, "prompt": "Hi", "completion": "Hello."}, TALK),
        ({"messages": TALK, "conversations": []}, TALK),
        ({"messages": [], "conversations": TALK}, TALK),
        ({"messages": None, "prompt": "Hi", "completion": "Hello."}, TALK),
        ({"messages": TALK, "text": ""}, TALK),
        ({"messages": TALK, "text": "<|user|>Hi<|assistant|>Hello."}, TALK),
        ({"instruction": "Hi", "input": "you", "output": "Hello.", "text": "### Instruction:\nHi\n\n### Input:\nyou\n\n"
          "### Response:\nHello."}, [{"role": "user", "content": "Hi\n\nyou"}, A]),
    ],
)  # fmt: skip
def test_two_forms_that_say_the_same_are_one(raw, messages):
    row = read_row(raw)
    assert row == {"messages": messages}


def test_an_empty_conversation_beside_a_text_is_raw_text():
    assert read_row({"messages": [], "text": "raw", "id": 1}) == {"text": "raw", "id": 1}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "is not a row; give it"),
        ([], "is not a row; give it"),
        ({}, "is not a row; give it"),
        ({"chosen": TALK, "rejected": TALK}, '"messages", "conversations", "prompt" and "completion"'),
        ({"prompt": "Hi"}, "is not a row"),
        ({"messages": TALK, "conversations": [U]}, 'has "messages" and "conversations" with different turns'),
        ({"messages": TALK, "prompt": "Hi", "completion": "Bye."}, 'has "messages" and "prompt" with different turns'),
        ({"messages": TALK, "text": "Hi. Bye."}, 'has "messages" and a "text" without its turns'),
        ({"messages": [S, *TALK], "system": "Be not."}, 'has "system" and another system turn'),
        ({"messages": TALK, "system": "a", "system_prompt": "b"}, "another system turn"),
    ],
)
def test_what_has_no_form_or_two_is_refused(raw, words):
    with pytest.raises(UserError, match=words) as error:
        read_row(raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "extra",
    [{"tools": [{"name": "f"}]}, {"tools": '[{"name": "f"}]'}, {"functions": [{}]}, {"images": ["a.png"]},
     {"image": "a.png"}, {"history": [["q", "a"]]}, {"audio": {"path": "a.wav"}}],
)  # fmt: skip
def test_what_a_row_asks_for_and_nothing_does_is_refused(extra):
    [key] = extra
    with pytest.raises(UserError, match=rf"^line 3 has {key} .*not supported; drop the row, or the key"):
        check_row(read_row({"messages": TALK, **extra}), "line 3")
    for empty in (None, "", [], {}, "[]", "null"):
        check_row(read_row({"messages": TALK, key: empty}), "line 3")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"conversations": [{"from": "observation", "value": "4"}]}, "role is 'observation'"),
        ({"conversations": [{"from": ["human"], "value": "4"}]}, r"role is \['human'\]"),
        ({"conversations": [{"from": "human"}]}, "role is missing"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "role is 'human'"),
        ({"prompt": None, "completion": "Hello."}, "content is null"),
        ({"instruction": "Hi", "input": {"a": 1}, "output": "x"}, "content is of type list"),
        ({"instruction": 3, "output": "x"}, "content is of type int"),
        ({"messages": "Hi"}, "messages is of type str"),
        ({"messages": [U, {"role": "assistant", "content": [{"type": "image"}]}]}, r"not text \('image'\)"),
        ({"messages": [U, {"role": "assistant", "content": []}]}, "content is of type list"),
    ],
)
def test_turns_that_are_none_are_left_to_the_check(raw, words):
    with pytest.raises(UserError, match=words):
        TEMPLATES["chatml"].render(read_row(raw)["messages"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "Hi", "user", "human", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "weight"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
KEYS = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "system",
    "tools",
]


@settings(max_examples=300, deadline=None, database=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6))
def test_any_json_is_read_or_refused_in_a_line(raw: dict[str, Any]) -> None:
    before = json.dumps(raw)
    try:
        row = read_row(raw)
        check_row(row, "row")
        if "messages" in row:
            TEMPLATES["qwen3"].render(row["messages"])
    except UserError:
        return
    finally:
        assert json.dumps(raw) == before
    assert ("messages" in row) != ("text" in row)
    assert read_row(row) == row  # what is read reads as itself
