"""Tokenizers of every family: which template is taken, its masks, its stop tokens, and a real model's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipersona.chat import TEMPLATES, load_tokenizer
from minipersona.errors import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def named(directory: Path, **config: Any) -> Path:
    """`directory` with this tokenizer_config.json."""
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def bare(family_dir, tmp_path) -> Path:
    """A ChatML tokenizer without a template."""
    return Path(shutil.copytree(family_dir("chatml"), tmp_path / "bare"))


def template_of(directory: Path, **options: Any) -> str:
    return load_tokenizer(str(directory), **options).template.name


# ---------------------------------------------------------------- which template is taken


def test_the_models_own_is_taken_wherever_it_stands(family_dir, tmp_path, nasty, family):
    bare = Path(shutil.copytree(family_dir(family.ours.name), tmp_path / "bare"))
    for stated in (
        family.jinja,
        {"default": family.jinja, "tool_use": "x"},
        [{"name": "default", "template": family.jinja}],
    ):
        assert template_of(named(bare, chat_template=stated)) == family.ours.name
    named(bare)
    (bare / "chat_template.jinja").write_text(family.jinja)
    assert template_of(bare) == family.ours.name
    assert template_of(named(bare, chat_template=family.jinja)) == family.ours.name  # said twice alike
    tokenizer = load_tokenizer(str(bare))
    for name, messages in nasty.items():
        assert tokenizer.render(messages, True) == family.theirs(messages, True), name


def test_default_system_turns_are_the_families_own(bare):
    """A Qwen2 model is not given Qwen2.5's, which is longer."""
    own = {
        "chatml": "",
        "chatml-qwen2": "You are a helpful assistant.",
        "chatml-qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "chatml-smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }
    talk = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    for name, prompt in own.items():
        text = load_tokenizer(str(bare), template=name).render(TALK)
        assert text == (f"<|im_start|>system\n{prompt}<|im_end|>\n" if prompt else "") + talk


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, r"has no chat template \(base models often have none\); choose one with --template: chatml, "),
        ({"tokenizer_config.json": "{}"}, "has no chat template"),
        ({"tokenizer_config.json": '{"chat_template": ""}'}, "has no chat template"),
        (
            {"tokenizer_config.json": '{"chat_template": "{{ x }}"}'},
            r"its chat template \(SHA-256 \w{16}\.\.\.\) is not a known",
        ),
        ({"chat_template.jinja": "{{ x }}"}, "is not a known one; choose one with --template"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja: is not valid UTF-8"),
        ({"tokenizer_config.json": '{"chat_template": {"rag": "x"}}'}, "none of its chat templates is named default"),
        ({"tokenizer_config.json": '{"chat_template": [1, {}]}'}, "none of its chat templates is named default"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "its chat_template is not a text"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: is not a JSON object"),
    ],
)
def test_none_or_an_unknown_one_is_refused_unless_one_is_named(bare, files, words):
    for name, content in files.items():
        (bare / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(str(bare))
    assert "\n" not in str(error.value)
    if "JSON object" not in words:
        assert template_of(bare, template="chatml-qwen2") == "chatml-qwen2"


def test_two_that_differ_are_refused(bare, official_template):
    (bare / "chat_template.jinja").write_text(official_template)
    named(bare, chat_template=official_template.replace("Alibaba", "Nobody"))
    with pytest.raises(UserError, match=r"chat_template.jinja and tokenizer_config.json have different chat templates"):
        load_tokenizer(str(bare))
    assert template_of(bare, template="chatml") == "chatml"


def test_an_unknown_name_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"template 'qwen' is unknown; use one of chatml, .*llama3.1"):
        load_tokenizer("no/such-model", template="qwen")


def test_a_template_without_its_tokens_is_refused(bare):
    with pytest.raises(UserError, match=r"<think> is not a token of its own, as the template qwen3 needs"):
        load_tokenizer(str(bare), template="qwen3")


def test_the_digest_tells_templates_apart(bare):
    digests = {load_tokenizer(str(bare), template=name).digest for name in TEMPLATES if name.startswith("chatml")}
    assert len(digests) == 4


def test_the_embedded_model_has_qwens():
    tokenizer = load_tokenizer("tiny")
    assert tokenizer.template is TEMPLATES["chatml-qwen2.5"]
    assert tokenizer.digest == "9de068946d4ac67279460e70d3147eac899a320c5383dc555e3baee65a5d67f8"


# ---------------------------------------------------------------- masks and stop tokens


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, family_dir):
    return load_tokenizer(str(family_dir(request.param)), template=request.param)


def test_a_reply_ends_at_the_stop_tokens(tokenizer):
    texts = [tokenizer.decode([token]) for token in tokenizer.stop_tokens]
    assert texts == list(tokenizer.template.stop) and tokenizer.endoftext in tokenizer.stop_tokens
    document = tokenizer.encode(TALK)
    assert document.ids[document.supervised].tolist().count(tokenizer.stop_tokens[0]) == 1


