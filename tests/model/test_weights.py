"""Every tensor of a model's files is used, or repeats what is known without it, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import exact_frequencies, reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipersona.errors import UserError
from minipersona.model import weights
from minipersona.model.load import load_model

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]

IDS = torch.randint(0, 160, (2, 11), generator=torch.Generator().manual_seed(5))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def stored(hf_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a test model's directory whose tensors are what `change` makes of them."""

    def make(change: Change, tied: bool = False, family: str = "qwen2") -> Path:
        shutil.copytree(hf_model(tied, family=family), tmp_path / "model", dirs_exist_ok=True)
        file = tmp_path / "model" / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return tmp_path / "model"

    return make


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(str(directory))
    line = str(caught.value)
    assert str(directory) in line and "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.removeprefix("model."),
        lambda name: f"_orig_mod.{name.removeprefix('model.')}",
    ],
    ids=["compiled", "parallel", "both", "blocks compiled", "recomputed", "no model.", "compiled, no model."],
)
def test_known_prefixes_are_left_out(
    hf_model: Callable[..., Path], stored: Callable[..., Path], rename: Callable[[str], str]
) -> None:
    directory = stored(lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert torch.equal(load_model(str(directory)).logits(IDS), load_model(str(hf_model())).logits(IDS))


@pytest.mark.parametrize("prefix", ["language_model.", "base_model.model.", "transformer."])
def test_unknown_prefixes_are_named(stored: Callable[..., Path], prefix: str) -> None:
    directory = stored(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    refused(directory, "model.safetensors", f"begin with '{prefix}'", "is not known")


def test_what_is_missing_or_unknown_is_named(stored: Callable[..., Path]) -> None:
    def without(gone: str) -> Change:
        return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != gone}

    refused(stored(without("model.norm.weight")), "model.norm.weight is missing (1 in all)", "download is incomplete")
    refused(stored(without(HEAD)), f"{HEAD} is missing", "tie_word_embeddings is false")
    for name in ("score.weight", "model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"):
        refused(stored(lambda tensors, name=name: {**tensors, name: torch.ones(8)}), f"unknown tensor {name}")
    # Biases that a family does not have, and those of a family that are not there.
    refused(
        stored(lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, family="llama"),
        "unknown tensor model.layers.0.self_attn.q_proj.bias", "llama",
    )  # fmt: skip
    refused(stored(without("model.layers.2.self_attn.k_norm.weight"), family="qwen3"), "k_norm.weight is missing")
    refused(
        stored(lambda tensors: {**tensors, "module.model.norm.weight": torch.ones(48)}),
        "module.model.norm.weight and model.norm.weight are both model.norm.weight",
    )


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(
    hf_model: Callable[..., Path], stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_equal", lambda a, b, equal=weights._equal: equal(a, b, rows=7))
    directory = stored(lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()}, tied=True)
    assert torch.equal(load_model(str(directory)).logits(IDS), load_model(str(hf_model(True))).logits(IDS))

    def learned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = tensors[EMBEDDING].clone()
        head[-1, -1] += 1.0
        return {**tensors, HEAD: head}

    refused(stored(learned, tied=True), HEAD, EMBEDDING, "tie_word_embeddings is true")
    refused(stored(lambda tensors: {**tensors, HEAD: torch.ones(161, 48)}, tied=True), HEAD, EMBEDDING)
    # The control: where the head is its own, that same file loads and computes with it, as transformers does.
    directory = stored(learned, tied=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    logits = load_model(str(directory)).logits(IDS)
    assert (logits - reference(directory)(IDS).logits).abs().max() < 1e-4
    assert (logits - load_model(str(hf_model(True))).logits(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_rotary_frequencies_that_are_stored_must_be_those_of_the_config(
    hf_model: Callable[..., Path], stored: Callable[..., Path], family: str
) -> None:
    right = exact_frequencies(reference(hf_model(family=family)).config)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for kept in (right.float(), right.bfloat16()):
        load_model(str(stored(lambda tensors, kept=kept: {**tensors, name: kept}, family=family)))
    linear = right.float() / 2
    refused(stored(lambda tensors: {**tensors, name: linear}, family=family), name, "rope_theta, rope_parameters")
    refused(stored(lambda tensors: {**tensors, name: torch.ones(3)}, family=family), name)


def test_one_file_beside_shards_must_hold_the_same(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    directory, single = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    shutil.copytree(hf_model(shards=3), directory)
    whole = load_file(hf_model(shards=1) / "model.safetensors")
    save_file(whole, single, metadata={"format": "pt"})
    expected = load_model(str(hf_model())).logits(IDS)
    assert torch.equal(load_model(str(directory)).logits(IDS), expected)
    both = ("model.safetensors stands beside model.safetensors.index.json", "out of date")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed in (
        {**whole, name: whole[name] + 1e-3},
        {**whole, name: whole[name].T.contiguous()},
        {other: tensor for other, tensor in whole.items() if other != name},
        {**{other: tensor for other, tensor in whole.items() if other != name}, f"{name}s": whole[name]},
    ):
        save_file(changed, single, metadata={"format": "pt"})
        refused(directory, name, *both)
    (directory / "model.safetensors.index.json").unlink()
    save_file({**whole, name: whole[name] + 1.0}, single, metadata={"format": "pt"})
    assert not torch.equal(load_model(str(directory)).logits(IDS), expected)  # the control: alone, the file is read
    # An index that names the one file is no second statement.
    index = {"weight_map": dict.fromkeys(whole, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(str(directory))
