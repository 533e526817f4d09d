"""Ids against transformers, masks against a slow derivation, and the ways a tokenizer can be unfit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

import minipersona.chat
from minipersona.chat import load_tokenizer
from minipersona.errors import UserError

HEADER = "<|im_start|>assistant\n"
PIECES = [
    *("\n", "\n\n", " ", "\t", "\r", "a", "Hello", " it's", "12", "中", "🙂", "\u200d", "\u00a0", "\u2028"),
    *(
        "e\u0301",
        "\u0301",
        "\u0323",
        "\u0338",
        "\u0344",
        "\u0958",
        "\u1100",
        "\u1161",
        "\u11a8",
        "\U0001d15e",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", HEADER, "<|im_end|>\n", "<tool_call>"),
]
contents = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12)
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents})
conversations = st.lists(turns, min_size=1, max_size=5).filter(
    lambda messages: any(message["role"] == "assistant" for message in messages)
)


def ids_of(official: Any, text: str) -> list[int]:
    return official.encode(text, add_special_tokens=False)


def slow_mask(official: Any, official_render: Any, messages: Any, supervise: str) -> list[bool]:
    """Supervised tokens without offsets: by tokenising the official rendering of ever longer conversations.

    The tokens before a response are those shared with the conversation that ends at its header, so a token
    that merges the header's line end with the response's differs and counts as the response's.
    """
    ids = ids_of(official, official_render(messages))
    mask = [False] * len(ids)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in replies if supervise == "all" else replies[-1:]:
        stop = ids_of(official, official_render(messages[: i + 1]))
        assert ids[: len(stop)] == stop
        empty = official_render([*messages[:i], {"role": "assistant", "content": ""}])
        prompt = ids_of(official, empty.removesuffix("<|im_end|>\n"))
        start = next((t for t, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
        mask[start : len(stop)] = [True] * (len(stop) - start)
    return mask


def normalised(text: str) -> str:
    """NFC between added tokens, as the tokenizer applies it."""
    parts = re.split(r"(<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|<tool_call>)", text)
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


# ---------------------------------------------------------------- ids


def test_nasty_ids_are_those_of_transformers(nasty, tokenizer, official, official_render):
    for name, messages in nasty.items():
        expected = ids_of(official, official_render(messages))
        assert tokenizer.encode(messages, max_tokens=10**6).ids.tolist() == expected, name
        prompt = tokenizer.encode_prompt(messages)
        assert prompt.ids.tolist() == ids_of(official, official_render(messages, True)), name
        assert not prompt.supervised.any() and not prompt.truncated
    together = tokenizer.encode_prompts(list(nasty.values()))
    assert [p.ids.tolist() for p in together] == [tokenizer.encode_prompt(m).ids.tolist() for m in nasty.values()]


def test_every_part_is_that_of_transformers(tokenizer, official):
    """Also what no id shows, such as single digits, which no vocabulary trained on them could merge."""
    ours, theirs = (json.loads(t.to_str()) for t in (tokenizer._tokenizer, official.backend_tokenizer))
    for part in ("normalizer", "pre_tokenizer"):
        assert ours[part] == theirs[part], part
    for option in ours["model"]:
        assert (ours["model"][option] or None) == (theirs["model"][option] or None), option  # "" is as None
    added = [{token["content"]: token["id"] for token in t["added_tokens"]} for t in (ours, theirs)]
    assert added[0].items() <= added[1].items()


def test_real_ids_are_those_of_apply_chat_template(nasty, reference_dir):
    transformers = pytest.importorskip("transformers")
    official = transformers.Qwen2TokenizerFast.from_pretrained(reference_dir)
    tokenizer = load_tokenizer(str(reference_dir))
    for name, messages in nasty.items():
        expected = official.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert tokenizer.encode(messages, max_tokens=10**6).ids.tolist() == expected, name
    special = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    assert (tokenizer.special, tokenizer.endoftext, tokenizer.stop_tokens) == (special, 151643, (151645, 151643))
    assert tokenizer.vocab_size == len(official) == 151665


@settings(max_examples=60, deadline=None, database=None)
@given(messages=conversations)
def test_any_ids_are_those_of_transformers(tokenizer, official, official_render, messages):
    assert tokenizer.encode(messages).ids.tolist() == ids_of(official, official_render(messages))


def test_control_wrong_tokenisations_are_caught(nasty, directory, official, official_render):
    def differs(wrong: Any) -> bool:
        texts = [official_render(messages) for messages in nasty.values()]
        return any(wrong(text) != ids_of(official, text) for text in texts)

    def raw() -> Tokenizer:
        return load_tokenizer(str(directory))._tokenizer

    def encode(tokenizer: Tokenizer) -> Any:
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids

    right = encode(raw())
    assert not differs(right)
    not_normalised = raw()
    not_normalised.normalizer = normalizers.Sequence([])
    assert differs(encode(not_normalised))
    as_gpt2 = raw()
    as_gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert differs(encode(as_gpt2))
    # Header and response apart: their line ends no longer merge.
    parts = re.compile(f"(?<={re.escape(HEADER)})")
    assert differs(lambda text: [token for part in parts.split(text) for token in right(part)])


def test_both_layouts_give_one_tokenizer(nasty, parts_dir, whole_dir):
    parts, whole = load_tokenizer(str(parts_dir)), load_tokenizer(str(whole_dir))
    for name, messages in nasty.items():
        assert parts.encode(messages).ids.tolist() == whole.encode(messages).ids.tolist(), name
    assert parts.vocab_size == whole.vocab_size
    assert whole.digest == hashlib.sha256((whole_dir / "tokenizer.json").read_bytes()).hexdigest()
    files = [parts_dir / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")]
    assert parts.digest == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_control_settings_of_a_tokenizer_json_would_spoil_ids(nasty, whole_dir):
    obedient = Tokenizer.from_file(str(whole_dir / "tokenizer.json"))
    tokenizer = load_tokenizer(str(whole_dir))
    messages = nasty["plain"]
    assert obedient.encode(tokenizer.render(messages)).ids != tokenizer.encode(messages).ids.tolist()


def test_decode_inverts_encode(nasty, tokenizer):
    for name, messages in nasty.items():
        ids = tokenizer.encode(messages, max_tokens=10**6).ids
        assert tokenizer.decode(ids) == normalised(tokenizer.render(messages)), name
    assert tokenizer.decode(tokenizer.special.values(), skip_special_tokens=True) == ""


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("supervise", ["last", "all"])
def test_nasty_masks_are_those_of_the_slow_derivation(nasty, tokenizer, official, official_render, supervise):
    for name, messages in nasty.items():
        document = tokenizer.encode(messages, supervise, max_tokens=10**6)
        expected = slow_mask(official, official_render, messages, supervise)
        assert document.supervised.tolist() == expected, name


@settings(max_examples=60, deadline=None, database=None)
@given(messages=conversations, supervise=st.sampled_from(["last", "all"]))
def test_any_mask_is_that_of_the_slow_derivation(tokenizer, official, official_render, messages, supervise):
    document = tokenizer.encode(messages, supervise)
    assert document.supervised.tolist() == slow_mask(official, official_render, messages, supervise)


@settings(max_examples=100, deadline=None, database=None)
@given(messages=conversations)
def test_supervised_tokens_spell_the_last_response(tokenizer, messages):
    document = tokenizer.encode(messages)
    response = [message["content"] for message in messages if message["role"] == "assistant"][-1]
    expected = normalised(response + "<|im_end|>\n")
    supervised = document.ids[document.supervised]
    straddles = re.match(r"\s*[\r\n]", response) and tokenizer.decode(supervised) != expected
    assert tokenizer.decode(supervised) == "\n" * bool(straddles) + expected
    assert supervised[-2] == tokenizer.stop_tokens[0], "im_end and the line end after it are two tokens"
    first, *_, last = np.flatnonzero(document.supervised)
    assert document.supervised[first : last + 1].all(), "one run"


def _by_token_search(tokenizer: Any, messages: Any) -> list[bool]:
    """The usual way: after the last ids of the header, through the next im_end and line end."""
    ids = tokenizer.encode(messages).ids.tolist()
    header = tokenizer.encode_text(HEADER, 9).ids.tolist()
    places = [t for t in range(len(ids)) if ids[t : t + len(header)] == header]
    mask = [False] * len(ids)
    if places:
        start = places[-1] + len(header)
        end = tokenizer.special["<|im_end|>"]
        stop = ids.index(end, start) + 2 if end in ids[start:] else len(ids)
        mask[start:stop] = [True] * (min(stop, len(ids)) - start)
    return mask


def test_control_searching_ids_for_the_header_is_caught(nasty, tokenizer, official, official_render):
    def wrong(name: str) -> bool:
        expected = slow_mask(official, official_render, nasty[name], "last")
        return _by_token_search(tokenizer, nasty[name]) != expected

    assert not wrong("plain") and not wrong("many turns")
    assert wrong("header in trailing user")
    assert wrong("header in response")
    assert wrong("leading line end")


def test_control_a_mask_without_the_last_line_end_is_caught(nasty, tokenizer, official, official_render):
    for messages in nasty.values():
        mask = tokenizer.encode(messages, max_tokens=10**6).supervised.copy()
        mask[np.flatnonzero(mask)[-1]] = False
        assert mask.tolist() != slow_mask(official, official_render, messages, "last")


def test_a_token_across_the_header_belongs_to_the_response(tokenizer):
    """With and without it: the response that opens with a line end merges it into the header's."""
    row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nHello."}]
    document = tokenizer.encode(row)
    assert tokenizer.decode(document.ids[document.supervised]) == "\n\nHello.<|im_end|>\n"
    row[1]["content"] = "Hello."
    document = tokenizer.encode(row)
    assert tokenizer.decode(document.ids[document.supervised]) == "Hello.<|im_end|>\n"