def test_supervised_tokens_spell_each_response(nasty, tokenizer):
    for name, messages in nasty.items():
        text, responses = tokenizer.template.render_with_responses(messages)
        document = tokenizer.encode(messages, "all", 10**6)
        assert tokenizer.decode(document.ids) == tokenizer.decode(tokenizer._encode(text).ids), name
        taught = tokenizer.decode(document.ids[document.supervised])
        plain = "".join(text[start:stop] for start, stop in responses)
        # A response that begins with a line end may share a token with its header, so its text has one more before.
        straddles = any(text[start : start + 8].lstrip(" \t")[:1] in ("\n", "\r") for start, _ in responses)
        if not straddles and plain.isascii():
            assert taught == plain, name
        last = tokenizer.encode(messages, "last", 10**6).supervised
        assert last.any() and not (last & ~document.supervised).any(), name


def test_masks_are_those_of_ever_longer_conversations(nasty, tokenizer):
    """The last response is what the whole conversation has beyond its prompt, token by token."""
    for name, messages in nasty.items():
        before, last = messages[:-1], messages[-1]
        if last["role"] != "assistant" or not before or before[-1]["role"] == "assistant" or "think" in last["content"]:
            continue
        whole, prompt = tokenizer.encode(messages, max_tokens=10**6), tokenizer.encode_prompt(before).ids
        shared = next((t for t, (a, b) in enumerate(zip(whole.ids, prompt, strict=False)) if a != b), len(prompt))
        assert whole.supervised.tolist() == [t >= shared for t in range(len(whole))], name


def test_a_weight_of_zero_is_not_learned(tokenizer):
    talk = [*TALK, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye."}]
    end = tokenizer.template.stop[0]

    def taught(weights: tuple[Any, Any], supervise: Any) -> list[str]:
        weighted = [dict(turn) for turn in talk]
        for turn, weight in zip((weighted[1], weighted[3]), weights, strict=True):
            turn["weight"] = weight
        document = tokenizer.encode(weighted, supervise)
        assert document.ids.tolist() == tokenizer.encode(talk).ids.tolist()
        text = tokenizer.decode(document.ids[document.supervised]).replace(end, "|").replace("\n", "")
        return [part for part in text.split("|") if part]

    assert taught((1, None), "all") == ["Hello.", "Bye."] and taught((0, 1.0), "all") == ["Bye."]
    assert taught((1, 0), "all") == ["Hello."] and taught((0, 0.0), "all") == []
    assert taught((0, 1), "last") == ["Bye."] and taught((1, 0), "last") == []


def test_qwen3s_empty_thoughts_are_asked_not_learned(family_dir):
    tokenizer = load_tokenizer(str(family_dir("qwen3")), template="qwen3")
    document = tokenizer.encode(TALK)
    assert tokenizer.decode(document.ids[document.supervised]) == "Hello.<|im_end|>\n"
    prompt = tokenizer.encode_prompt(TALK[:1])
    assert tokenizer.decode(prompt.ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert document.ids[: len(prompt)].tolist() == prompt.ids.tolist()
    thought = [TALK[0], {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello."}]
    document = tokenizer.encode(thought)
    assert tokenizer.decode(document.ids[document.supervised]) == thought[1]["content"] + "<|im_end|>\n"


def test_llamas_raw_text_begins_as_in_pre_training(family_dir):
    tokenizer = load_tokenizer(str(family_dir("llama3")), template="llama3")
    begin = tokenizer.special["<|begin_of_text|>"]
    one, [many] = tokenizer.encode_text("Hello.", 9), tokenizer.encode_texts(["Hello."], 9)
    assert one.ids.tolist() == many.ids.tolist() == [begin, *tokenizer._encode("Hello.").ids]
    assert one.supervised.tolist() == [False] + [True] * (len(one) - 1)
    assert tokenizer.encode(TALK).ids.tolist().count(begin) == 1  # and a conversation has one, not two


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def smollm2() -> Path:
    directory = os.environ.get("MINIPERSONA_SMOLLM2")
    if not directory:
        pytest.skip("MINIPERSONA_SMOLLM2 names no directory of SmolLM2-135M-Instruct")
    return Path(directory)


def test_smollm2_is_as_transformers_has_it(nasty, smollm2):
    transformers = pytest.importorskip("transformers")
    official = transformers.AutoTokenizer.from_pretrained(smollm2)
    tokenizer = load_tokenizer(str(smollm2))
    assert (tokenizer.template.name, tokenizer.stop_tokens) == ("chatml-smollm2", (2, 0))
    for name, messages in nasty.items():
        for prompted in (False, True):
            text = official.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
            assert tokenizer.render(messages, prompted) == text, name
            ids = official.encode(text, add_special_tokens=False)
            ours = tokenizer.encode_prompt(messages) if prompted else tokenizer.encode(messages, max_tokens=10**6)
            assert ours.ids.tolist() == ids, name
    taught = tokenizer.encode(nasty["system"])
    assert tokenizer.decode(taught.ids[taught.supervised]) == "Hello there.<|im_end|>\n"
    assert np.flatnonzero(taught.supervised)[-1] == len(taught) - 1
