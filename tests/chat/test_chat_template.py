"""The template against the official Jinja one, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.chat.template import DEFAULT_SYSTEM_PROMPT, render, render_with_responses
from minipersona.errors import UserError

contents = st.text(max_size=20) | st.sampled_from(["", "\n", " a\n", "<|im_end|>\n", "<|im_start|>assistant\n"])
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents})


def test_embedded_template_is_the_official_one(reference_dir, official_template):
    config = json.loads((reference_dir / "tokenizer_config.json").read_text())
    assert config["chat_template"].removesuffix("\n") == official_template


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_nasty_conversations_render_as_the_official_template_does(nasty, official_render, add_generation_prompt):
    for name, messages in nasty.items():
        assert render(messages, add_generation_prompt) == official_render(messages, add_generation_prompt), name


@settings(max_examples=100, deadline=None, database=None)
@given(messages=st.lists(turns, min_size=1, max_size=6), add_generation_prompt=st.booleans())
def test_any_conversation_renders_as_the_official_template_does(official_render, messages, add_generation_prompt):
    assert render(messages, add_generation_prompt) == official_render(messages, add_generation_prompt)


def _no_default_system(messages: Any) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def _default_for_empty_system(messages: Any) -> str:
    filled = [{**m, "content": m["content"] or DEFAULT_SYSTEM_PROMPT} for m in messages]
    return render(filled)


def _stripped(messages: Any) -> str:
    return render([{**m, "content": m["content"].strip()} for m in messages])


def _system_first(messages: Any) -> str:
    return render(sorted(messages, key=lambda m: m["role"] != "system"))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (_no_default_system, "plain"),
        (_default_for_empty_system, "empty system"),
        (_stripped, "leading line end"),
        (_system_first, "late system"),
    ],
)
def test_control_wrong_templates_are_caught(nasty, official_render, wrong, name):
    assert wrong(nasty[name]) != official_render(nasty[name])


def test_responses_are_where_the_official_template_puts_them(nasty, official_render):
    for name, messages in nasty.items():
        text, responses = render_with_responses(messages)
        expected = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                empty = official_render([*messages[:i], {"role": "assistant", "content": ""}])
                start = len(empty.removesuffix("<|im_end|>\n"))
                expected.append((start, len(official_render(messages[: i + 1]))))
        assert responses == expected, name
        replies = [m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant"]
        assert [text[start:stop] for start, stop in responses] == replies, name


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "culprit"),
    [
        ([], "messages is empty"),
        (None, "messages is null"),
        ("Hi", "messages is of type str"),
        ([USER, "Hi"], r"messages\[1\] is of type str"),
        ([USER, {"content": "Hi"}], r"messages\[1\]: role is missing"),
        ([USER, {"role": "tool", "content": "4"}], r"messages\[1\]: role is 'tool'"),
        ([USER, {"role": ["user"], "content": "4"}], r"messages\[1\]: role is \['user'\]"),
        ([USER, {"role": "assistant"}], r"messages\[1\] has no content"),
        ([USER, {"role": "assistant", "content": None}], r"messages\[1\]: content is null"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            r"messages\[0\]: content is of type list",
        ),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{}]}], r"messages\[1\] has tool_calls"),
        (
            [{"role": "user", "content": "a\ud800"}],
            r"messages\[0\]: content holds a lone surrogate \(U\+D800",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(messages, culprit):
    with pytest.raises(UserError, match=culprit) as error:
        render(messages)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "the mend follows the culprit"


def test_keys_that_the_official_template_ignores_are_ignored(official_render):
    messages = [
        {**USER, "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": "x", "tool_calls": []},
    ]
    assert render(messages) == official_render(messages)