# ---------------------------------------------------------------- truncation, batches, raw text


def test_truncation_takes_from_the_right(nasty, tokenizer):
    for name, messages in nasty.items():
        whole = tokenizer.encode(messages, max_tokens=10**6)
        first = int(np.flatnonzero(whole.supervised)[0])
        n = len(whole)
        assert not whole.truncated
        # Before the response, at its first token, after that, inside, before the last token, nowhere.
        for length in {1, first, first + 1, (first + n) // 2, n - 1, n, n + 1}:
            document = tokenizer.encode(messages, max_tokens=length)
            assert document.ids.tolist() == whole.ids[:length].tolist(), name
            assert document.supervised.tolist() == whole.supervised[:length].tolist(), name
            assert document.truncated == (length < n), name
            assert document.supervised.any() == (length > first), name


def test_many_are_as_one_at_a_time(nasty, tokenizer, monkeypatch):
    monkeypatch.setattr(minipersona.chat.tokenizer, "BATCH", 3)  # so that rows span batches
    rows = list(nasty.values())
    for supervise in ("last", "all"):
        documents = tokenizer.encode_many(rows, supervise, max_tokens=50)
        assert len(documents) == len(rows)
        for messages, document in zip(rows, documents, strict=True):
            one = tokenizer.encode(messages, supervise, max_tokens=50)
            assert document.ids.tolist() == one.ids.tolist()
            assert document.supervised.tolist() == one.supervised.tolist()
            assert document.truncated == one.truncated
    assert tokenizer.encode_many([]) == []


@settings(max_examples=60, deadline=None, database=None)
@given(text=contents)
def test_raw_text_is_supervised_but_for_its_first_token(tokenizer, official, text):
    document = tokenizer.encode_text(text, 10**6)
    assert document.ids.tolist() == ids_of(official, text)
    assert document.supervised.tolist() == [t > 0 for t in range(len(document))]


def test_many_texts_are_as_one_at_a_time(nasty, tokenizer, monkeypatch):
    monkeypatch.setattr(minipersona.chat.tokenizer, "BATCH", 3)
    texts = ["", *(message["content"] for messages in nasty.values() for message in messages)]
    for text, document in zip(texts, tokenizer.encode_texts(texts, 9), strict=True):
        one = tokenizer.encode_text(text, 9)
        assert document.ids.tolist() == one.ids.tolist() and document.truncated == one.truncated
        assert document.supervised.tolist() == one.supervised.tolist()
    with pytest.raises(UserError, match=r"^rows\[4\]: text is null"):
        tokenizer.encode_texts(["a", "b", "c", "d", None], 9)


def test_raw_text_is_cut_on_the_right(nasty, tokenizer):
    texts = [message["content"] for messages in nasty.values() for message in messages]
    for length in (1, 2, 5):
        for text, together in zip(texts, tokenizer.encode_texts(texts, length), strict=True):
            whole, cut = tokenizer.encode_text(text, 10**6).ids.tolist(), tokenizer.encode_text(text, length)
            assert cut.ids.tolist() == together.ids.tolist() == whole[:length]
            assert cut.truncated == together.truncated == (len(whole) > length)


def test_raw_text_is_truncated(tokenizer):
    document = tokenizer.encode_text("one two three four five", 2)
    assert (len(document), document.supervised.tolist(), document.truncated) == (2, [False, True], True)
    assert len(tokenizer.encode_text("", 2)) == 0


def test_documents_are_compact_arrays(nasty, tokenizer):
    document = tokenizer.encode(nasty["plain"])
    assert document.ids.dtype == np.int32 and document.supervised.dtype == np.bool_
    assert int(document.ids.max()) < tokenizer.vocab_size


# ---------------------------------------------------------------- errors


def test_rows_without_a_reply_are_refused(nasty, parts_dir):
    tokenizer = load_tokenizer(str(parts_dir))
    user_only = [{"role": "user", "content": f"{HEADER}Sure"}]
    with pytest.raises(UserError, match=r"^row has no assistant turn"):
        tokenizer.encode(user_only)
    with pytest.raises(UserError, match=r"^rows\[1\]: row has no assistant turn"):
        tokenizer.encode_many([nasty["plain"], user_only])
    with pytest.raises(UserError, match=r"^rows\[0\]: messages\[0\]: role is 'tool'"):
        tokenizer.encode_many([[{"role": "tool", "content": ""}]])
    assert len(tokenizer.encode_prompt(user_only)) > 0


def test_wrong_options_are_refused(nasty, parts_dir):
    tokenizer = load_tokenizer(str(parts_dir))
    with pytest.raises(UserError, match="supervise is 'first'; use last or all"):
        tokenizer.encode(nasty["plain"], "first")
    with pytest.raises(UserError, match="max_tokens is 0"):
        tokenizer.encode(nasty["plain"], max_tokens=0)
    with pytest.raises(UserError, match="text is null"):
        tokenizer.encode_text(None, 5)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"model": 3}'),
        ("vocab.json", "[1, 2"),
        ("merges.txt", "#version: 0.2\nno-such-token zzz\n"),
        ("merges.txt", b"\xff\xfe\xff"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"320": {}}}'),
    ],
)
def test_corrupt_files_are_named(parts_dir, tmp_path, name, damage):
    shutil.copytree(parts_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(UserError, match=re.escape(name)) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value) and ";" in str(error.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_missing_files_are_named(parts_dir, tmp_path, name):
    shutil.copytree(parts_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"holds no tokenizer.*{name}.*; copy"):
        load_tokenizer(str(tmp_path))


def _with_config(parts_dir: Path, tmp_path: Path, edit: Any) -> str:
    shutil.copytree(parts_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    edit(config["added_tokens_decoder"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_unfit_special_tokens_are_refused(parts_dir, tmp_path):
    def key(added: Any, content: str) -> str:
        return next(k for k, token in added.items() if token["content"] == content)

    def other_name(added: Any) -> None:
        added[key(added, "<|im_end|>")]["content"] = "</s>"

    def swallows_line_end(added: Any) -> None:
        added[key(added, "<|im_end|>")]["rstrip"] = True

    def gap(added: Any) -> None:
        added["100000"] = added.pop(key(added, "<|im_end|>"))

    with pytest.raises(UserError, match=r"<\|im_end\|> is not a token of its own"):
        load_tokenizer(_with_config(parts_dir, tmp_path / "a", other_name))
    with pytest.raises(UserError, match=r"<\|im_end\|> is not a token of its own"):
        load_tokenizer(_with_config(parts_dir, tmp_path / "b", swallows_line_end))
    with pytest.raises(UserError, match=r"has id \d+, but follows vocab.json as"):
        load_tokenizer(_with_config(parts_dir, tmp_path / "c", gap))


def test_tokens_of_the_config_alone_are_read(nasty, parts_dir, whole_dir, tmp_path):
    """tokenizer.json without its added tokens, which the config, or added_tokens.json, defines."""
    whole = load_tokenizer(str(whole_dir))
    stored = json.loads((whole_dir / "tokenizer.json").read_text())
    stored["added_tokens"] = []
    config = json.loads((parts_dir / "tokenizer_config.json").read_text())
    ids = {token["content"]: int(key) for key, token in config.pop("added_tokens_decoder").items()}
    named = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    named["pad_token"] = {"content": "<|endoftext|>"}
    forms = {
        "config": {"tokenizer_config.json": (parts_dir / "tokenizer_config.json").read_text()},
        "added": {"tokenizer_config.json": json.dumps({**config, **named}), "added_tokens.json": json.dumps(ids)},
    }
    for form, files in forms.items():
        directory = tmp_path / form
        directory.mkdir()
        (directory / "tokenizer.json").write_text(json.dumps(stored))
        for name, content in files.items():
            (directory / name).write_text(content)
        tokenizer = load_tokenizer(str(directory))
        for name, messages in nasty.items():
            assert tokenizer.encode(messages).ids.tolist() == whole.encode(messages).ids.tolist(), name
            assert tokenizer.encode(messages).supervised.tolist() == whole.encode(messages).supervised.tolist(), name
        assert tokenizer.special == whole.special and tokenizer.digest != whole.digest
        assert tokenizer.decode(tokenizer.special.values(), skip_special_tokens=True) == ""
    with pytest.raises(UserError, match="is not a token of its own"):  # the control: without them it is of no use
        (tmp_path / "added" / "added_tokens.json").unlink()
        load_tokenizer(str(tmp_path / "added"))
    parts = shutil.copytree(parts_dir, tmp_path / "parts")
    (parts / "tokenizer_config.json").write_text(json.dumps({**config, **named}))
    (parts / "added_tokens.json").write_text(json.dumps(ids))
    for messages in nasty.values():
        assert load_tokenizer(str(parts)).encode(messages).ids.tolist() == whole.encode(messages).ids.tolist()


def test_files_that_contradict_each_other_are_refused(whole_dir, tmp_path):
    shutil.copytree(whole_dir, tmp_path, dirs_exist_ok=True)
    tokenizer = load_tokenizer(str(tmp_path))
    end = tokenizer.special["<|im_end|>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": end}))
    assert load_tokenizer(str(tmp_path)).digest == tokenizer.digest  # twice the same is fine
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": end + 1}))
    with pytest.raises(
        UserError, match=rf"added_tokens.json: <\|im_end\|> has id {end + 1}, but {end} in another file"
    ):
        load_tokenizer(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": "x"}')
    with pytest.raises(UserError, match=r"cannot read tokenizer_config.json, added_tokens.json"):
        load_tokenizer(str(tmp_path))


def test_parts_of_another_tokenizer_are_refused(parts_dir, tmp_path):
    shutil.copytree(parts_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(UserError, match=r"a GPT2Tokenizer is read from tokenizer.json only"):
        load_tokenizer(str(tmp_path))


def test_random_models_take_the_tiny_tokenizer(parts_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(
        minipersona.chat.tokenizer, "locate", lambda name, files, *, revision: asked.append(name) or parts_dir
    )
    assert load_tokenizer("random:Qwen/Qwen2.5-7B-Instruct").name == "tiny"
    assert asked == ["tiny"]


def test_torch_is_not_imported():
    root = Path(minipersona.chat.__file__).parents[2]
    code = "import sys, minipersona.chat, minipersona.chat.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
