"""Files from elsewhere that are broken or mean harm: one line names the file and the mend; nothing runs or grows."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from conftest import SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from minipersona.behaviour.questions import load_questions as load_asked
from minipersona.chat import load_tokenizer
from minipersona.chat.template import QWEN2_5_SYSTEM_PROMPT
from minipersona.config import DataSection, LoraConfig, RunConfig
from minipersona.corpus.sources import read_source, tokenize
from minipersona.errors import UserError
from minipersona.files import data_dir, parse_json, read_json
from minipersona.geometry.extraction import extract
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.adapter_config import AdapterConfig, read_adapter_config
from minipersona.model.adapter_files import load_adapter, save_adapter
from minipersona.model.config import ModelConfig, RotaryScaling
from minipersona.model.config_file import NEUTRAL, ROPE, read_config
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.save import save_model
from minipersona.settings import load_config, override

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def refused(read: Callable[[], object], *words: str) -> None:
    """`read` ends in a UserError of one line that says all of these, within bounds of time."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        read()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000, line[:2000]
    assert all(word in line for word in words), line
    assert time.monotonic() - start < 10


def small_model(seed: int = 0) -> Qwen2:
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2(SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return model


# ---------------------------------------------------------------- weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(small_model(), tmp_path / "model")
    load_model(str(tmp_path / "model"), device="cpu")  # the control: it loads
    return tmp_path / "model"


def with_header(change: Callable[[dict[str, Any]], object], content: bytes) -> bytes:
    """A safetensors file with a changed header (or header text) and everything else as it was."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    encoded = (text if isinstance(text, str) else json.dumps(header)).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "overlap": lambda h: h["model.norm.weight"].update(data_offsets=h["lm_head.weight"]["data_offsets"]),
    "huge offsets": lambda h: h["model.norm.weight"].update(data_offsets=[0, 2**62]),
    "negative offsets": lambda h: h["model.norm.weight"].update(data_offsets=[-4, 0]),
    "no offsets": lambda h: h["model.norm.weight"].pop("data_offsets"),
    "infinite offsets": lambda h: h["model.norm.weight"].update(data_offsets=[0, float("inf")]),
    "huge shape": lambda h: h["model.norm.weight"].update(shape=[2**40, 2**40]),
    "unknown type": lambda h: h["model.norm.weight"].update(dtype="PICKLE"),
    "twice": lambda h: json.dumps(h).replace(
        "{", '{"model.norm.weight": ' + json.dumps(h["model.norm.weight"]) + ",", 1
    ),
    "a list": lambda h: "[]",
    "deep": lambda h: "[" * 100_000,
    "no JSON": lambda h: "{",
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(folder: Path, lie: str) -> None:
    file = folder / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(with_header(LIES[lie], good))
    refused(lambda: load_model(str(folder), device="cpu"), str(file), "could not be read as safetensors")
    file.write_bytes(with_header(lambda h: None, good))
    load_model(str(folder), device="cpu")  # the control: rewriting alone does no harm


def test_what_stands_in_place_of_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    good = file.read_bytes()
    for content, words in {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n": "git lfs pull",
        b"<!DOCTYPE html><html>Sign in</html>": "web page",
        b"\n<html>": "web page",
        good[: len(good) // 2]: "cut off",
        good[:-1]: "cut off",
        good[:100]: "cut off",
        good[:7]: "cut off",
        good + b"x": "could not be read as safetensors",
        b"": "cut off",
        struct.pack("<Q", 2**63) + good: "damaged",
        struct.pack("<Q", 50_000_000) + bytes(60_000_000): "damaged",
    }.items():
        file.write_bytes(content)
        refused(lambda: load_model(str(folder), device="cpu"), str(file), words)
    file.unlink()
    file.mkdir()
    refused(lambda: load_model(str(folder), device="cpu"), str(folder), "fetch")


def test_tensors_of_another_shape_or_type(folder: Path) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    for tensor, words in (
        (torch.zeros(7), "shape (7,)"),
        (torch.zeros(48, dtype=torch.int8), "I8; quantised"),
        (torch.zeros(48).to(torch.float8_e4m3fn), "F8_E4M3; quantised"),
        (torch.full((48,), torch.nan), "non-finite"),
        (torch.full((48,), -torch.inf), "non-finite"),
    ):
        save_file({**good, "model.norm.weight": tensor}, file)
        refused(lambda: load_model(str(folder), device="cpu"), str(file), "model.norm.weight", words)
    save_file({**good, "model.norm.weight": torch.ones(48, dtype=torch.bfloat16)}, file)
    load_model(str(folder), device="cpu")  # the control


def test_shards(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(small_model(), folder, shard_bytes=60_000)
    load_model(str(folder), device="cpu")
    index = folder / "model.safetensors.index.json"
    good = read_json(index)
    first = min(good["weight_map"].values())
    for name in ("/etc/passwd", "../model.safetensors", "a/b.safetensors", "model.bin", "", ".", None, 7, "x" * 5000):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.norm.weight": name}}))
        refused(lambda: load_model(str(folder), device="cpu"), str(index), "same directory")
    for wrong in ([], {}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(wrong))
        refused(lambda: load_model(str(folder), device="cpu"), str(index), "weight_map")
    index.write_text(json.dumps(good))
    shutil.copy(folder / first, folder / "copy.safetensors")
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "x": "copy.safetensors"}}))
    refused(lambda: load_model(str(folder), device="cpu"), "ambiguous")
    index.write_text(json.dumps(good))
    (folder / first).unlink()
    refused(lambda: load_model(str(folder), device="cpu"), str(folder / first), "missing")


def test_weights_that_say_a_thing_twice(folder: Path) -> None:
    """Names that become one once wrappers are left out, and a second file; both are read only where they agree."""
    file = folder / "model.safetensors"
    good = load_file(file)
    for name in ("module.", "_orig_mod.", "_orig_mod._orig_mod.module."):
        save_file({**good, f"{name}model.norm.weight": torch.ones(48)}, file)
        refused(lambda: load_model(str(folder), device="cpu"), str(file), "are both model.norm.weight")
    shard, index = folder / "shard.safetensors", folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(good, "shard.safetensors")}))
    save_file(good, shard)
    for other in ({}, {**good, "x": torch.ones(1)}, {**good, "model.norm.weight": torch.full((48,), torch.nan)}):
        save_file(other, file)
        refused(lambda: load_model(str(folder), device="cpu"), str(folder), "stands beside", "out of date")
    save_file(good, file)
    load_model(str(folder), device="cpu")  # the control


def test_a_hub_caches_symlinks_out_of_the_directory_work(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("c" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.move(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob-{file.name}"))
    model = load_model(str(snapshot), device="cpu")
    assert model.source["revision"] == "c" * 40
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / "gone")
    refused(lambda: load_model(str(snapshot), device="cpu"), "safetensors")


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
        {"model_type": "llama"},
        {"model_type": ["qwen2"]},
        *(
            {name: value}
            for name in ("hidden_size", "num_hidden_layers", "vocab_size")
            for value in (-1, 0, 10**12, 1.5)
        ),
        {"hidden_size": "48"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"num_attention_heads": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 10**12},
        {"head_dim": 64},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": True},
        {"rope_theta": -1},
        {"rope_theta": 10**400},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": "yarn"},
        {"tie_word_embeddings": "no"},
        {"quantization_config": {"bits": 4}},
        {"max_position_embeddings": 10**12},
        {"rope_theta": 10_000, "rope_parameters": {"rope_theta": 5_000}},
        {"rope_scaling": {"type": "llama3"}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 10**400}},
        {"rope_parameters": [[]]},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": {"a": 1}},
        {"layer_types": ["sliding_attention"] * 3},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        {"use_sliding_window": "yes"},
        {"is_causal": 1},
        {"attention_multiplier": 10**400},
        {"eos_token_id": [10**400]},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_configs_that_are_not_a_qwens(folder: Path, change: dict[str, Any]) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    for name in (str(folder), f"random:{folder}"):
        refused(lambda name=name: load_model(name, device="cpu"), "config.json", *change)  # type: ignore[misc]
    assert not (folder / "canary").exists()


def test_sizes_within_bounds_ask_for_no_time(folder: Path) -> None:
    """The largest config that is accepted is refused by its weights, before anything is allocated."""
    config = read_json(folder / "config.json")
    big = {"hidden_size": 65_536, "intermediate_size": 1_000_000, "num_hidden_layers": 1000, "vocab_size": 10_000_000}
    (folder / "config.json").write_text(json.dumps({**config, **big, "num_attention_heads": 1024}))
    refused(lambda: load_model(str(folder), device="cpu"), str(folder), "missing")


def test_a_key_twice_is_no_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 64,', 1))
    refused(lambda: read_config(folder / "config.json"), "'hidden_size' is there twice")


# ---------------------------------------------------------------- adapters

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
DELETE = object()


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": DELETE}, {"lora_alpha": None}, {"lora_alpha": 0}, {"lora_alpha": True}, {"lora_alpha": 1e400},
        {"r": DELETE}, {"r": 0}, {"r": -2}, {"r": 2.0}, {"r": 10**12}, {"r": 4096}, {"peft_type": DELETE},
        {"target_modules": DELETE}, {"target_modules": []}, {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]}, {"target_modules": [["q_proj"]]}, {"target_modules": [None]},
        {"use_rslora": 1}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
        {"bias": "lora_only"}, {"fan_in_fan_out": True}, {"rank_pattern": {"q_proj": 8}},
        {"rank_pattern": {"q_proj": 2.0}}, {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"q_(proj": 2}},
        {"alpha_pattern": {"q_proj": 0}}, {"alpha_pattern": {"*": 8}}, {"alpha_pattern": {"q_proj": 1e400}},
        {"layers_to_transform": [0]}, {"layers_to_transform": "0"}, {"layers_to_transform": [True]},
        {"layers_pattern": "layers"}, {"layers_pattern": ["("], "layers_to_transform": [0, 1, 2]},
        {"target_modules": ".*(q|down)_proj", "layers_to_transform": [0, 1, 2]}, {"target_modules": "(q_proj"},
        {"target_modules": "(" * 5000}, {"target_modules": "a{99999999999}"}, {"target_modules": ".*"},
        {"target_modules": ["q_proj", "down_proj", "lm_head"]}, {"target_modules": ["q_proj", "down_proj", "mlp"]},
        {"target_modules": ["none"]}, {"exclude_modules": ["q_proj"]}, {"exclude_modules": [0]},
        {"exclude_modules": {"q_proj": 1}}, {"exclude_modules": "["}, {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"},
        {"peft_type": "IA3"}, {"alora_invocation_tokens": [1, 2]}, {"use_qalora": True}, {"lora_bias": True},
        {"an_option_of_the_future": 0.5}, {"lora_dropout": 1}, {"lora_dropout": "0"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_adapter_configs_are_refused_and_never_guessed(tmp_path: Path, change: dict[str, Any]) -> None:
    model = small_model()
    save_adapter(apply_lora(model, LORA), tmp_path / "a")
    before = {name: adapter.lora_A.clone() for name, adapter in adapters(model).items()}
    file = tmp_path / "a" / "adapter_config.json"
    config = {**read_json(file), **change}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not DELETE}))
    refused(lambda: load_adapter(model, tmp_path / "a"), "a/adapter_")
    after = {name: adapter.lora_A for name, adapter in adapters(model).items()}
    assert after.keys() == before.keys()  # the adapter that was there still is
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_name_with_line_ends_in_it_is_still_one_line(tmp_path: Path) -> None:
    model = small_model()
    save_adapter(apply_lora(model, LORA), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**read_json(file), "an\noption": 1}))
    refused(lambda: load_adapter(model, tmp_path / "a"), r"an\noption = 1 is not supported")


def test_control_what_peft_writes_by_default_is_plain(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig

    PeftConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path
    )
    config = read_adapter_config(tmp_path / "adapter_config.json")
    assert set(config.target_modules) == {"q_proj", "down_proj"}
    assert config == AdapterConfig(r=2, lora_alpha=4.0, target_modules=config.target_modules)


def test_a_rank_that_the_file_does_not_have_allocates_nothing(tmp_path: Path) -> None:
    model = small_model()
    save_adapter(apply_lora(model, LORA), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**read_json(file), "r": 65_536}))
    kept = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *sizes, **options: pytest.fail("allocated") if sizes else kept(*sizes))
        refused(lambda: load_adapter(model, tmp_path / "a"), "this model needs (65536, ")


# ---------------------------------------------------------------- tokenizers


def test_a_hostile_chat_template_is_never_run(tmp_path: Path) -> None:
    evil = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "canary") + "') }}EVIL"
    shutil.copy(data_dir() / "tiny" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": evil, "auto_map": {"x": "evil.Evil"}}))
    (tmp_path / "chat_template.jinja").write_text(evil)
    refused(
        lambda: load_tokenizer(str(tmp_path)), str(tmp_path), "its chat template", "is not a known one", "--template"
    )
    tokenizer = load_tokenizer(str(tmp_path), template="chatml-qwen2.5")
    text = tokenizer.render(CHAT["messages"], add_generation_prompt=True)
    assert text == load_tokenizer("tiny").render(CHAT["messages"], add_generation_prompt=True)
    assert QWEN2_5_SYSTEM_PROMPT in text and "EVIL" not in text and not (tmp_path / "canary").exists()
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    with pytest.raises(Exception, match=r"unsafe|cycler"):  # the control: whoever does run it runs this
        transformers.render_jinja_template([CHAT["messages"]], chat_template=evil)


def test_ids_that_no_model_has(tmp_path: Path) -> None:
    whole = json.loads((data_dir() / "tiny" / "tokenizer.json").read_text())
    token = next(t for t in sorted(whole["model"]["vocab"]) if len(t) == 4)
    whole["model"]["vocab"][token] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    shutil.copy(data_dir() / "tiny" / "tokenizer_config.json", tmp_path)
    refused(lambda: load_tokenizer(str(tmp_path)), str(tmp_path), "ids up to 4,294,967,295")


def test_a_tokenizer_that_makes_its_library_panic(tmp_path: Path) -> None:
    """What its Rust then raises is no Exception."""
    whole = json.loads((data_dir() / "tiny" / "tokenizer.json").read_text())
    whole["model"]["continuing_subword_prefix"] = "a prefix that is longer than any token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    refused(lambda: load_tokenizer(str(tmp_path)), str(tmp_path), "cannot read tokenizer.json", "download")


def test_a_tokenizer_with_more_tokens_than_its_model_has_rows(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_dir() / "tiny" / name, folder)
    model, tokenizer = load_model(str(folder), device="cpu"), load_tokenizer(str(folder))
    personas = {"a": "You are A.", "b": "You are B."}
    refused(lambda: extract(model, tokenizer, personas, ["Why?"], [1]), str(folder), "the model 160; name the model's")
    extract(load_model("tiny", device="cpu"), tokenizer, personas, ["Why?"], [1])  # the control


def test_a_tokenizer_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(10**12)  # takes no room on the disk
    refused(lambda: load_tokenizer(str(tmp_path)), "tokenizer.json", "longer than")


# ---------------------------------------------------------------- data sets and prompts


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"text": "\xff"}', "line 2 is not valid UTF-8"),
        (b'{"text": "a", "text": "b"}', "line 2 is not valid JSON (key 'text' is there twice)"),
        (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 2 is not valid JSON"),
        (b'{"n": ' + b"1" * 10_000 + b', "text": ""}', "line 2 is not valid JSON"),
        (b'{"text": "' + b"x" * 100_000_000 + b'"}', "line 2 is longer than 16,000,000 bytes"),
        (b'{"text": null}', "row 1: text is null"),
        (b'{"text": "\\ud800"}', "row 1: text holds a lone surrogate"),
        (b'{"messages": null}', "row 1: messages is null"),
        (b'{"messages": [null]}', "row 1: messages[0] is null"),
        (b'{"messages": [{"role": "user", "content": null}]}', "row 1: messages[0]: content is null"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "row 1: messages[0]: role is 'tool'"),
        (b'{"messages": [{"role": ' + b"[" * 500 + b"]" * 500 + b"}]}", "row 1: messages[0]: role is [[["),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "row 1: row has no assistant turn"),
        (b"null", "line 2 is not a row; give it"),
        (b"[]", "line 2 is not a row; give it"),
        (b"version https://git-lfs.github.com/spec/v1", "line 2 is not valid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    path, tokenizer = tmp_path / "rows.jsonl", load_tokenizer("tiny")
    path.write_bytes(json.dumps(CHAT).encode() + b"\n" + line + b"\n")
    refused(lambda: tokenize(read_source(f"jsonl:{path}"), tokenizer), str(path), words)
    assert len(tokenize(read_source(f"jsonl:{path}[0:1]"), tokenizer)) == 1  # the control: the line before is sound


def test_lists_that_repeat_lists_that_repeat_lists(tmp_path: Path) -> None:
    """A few lines of YAML stand for 2 to the 60th texts."""
    lines = ["- &x0", "  - text", "  - text"]
    for level in range(60):
        lines += [f"- &x{level + 1}", f"  - *x{level}", f"  - *x{level}"]
    hidden = ["- id: _", "  x:", *(f"    {line}" for line in lines)]
    merged = ["- &x0 {a: b}", *(f"- &x{level + 1} {{<<: [*x{level}, *x{level}]}}" for level in range(60))]
    for begin in (lines, hidden, merged):
        (tmp_path / "q.yaml").write_text("\n".join([*begin, "- id: q", "  paraphrases: *x60"]))
        refused(lambda: load_asked(str(tmp_path / "q.yaml")), str(tmp_path), "more than 30,000 values", "aliases")
    few = ["- &d {id: _d, meta: {x: y}}", *(f"- {{<<: *d, id: q{n}, question: How}}" for n in range(500))]
    (tmp_path / "q.yaml").write_text("\n".join(few))
    assert len(load_asked(str(tmp_path / "q.yaml")).questions) == 500  # the control


def test_configs_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    for content, words in {
        "x = " + "[" * 5000: "not valid TOML",
        "seed = " + "1" * 5000: "not valid TOML",
        "seed = 1979-13-45": "not valid TOML",
        "#" * 2_000_000: "longer than 1,000,000 bytes",
        "[data]\ntrain = 'a'\nheldout = [[[]]]": "data.heldout = [[[]]]: must be a string",
    }.items():
        path.write_text(content)
        refused(lambda: load_config(str(path), RunConfig), str(path), words)
    for setting in ("seed=" + "1" * 5000, "lora.targets=" + "[" * 5000):
        refused(lambda setting=setting: override(RunConfig(DataSection("a", "b")), [setting]), "must be a")  # type: ignore[misc]


def test_json_files_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.truncate(10**12)
    for read in (lambda: load_personas(str(path)), lambda: load_questions(str(path)), lambda: read_json(path)):
        refused(read, str(path), "longer than")
    refused(lambda: read_json("/dev/zero"), "/dev/zero", "longer than")


def test_a_range_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps(CHAT) + "\n").encode() * 10 + b"{")
    assert len(read_source(f"jsonl:{path}[2:9:3]")) == 3
    refused(lambda: read_source(f"jsonl:{path}[2:12]"), "line 11")


def bomb(path: Path, column: Any, **options: Any) -> None:
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd", **options)


def test_parquet_that_expands_is_refused_before_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.parquet"
    one = pyarrow.array(["x" * 5_000_000]).dictionary_encode()
    bomb(path, pyarrow.DictionaryArray.from_arrays(np.zeros(200_000, np.int32), one.dictionary))
    assert path.stat().st_size < 20_000  # of a terabyte
    before = pyarrow.total_allocated_bytes()
    refused(lambda: read_source(f"parquet:{path}"), str(path), "rows in succession hold 2,560,000,000 bytes")
    refused(lambda: read_source(f"parquet:{path}[0:1]"), str(path), "rows in succession")
    assert pyarrow.total_allocated_bytes() - before < 50_000_000
    bomb(path, pyarrow.array(["x" * 1_000_000, "y" * 1_000_000]), use_dictionary=False)
    assert len(read_source(f"parquet:{path}")) == 2  # the control
    monkeypatch.setattr("minipersona.corpus.parquet.MOST_STORED", 1_000_000)
    refused(lambda: read_source(f"parquet:{path}"), str(path), "row group 0 holds 2,0")


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_parquet_of_other_encodings_is_read(tmp_path: Path, encoding: str) -> None:
    path, texts = tmp_path / "rows.parquet", [f"text {i}" * (i % 9) for i in range(1500)]
    bomb(path, texts, use_dictionary=False, column_encoding={"text": encoding}, row_group_size=1100)
    assert [row["text"] for row in read_source(f"parquet:{path}[7:1400:13]").rows] == texts[7:1400:13]


# ---------------------------------------------------------------- properties

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["LORA", "qwen2"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
KEYS = [
    "peft_type", "r", "lora_alpha", "target_modules", "bias", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "exclude_modules", "use_rslora", "x",
]  # fmt: skip
FAMILIES = [
    SIZES,
    replace(SIZES, model_type="llama", head_dim=10, rope_scaling=RotaryScaling(8.0, 1.0, 4.0, 64), eos_token_id=(1, 2)),
    replace(SIZES, model_type="qwen3", head_dim=16),
]
STATED = sorted({key for family in FAMILIES for key in family.to_json()} | {*NEUTRAL, *ROPE, "layer_types", "head_dim"})
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(change=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_adapter_config_is_read_or_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "adapter_config.json"
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    file.write_text(json.dumps({**plain, **change}))
    try:
        config = read_adapter_config(file)
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        name = "model.layers.0.self_attn.q_proj"
        assert isinstance(config.matches(name), bool)  # every pattern is a regular expression
        assert isinstance(config.rank(name), int) and config.rank(name) > 0 and 0 < config.scale(name) < 1e6


@FEW
@given(family=st.sampled_from(FAMILIES), change=st.dictionaries(st.sampled_from(STATED), JSON, max_size=2))
def test_any_model_config_is_read_or_refused(tmp_path: Path, family: ModelConfig, change: dict[str, Any]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**family.to_json(), **change}))
    try:
        config = read_config(file)
    except UserError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        assert config.head_dim > 0 and config.num_attention_heads % config.num_key_value_heads == 0
        assert config.rms_norm_eps > 0 and config.model_type == family.model_type
        if config.model_type == "qwen2":
            assert config.head_dim * config.num_attention_heads == config.hidden_size


MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON, "content": st.text() | JSON}
)


@FEW
@given(rows=st.lists(st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4) | JSON}), min_size=1, max_size=3))
def test_any_rows_become_documents_or_are_named(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path, tokenizer = tmp_path / "rows.jsonl", load_tokenizer("tiny")
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        documents = tokenize(read_source(f"jsonl:{path}"), tokenizer)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert len(documents) == len(rows) and all(document.supervised.any() for document in documents)


@FEW
@given(value=JSON)
def test_parse_json_is_jsons_own_but_for_keys_twice(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(parse_json(text)) == text  # by text, since not-a-number is not equal to itself
    with pytest.raises(ValueError, match="twice"):
        parse_json(f'[{text}, {{"a": 1, "b": {text}, "a": 1}}]')


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    path.chmod(0)
    refused(lambda: read_source(f"jsonl:{path}"), str(path), "Permission denied")
