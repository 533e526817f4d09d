"""The rolling checkpoint: everything a run needs to go on, in files that replace the former ones whole.

latest/state.safetensors holds weights, both moments and the RNG, and in its metadata the step and the optimizer's
count; its rename is the moment at which the checkpoint exists. latest/state.json repeats the words for people.

Sharded ranks write a file each, state-<step>.<rank>-of-<ranks>.safetensors, with their rows of every tensor. Once all
of them are there, latest/state.json names the step and the number of files: its rename is the moment then. Any number
of ranks can continue from either form, since a rank reads the rows that it keeps from whichever files hold them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipersona.errors import UserError
from minipersona.files import parse_json, read_json, write_atomically, write_json
from minipersona.model.tensor_file import open_safetensors
from minipersona.training.layout import Flat
from minipersona.training.optimizer import AdamW
from minipersona.training.world import World

KINDS = ("weight", "first", "second")


@dataclass(frozen=True)
class Position:
    """Where a run stands. The data position follows from the step (`corpus.order`)."""

    step: int = 0
    updates: int = 0  # fewer than steps where a step was skipped
    done: bool = False


def _state_file(directory: Path) -> Path:
    return directory / "latest" / "state.safetensors"


def _shard_file(directory: Path, step: int, rank: int, ranks: int) -> Path:
    return directory / "latest" / f"state-{step:06}.{rank + 1}-of-{ranks}.safetensors"


def save_state(directory: Path, position: Position, names: Mapping[str, Any], optimizer: AdamW, world: World) -> None:
    """Replace the rolling checkpoint. A finished run keeps its words and drops its tensors.

    names  of the parameters, in the order of the optimizer's layout
    Sharded ranks call it together; otherwise the first one does.
    """
    words = asdict(position)
    latest = directory / "latest"
    sharded = not isinstance(optimizer.layout, Flat)
    ranks = range(world.size) if sharded else range(1)
    files = [_shard_file(directory, position.step, r, world.size) if sharded else _state_file(directory) for r in ranks]
    if not position.done:
        _write(files[world.rank], names, optimizer, words)
    if sharded:
        world.wait()  # until all files are there
    if world.first:
        write_json(latest / "state.json", {**words, "files": world.size} if sharded and not position.done else words)
        for file in latest.glob("state*.safetensors"):
            if position.done or file not in files:
                file.unlink(missing_ok=True)
    if sharded:
        world.wait()  # until the new state is the one that counts


def _write(file: Path, names: Mapping[str, Any], optimizer: AdamW, words: dict[str, Any]) -> None:
    layout = optimizer.layout
    tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, *kept in zip(names, layout.weights, layout.first, layout.second, strict=True):
        tensors |= {f"{kind}.{name}": tensor.detach() for kind, tensor in zip(KINDS, kept, strict=True)}
    with write_atomically(file, sum(t.nbytes for t in tensors.values())) as temporary:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary, {"state": json.dumps(words)})


def load_state(directory: Path, names: Mapping[str, Any], optimizer: AdamW) -> Position:
    """Restore the newest state in place, and say where it stands; a run without one stands at step 0."""
    words_file = directory / "latest" / "state.json"
    files = _files(directory)
    if not files:
        position = _position(read_json(words_file), words_file) if words_file.is_file() else Position()
        return position if position.done else Position()
    with ExitStack() as stack:
        handles = [stack.enter_context(open_safetensors(file)) for file in files]
        position = _position(parse_json((handles[0].metadata() or {}).get("state", "{}")), files[0])
        if not _belongs(handles, names):
            raise UserError(f"{files[0]}: holds another run's state; delete {directory / 'latest'} to start over")
        layout = optimizer.layout
        with torch.no_grad():
            for index, (name, *kept) in enumerate(zip(names, layout.weights, layout.first, layout.second, strict=True)):
                for kind, tensor in zip(KINDS, kept, strict=True):
                    tensor.copy_(_rows(handles, f"{kind}.{name}", layout.rows(index)))
        torch.set_rng_state(handles[0].get_tensor("rng.cpu"))
        if torch.cuda.is_available() and "rng.cuda" in handles[0].keys():
            torch.cuda.set_rng_state(handles[0].get_tensor("rng.cuda"))
    optimizer.updates = position.updates
    return position


def _files(directory: Path) -> list[Path]:
    """The files of the newest complete checkpoint that still has its tensors."""
    words_file = directory / "latest" / "state.json"
    words = read_json(words_file) if words_file.is_file() else {}
    ranks = words.get("files") if isinstance(words, dict) else None
    if isinstance(ranks, int) and 0 < ranks < 10_000:
        shards = [_shard_file(directory, _position(words, words_file).step, rank, ranks) for rank in range(ranks)]
        for file in shards:
            if not file.is_file():
                raise UserError(f"{file}: this part of the checkpoint is missing; copy it there, or delete the folder")
        return shards
    return [file] if (file := _state_file(directory)).is_file() else []


def _belongs(handles: Sequence[Any], names: Mapping[str, Any]) -> bool:
    """Whether the files together hold tensors of just these parameters' shapes; torch would stretch some to fit."""
    expected = {f"{kind}.{name}": tuple(parameter.shape) for name, parameter in names.items() for kind in KINDS}
    if not all({"rng.cpu", *expected} <= set(handle.keys()) for handle in handles):
        return False

    def fits(key: str, shape: tuple[int, ...], handles: Sequence[Any] = handles) -> bool:
        parts = [tuple(handle.get_slice(key).get_shape()) for handle in handles]
        rows = all(part[1:] == shape[1:] and len(part) == len(shape) for part in parts)
        return rows and sum(part[0] for part in parts) == shape[0]

    generator = tuple(torch.get_rng_state().shape)
    return fits("rng.cpu", generator, handles[:1]) and all(fits(key, shape) for key, shape in expected.items())


def _rows(handles: Sequence[Any], name: str, rows: slice) -> Tensor:
    """These rows of a tensor whose rows lie one file after another."""
    pieces = [handle.get_slice(name) for handle in handles]
    found, start = [], 0
    for piece in pieces:
        stop = start + piece.get_shape()[0]
        if max(start, rows.start) < min(stop, rows.stop):
            found.append(piece[max(rows.start - start, 0) : min(rows.stop, stop) - start])
        start = stop
    return torch.cat(found) if found else torch.empty(0, *pieces[0].get_shape()[1:])


def _position(words: Any, file: Path) -> Position:
    """The position that a file's words name."""
    kinds = {"step": int, "updates": int, "done": bool}
    known = {key: value for key, value in words.items() if key != "files"} if isinstance(words, dict) else {}
    if {key: type(value) for key, value in known.items()} != kinds:
        raise UserError(f"{file}: holds no state of a run; delete {file.parent} to start over")
    return Position(**known)
