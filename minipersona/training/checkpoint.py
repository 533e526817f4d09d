"""The rolling checkpoint: everything a run needs to go on, in one file that is replaced whole.

latest/state.safetensors holds weights, both moments and the RNG, and in its metadata the step and the optimizer's
count; its rename is the moment at which the checkpoint exists. latest/state.json repeats the words for people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minipersona.errors import UserError
from minipersona.files import parse_json, read_json, write_atomically, write_json
from minipersona.model.tensor_file import open_safetensors
from minipersona.training.optimizer import AdamW


@dataclass(frozen=True)
class Position:
    """Where a run stands. The data position follows from the step (`corpus.order`)."""

    step: int = 0
    updates: int = 0  # fewer than steps where a step was skipped
    done: bool = False


def _state_file(directory: Path) -> Path:
    return directory / "latest" / "state.safetensors"


def save_state(directory: Path, position: Position, trainable: dict[str, nn.Parameter], optimizer: AdamW) -> None:
    """Replace the rolling checkpoint. A finished run keeps its words and drops its tensors."""
    words: dict[str, Any] = {"step": position.step, "updates": position.updates, "done": position.done}
    if not position.done:
        tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        for (name, weight), first, second in zip(trainable.items(), optimizer.first, optimizer.second, strict=True):
            tensors |= {f"weight.{name}": weight.detach(), f"first.{name}": first, f"second.{name}": second}
        with write_atomically(_state_file(directory), sum(t.nbytes for t in tensors.values())) as temporary:
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary, {"state": json.dumps(words)})
    write_json(directory / "latest" / "state.json", words)
    if position.done:
        _state_file(directory).unlink(missing_ok=True)


def load_state(directory: Path, trainable: dict[str, nn.Parameter], optimizer: AdamW) -> Position:
    """Restore the newest state in place, and say where it stands; a run without one stands at step 0."""
    words_file = directory / "latest" / "state.json"
    if not _state_file(directory).is_file():
        position = _position(read_json(words_file), words_file) if words_file.is_file() else Position()
        return position if position.done else Position()
    file = _state_file(directory)
    with open_safetensors(file) as handle:
        position = _position(parse_json((handle.metadata() or {}).get("state", "{}")), file)
        found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
        expected = {"rng.cpu": tuple(torch.get_rng_state().shape)}
        for name, weight in trainable.items():
            expected |= {f"{kind}.{name}": tuple(weight.shape) for kind in ("weight", "first", "second")}
        if not expected.items() <= found.items():
            raise UserError(f"{file}: holds another run's state; delete {directory / 'latest'} to start over")
        with torch.no_grad():
            for index, (name, weight) in enumerate(trainable.items()):
                weight.copy_(handle.get_tensor(f"weight.{name}"))
                optimizer.first[index].copy_(handle.get_tensor(f"first.{name}"))
                optimizer.second[index].copy_(handle.get_tensor(f"second.{name}"))
        torch.set_rng_state(handle.get_tensor("rng.cpu"))
        if torch.cuda.is_available() and "rng.cuda" in handle.keys():
            torch.cuda.set_rng_state(handle.get_tensor("rng.cuda"))
    optimizer.updates = position.updates
    return position


def _position(words: Any, file: Path) -> Position:
    """The position that a file's words name."""
    kinds = {"step": int, "updates": int, "done": bool}
    if not isinstance(words, dict) or {key: type(value) for key, value in words.items()} != kinds:
        raise UserError(f"{file}: holds no state of a run; delete {file.parent} to start over")
    return Position(**words)
