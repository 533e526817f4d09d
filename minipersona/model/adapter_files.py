"""Adapters on disk, in PEFT's format: peft loads ours, and its LoRA adapters load here.

They are directories, or repositories of the Hugging Face Hub, and name the base model that they were made for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipersona.errors import UserError
from minipersona.files import data_dir, read_json, sha256, user_path, write_directory_atomically, write_json
from minipersona.hub import HUB_ID, locate
from minipersona.model.adapter_config import read_adapter_config
from minipersona.model.load import architecture
from minipersona.model.lora import adapted_layers, adapters, attach
from minipersona.model.network import Qwen2
from minipersona.model.tensor_file import FLOATS, open_safetensors
from minipersona.model.weights import other_formats

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def adapter_tensors(model: Qwen2) -> dict[str, Tensor]:
    """The adapters under PEFT's names, fp32, on the CPU."""
    return {
        _peft_name(name, factor): getattr(adapter, factor).detach().float().cpu().contiguous()
        for name, adapter in adapters(model).items()
        for factor in ("lora_A", "lora_B")
    }


def _peft_name(layer: str, factor: str) -> str:
    return f"base_model.model.{layer}.{factor}.weight"


def save_adapter(model: Qwen2, path: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them; whole or not at all.

    UserError where no adapter is attached to the model.
    """
    if model.lora is None:
        raise UserError("save_adapter: the model has no adapter; attach one with apply_lora or load_adapter")
    tensors = adapter_tensors(model)
    with write_directory_atomically(path, needs=sum(tensor.nbytes for tensor in tensors.values())) as directory:
        save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
        write_json(
            directory / CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": model.source.get("name"),
                "revision": model.source.get("revision"),
                **model.lora.to_json(),
                "bias": "none",
                "fan_in_fan_out": False,
                "init_lora_weights": True,
                "use_dora": False,
                "inference_mode": True,
            },
        )


# ---------------------------------------------------------------- reading


def find_adapter(name: str | Path) -> Path:
    """The directory of an adapter: itself, or that of a hub id in the Hub's cache; UserError where there is none."""
    path = user_path(name)
    if path.exists() or not re.fullmatch(HUB_ID, str(name)):
        return path
    return locate(str(name), [CONFIG, TENSORS])


def config_file(path: Path) -> Path:
    """The adapter_config.json of a directory; UserError where there is none."""
    if (file := path / CONFIG).is_file():
        return file
    whole = (path / "config.json").is_file()  # what a full-parameter run leaves at a step
    mend = "it holds a whole model, name it with --model" if whole else "name a directory that holds a PEFT adapter"
    raise UserError(f"{path}: no {CONFIG}; {mend}")


def load_adapter(model: Qwen2, name_or_path: str | Path) -> None:
    """Attach a PEFT adapter, a directory or a hub id, replacing any adapters; every tensor must be used and must fit.

    The model is left as it was where the files are at fault, or where the adapter was made for another commit of it.
    """
    path = find_adapter(name_or_path)
    file, weights = config_file(path), path / TENSORS
    config = read_adapter_config(file)
    _check_commit(file, str(model.source.get("name")), model.source.get("revision"))
    if not weights.is_file():
        raise UserError(f"{path}: holds no {TENSORS}; {other_formats(path)}")
    try:
        layers = adapted_layers(model, config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    expected = {}
    for name, layer in layers.items():
        outputs, inputs = layer.weight.shape
        expected[_peft_name(name, "lora_A")] = (config.rank(name), inputs)
        expected[_peft_name(name, "lora_B")] = (outputs, config.rank(name))
    tensors = _read(weights, expected)
    attach(model, config)
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            for factor in ("lora_A", "lora_B"):
                getattr(adapter, factor).copy_(tensors[_peft_name(name, factor)])
    model.source["adapter"] = f"{name_or_path} (sha256 {sha256(weights)})"  # vectors say which adapter made them


def _read(file: Path, expected: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The tensors of an adapter. Names, shapes and types are checked before any is read."""
    with open_safetensors(file) as handle:
        names = list(handle.keys())
        if odd := sorted(expected.keys() ^ set(names)):
            side = "lacks" if odd[0] in expected else "has an unknown tensor"
            raise UserError(f"{file}: {side} {odd[0][:200]}; was the adapter made for this model?")
        for name in names:
            piece, wanted = handle.get_slice(name), expected[name]
            found, kind = tuple(piece.get_shape()), piece.get_dtype()
            if found != wanted or kind not in FLOATS:
                raise UserError(f"{file}: {name} is {found} {kind}, this model needs {wanted}; check --model")
        tensors = {name: handle.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds non-finite values; the adapter is damaged, fetch it again")
    return tensors


# ---------------------------------------------------------------- the base of an adapter


def choose_base(
    adapter: str | Path, name: str | None, revision: str | None, say: Callable[[str], None]
) -> tuple[str, str | None]:
    """The model that an adapter is attached to and its revision: `name` and `revision`, else what the adapter names.

    Says so where `name` is another model than the adapter names. UserError where the adapter names no model or one
    that is not available, or where `revision` is another commit of it than the adapter names.
    """
    file = config_file(find_adapter(adapter))
    base, recorded = _base(file)
    if name and (base is None or _place(name) != _place(base)):
        if base is not None:
            say(f"{adapter}: was made for {base}, and is attached to {name}")
        return name, revision
    if base is None:
        raise UserError(f"{file}: names no base model (base_model_name_or_path); give it with --model")
    _check_commit(file, base, revision)
    if revision and recorded and revision != recorded:
        say(f"{adapter}: was made for {base} at {recorded}, and is attached to {revision}")
    if not name:
        try:
            architecture(base, revision or recorded)
        except UserError as error:
            raise UserError(f"{file}: its base model is not available ({error}); give it with --model") from None
    return name or base, revision or recorded


def _base(file: Path) -> tuple[str | None, str | None]:
    """The model that an adapter was made for, and its revision, as far as adapter_config.json has them."""
    raw: Any = read_json(file)
    values = [raw.get(key) if isinstance(raw, dict) else None for key in ("base_model_name_or_path", "revision")]
    name, revision = (value if isinstance(value, str) and value else None for value in values)
    return name, revision


def _place(name: str) -> Path | str:
    """What tells one model from another: a directory's resolved path, else the name."""
    path = data_dir() / "tiny" if name == "tiny" else user_path(name)
    return path.resolve() if path.is_dir() else name


def _check_commit(file: Path, name: str, revision: str | None) -> None:
    """UserError where an adapter was made for another commit of the model `name` than `revision`."""
    base, recorded = _base(file)
    commits = all(re.fullmatch(r"[0-9a-f]{40}", text or "") for text in (recorded, revision))
    if commits and recorded != revision and base is not None and _place(base) == _place(name):
        raise UserError(f"{file}: was made for {base} at {recorded}, and this is {revision}; leave --revision out")
