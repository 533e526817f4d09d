"""Files that run code when they are unpickled are never read, under whatever name they come."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from minipersona.chat import load_tokenizer
from minipersona.errors import UserError
from minipersona.files import data_dir
from minipersona.geometry.vectors import load_vectors
from minipersona.model.adapter_files import load_adapter
from minipersona.model.load import load_model
from minipersona.training.checkpoint import Position, load_state
from minipersona.training.optimizer import AdamW, Flat

NAMES = [
    "pytorch_model.bin", "adapter_model.bin", "model.pt", "consolidated.pth", "tokenizer.model", "training_args.bin",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.ckpt",
    ".metadata", "__0_0.distcp",  # a distributed checkpoint
]  # fmt: skip


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def malicious(canary: Path) -> bytes:
    """In the oldest protocol: call os.mkdir(canary)."""
    return f"cposix\nmkdir\n(S'{canary}'\ntR.".encode()


def test_control_the_payload_works(malicious: bytes, canary: Path) -> None:
    importlib.import_module("_pickle").loads(malicious)
    assert canary.is_dir()


@pytest.fixture
def folder(tmp_path: Path, malicious: bytes) -> Path:
    """A model and its tokenizer without weights, and the payload under every name that a loader might pick."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_dir() / "tiny" / name, folder)
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for name in NAMES:
        (folder / name).write_bytes(malicious)
    return folder


def test_beside_what_is_needed_it_is_left_alone(folder: Path, canary: Path) -> None:
    shutil.copy(data_dir() / "tiny" / "model.safetensors", folder)
    load_model(str(folder), device="cpu")
    load_tokenizer(str(folder))
    assert not canary.exists()


def test_in_its_place_it_is_refused(folder: Path, canary: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model\.safetensors.*\.bin could run code.*convert it"):
        load_model(str(folder), device="cpu")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors.*convert it"):
        load_adapter(load_model("tiny", device="cpu"), folder)
    for name in NAMES:
        with pytest.raises(UserError, match="safetensors"):
            load_model(str(folder / name), device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("magic", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05\x95"])
def test_under_the_name_of_safetensors_it_is_refused(
    folder: Path, canary: Path, malicious: bytes, magic: bytes
) -> None:
    model = load_model("tiny", device="cpu")
    for name in ("model.safetensors", "adapter_model.safetensors", "vectors.safetensors"):
        (folder / name).write_bytes(magic + malicious)
    for read in (
        lambda: load_model(str(folder), device="cpu"),
        lambda: load_adapter(model, folder),
        lambda: load_vectors(folder / "vectors.safetensors"),
    ):
        with pytest.raises(UserError, match="it is a PyTorch file, which could run code" if magic else "damaged"):
            read()
    assert not canary.exists()


def test_in_place_of_a_rolling_checkpoint_it_is_refused(tmp_path: Path, canary: Path, malicious: bytes) -> None:
    (tmp_path / "latest").mkdir()
    weights = {"w": torch.nn.Parameter(torch.zeros(2, 2))}
    optimizer = AdamW(Flat(list(weights.values())), 0.9, 0.999, 1e-8, 0.0)
    for name in NAMES:
        (tmp_path / "latest" / name).write_bytes(malicious)
    assert load_state(tmp_path, weights, optimizer) == Position()  # as if there were none
    (tmp_path / "latest" / "state.safetensors").write_bytes(b"PK\x03\x04" + malicious)
    with pytest.raises(UserError, match=r"state\.safetensors: .*it is a PyTorch file, which could run code"):
        load_state(tmp_path, weights, optimizer)
    assert not canary.exists()


def test_named_by_an_index_it_is_refused(folder: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", str(folder / "pytorch_model.bin"), "../model/pytorch_model.bin"):
        weights = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
        with pytest.raises(UserError, match=r"only \.safetensors files of the same directory"):
            load_model(str(folder), device="cpu")
    assert not canary.exists()


def test_under_the_name_of_a_tokenizer_it_is_refused(folder: Path, canary: Path, malicious: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(malicious)
    with pytest.raises(UserError, match=r"cannot read tokenizer\.json"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):  # tokenizer.model is no substitute
        load_tokenizer(str(folder))
    assert not canary.exists()
