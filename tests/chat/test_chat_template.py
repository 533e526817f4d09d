"""The templates against the official Jinja ones, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.chat.template import DIGESTS, QWEN2_5_SYSTEM_PROMPT, TEMPLATES, template_digest, template_of
from minipersona.errors import UserError

render = TEMPLATES["chatml-qwen2.5"].render

MARKERS = ("<|im_end|>\n", "<|im_start|>assistant\n", "<|eot_id|>", "<tool_response>", "</tool_response>")
THOUGHTS = ("<think>", "</think>", "a</think>\n\n\nb", "<think>\na\n</think>\n\nb", "<tool_response>a</tool_response>")
contents = st.text(max_size=20) | st.sampled_from(["", "\n", " a\n", *MARKERS, *THOUGHTS])
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents})


def test_embedded_template_is_the_official_one(reference_dir, official_template):
    config = json.loads((reference_dir / "tokenizer_config.json").read_text())
    assert config["chat_template"] == official_template


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_nasty_conversations_render_as_the_official_template_does(nasty, family, add_generation_prompt):
    for name, messages in nasty.items():
        assert family.ours.render(messages, add_generation_prompt) == family.theirs(messages, add_generation_prompt), (
            name
        )


@settings(max_examples=100, deadline=None, database=None)
@given(messages=st.lists(turns, min_size=1, max_size=6), add_generation_prompt=st.booleans())
def test_any_conversation_renders_as_the_official_template_does(family, messages, add_generation_prompt):
    assert family.ours.render(messages, add_generation_prompt) == family.theirs(messages, add_generation_prompt)


def test_control_no_template_renders_as_another_family_does(nasty, family):
    for template in TEMPLATES.values():
        same = all(template.render(messages, True) == family.theirs(messages, True) for messages in nasty.values())
        assert same == (template is family.ours), template.name


def _no_default_system(messages: Any) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def _default_for_empty_system(messages: Any) -> str:
    filled = [{**m, "content": m["content"] or QWEN2_5_SYSTEM_PROMPT} for m in messages]
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
        text, responses = TEMPLATES["chatml-qwen2.5"].render_with_responses(messages)
        expected = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                empty = official_render([*messages[:i], {"role": "assistant", "content": ""}])
                start = len(empty.removesuffix("<|im_end|>\n"))
                expected.append((start, len(official_render(messages[: i + 1]))))
        assert responses == expected, name
        replies = [m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant"]
        assert [text[start:stop] for start, stop in responses] == replies, name


def test_the_last_response_follows_the_generation_prompt(nasty, family):
    """What is learned stands where the model is asked to go on, and goes on to the end of the turn."""
    for name, messages in nasty.items():
        if len(messages) == 1 or (messages[-1]["role"], messages[-2]["role"] == "assistant") != ("assistant", False):
            continue  # Qwen3 writes a reply before a reply otherwise than it writes a last one
        if name == "only a tool's answer":
            continue  # Qwen3 sees no question in it
        text, responses = family.ours.render_with_responses(messages)
        start, stop = responses[-1]
        prompt = family.theirs(messages[:-1], True)
        if text[start:].startswith("<think>"):  # thoughts of its own: they are learned, in place of the empty block
            prompt = prompt.removesuffix("<think>\n\n</think>\n\n")
        assert text[:start] == prompt and stop == len(text), name
        end = family.ours.stop[0]
        assert text[start:stop].rstrip("\n").endswith(end), name


# ---------------------------------------------------------------- Llama 3, written by hand

BEGIN = "<|begin_of_text|>"
DATED = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
TALK = [
    {"role": "user", "content": "  Hi\n"},
    {"role": "assistant", "content": "\n\nHello. "},
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ""},
]
TALKED = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>"
)
PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
PIRATE = {"role": "system", "content": " You are a pirate.\n"}
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nYou are a pirate.<|eot_id|>"


def test_llama_3_by_hand():
    llama = TEMPLATES["llama3"]
    assert llama.render(TALK) == BEGIN + TALKED
    assert llama.render([PIRATE, *TALK], True) == BEGIN + SYSTEM + TALKED + PROMPT


def test_llama_3_1_by_hand():
    llama = TEMPLATES["llama3.1"]
    assert llama.render(TALK) == BEGIN + DATED + "<|eot_id|>" + TALKED
    assert llama.render([PIRATE, *TALK], True) == BEGIN + DATED + "You are a pirate.<|eot_id|>" + TALKED + PROMPT
    text, [(start, stop)] = llama.render_with_responses(TALK)
    assert text[start:stop] == "Hello.<|eot_id|>" and text[:start].endswith(PROMPT)


# ---------------------------------------------------------------- which template


def test_every_official_template_is_known_by_its_digest(family):
    assert family.ours is TEMPLATES[DIGESTS[template_digest(family.jinja)]]


def test_a_line_end_at_the_end_is_none_of_the_template(family):
    assert (
        template_of(family.jinja.removesuffix("\n"))
        is template_of(family.jinja.removesuffix("\n") + "\n")
        is family.ours
    )
    assert template_of(family.jinja + " ") is template_of(family.jinja[1:]) is None  # the control


def test_every_known_digest_is_that_of_a_template():
    assert set(DIGESTS.values()) == set(TEMPLATES) and all(len(digest) == 64 for digest in DIGESTS)


# ---------------------------------------------------------------- what is refused

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
        ([USER, {"role": "assistant", "content": "", "function_call": {"name": "f"}}], "has function_call"),
        ([USER, {"role": "assistant", "content": "x", "reasoning_content": "hm"}], "has reasoning_content"),
        ([{"role": "user", "content": "What is this?", "images": ["a.png"]}], "has images"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": "x"}]}],
            r"messages\[0\]: content is of type list and has a part that is not text \('image_url'\)",
        ),
        ([{"role": "user", "content": ["Hi"]}], r"a part that is not text \(of type str\)"),
        (
            [USER, {"role": "assistant", "content": "x", "weight": 0.5}],
            r"messages\[1\]: weight is 0.5; only 0 .* and 1",
        ),
        ([USER, {"role": "assistant", "content": "x", "weight": True}], r"weight is True"),
        ([USER, {"role": "assistant", "content": "x", "weight": []}], r"weight is \[\]"),
        ([{**USER, "weight": 1}], r"messages\[0\]: weight is 1 on a user turn; only assistant turns"),
        (
            [{"role": "user", "content": "a\ud800"}],
            r"messages\[0\]: content holds a lone surrogate \(U\+D800",
        ),
    ],
)
def test_what_is_not_a_conversation_is_refused_by_name(messages, culprit):
    with pytest.raises(UserError, match=culprit) as error:
        render(messages)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "the mend follows the culprit"


def test_keys_that_the_official_template_ignores_are_ignored(official_render):
    messages = [
        {**USER, "name": "Ann", "tool_calls": None},
        {"role": "assistant", "content": "x", "tool_calls": [], "weight": 0},
        {**USER, "weight": 0},
    ]
    assert render(messages) == official_render(messages)
