"""The rolling checkpoint: everything a run needs to continue, in files that are replaced as a whole.

latest/state.safetensors holds weights, both moments and the RNG, and in its metadata the step and the optimizer's
count; its rename is the moment at which the checkpoint exists. latest/state.json repeats the metadata for people.

Sharded ranks write a file each, state-<step>.<rank>-of-<ranks>.safetensors, with their rows of every tensor. Once all
of them exist, latest/state.json names the step, the number of files and a number that all of them contain: its rename
is the moment then. Any number of ranks can continue from either form, since a rank reads the rows that it stores from
whichever files hold them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
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
from minipersona.training.distributed import Distributed
from minipersona.training.optimizer import AdamW, Flat, Layout

KINDS = ("weight", "first", "second")  # as the file names them: the parameter and Adam's moments m and v


@dataclass(frozen=True)
class Position:
    """Where a run stands. The data position follows from the step (`corpus.batch.RowOrder`)."""

    step: int = 0
    updates: int = 0  # fewer than steps where a step was skipped
    done: bool = False


def _state_file(directory: Path) -> Path:
    return directory / "latest" / "state.safetensors"


def _metadata_file(directory: Path) -> Path:
    return directory / "latest" / "state.json"


def _part_file(directory: Path, step: int, rank: int, ranks: int) -> Path:
    return directory / "latest" / f"state-{step:06}.{rank + 1}-of-{ranks}.safetensors"


def save_state(
    directory: Path, position: Position, names: Mapping[str, Any], optimizer: AdamW, distributed: Distributed
) -> None:
    """Replace the rolling checkpoint. A finished run keeps state.json and drops its tensors.

    names  of the parameters, in the order of the optimizer's layout
    Sharded ranks call it together; otherwise only the first one does.
    """
    if isinstance(optimizer.layout, Flat):
        _save_whole(directory, position, names, optimizer)
    else:
        _save_part(directory, position, names, optimizer, distributed)
    if position.done and distributed.first:
        drop_tensors(directory)


def _save_whole(directory: Path, position: Position, names: Mapping[str, Any], optimizer: AdamW) -> None:
    if not position.done:
        _write(_state_file(directory), names, optimizer, asdict(position))
    write_json(_metadata_file(directory), asdict(position))
    _drop(directory, all_but=[_state_file(directory)])


def _save_part(
    directory: Path, position: Position, names: Mapping[str, Any], optimizer: AdamW, distributed: Distributed
) -> None:
    metadata: dict[str, Any] = asdict(position)
    if distributed.first and not _metadata_file(directory).is_file():
        write_json(_metadata_file(directory), asdict(Position()))  # parts without such a file are refused as incomplete
    # One number in all parts of this checkpoint tells them apart from parts of others.
    save = distributed.broadcast(secrets.randbits(62))
    files = [_part_file(directory, position.step, rank, distributed.size) for rank in range(distributed.size)]
    if not position.done:
        _write(
            files[distributed.rank], names, optimizer, {**metadata, **_part(distributed.rank, distributed.size, save)}
        )
        metadata |= {"files": distributed.size, "save": save}
    distributed.barrier()  # all parts exist
    if distributed.first:
        write_json(_metadata_file(directory), metadata)
        _drop(directory, all_but=files)
    distributed.barrier()  # the new checkpoint has replaced the old one


def _part(rank: int, ranks: int, save: int) -> dict[str, int]:
    return {"part": rank + 1, "files": ranks, "save": save}


def drop_tensors(directory: Path) -> None:
    """Delete the state of a finished run: nothing will continue from it."""
    _drop(directory, all_but=[])


def _drop(directory: Path, all_but: Sequence[Path]) -> None:
    for file in (directory / "latest").glob("state*.safetensors"):
        if file not in all_but:
            file.unlink(missing_ok=True)


def _write(file: Path, names: Mapping[str, Any], optimizer: AdamW, metadata: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, index, tensor in _stored(names, optimizer.layout):
        tensors[name] = tensor.detach()[optimizer.layout.saved_rows(index)]
    with write_atomically(file, sum(t.nbytes for t in tensors.values())) as temporary:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary, {"state": json.dumps(metadata)})


def _stored(names: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, int, Tensor]]:
    """All that a rank stores: (name in the file, index of the parameter, tensor)."""
    for index, (name, *tensors) in enumerate(
        zip(names, layout.weights, layout.exp_avg, layout.exp_avg_sq, strict=True)
    ):
        for kind, tensor in zip(KINDS, tensors, strict=True):
            yield f"{kind}.{name}", index, tensor


def load_state(directory: Path, names: Mapping[str, Any], optimizer: AdamW) -> Position:
    """Restore the newest checkpoint in place and return its position; without one, step 0."""
    position = stored_position(directory)
    files = _files(directory)
    if not files:
        return position if position.done else Position()
    with ExitStack() as stack:
        handles = [stack.enter_context(open_safetensors(file)) for file in files]
        metadata = [parse_json((handle.metadata() or {}).get("state", "{}")) for handle in handles]
        if files[0] == _state_file(directory):
            position = _position(metadata[0], files[0])
        else:
            _check_parts(directory, files, metadata)
        if not _belongs(handles, names):
            raise UserError(f"{files[0]}: holds another run's state; delete {directory / 'latest'} to start over")
        with torch.no_grad():
            for name, index, tensor in _stored(names, optimizer.layout):
                tensor.copy_(_rows(handles, name, optimizer.layout.rows(index)))
        torch.set_rng_state(handles[0].get_tensor("rng.cpu"))
        if torch.cuda.is_available() and "rng.cuda" in handles[0].keys():
            torch.cuda.set_rng_state(handles[0].get_tensor("rng.cuda"))
    optimizer.updates = position.updates
    return position


def stored_position(directory: Path) -> Position:
    """The position in a run's latest/state.json; step 0 if there is none."""
    file = _metadata_file(directory)
    return _position(read_json(file), file) if file.is_file() else Position()


def _files(directory: Path) -> list[Path]:
    """The files of the newest complete checkpoint that still has its tensors."""
    metadata_file = _metadata_file(directory)
    metadata = read_json(metadata_file) if metadata_file.is_file() else {}
    if "files" in metadata:
        position = _position(metadata, metadata_file)
        parts = [_part_file(directory, position.step, rank, metadata["files"]) for rank in range(metadata["files"])]
        for file in parts:
            if not file.is_file():
                raise UserError(f"{file}: this part of the checkpoint is missing; {_over(directory)}")
        return parts
    if not metadata and (parts := sorted((directory / "latest").glob("state-*.safetensors"))):
        raise UserError(f"{metadata_file}: is missing, so {parts[0].name} may be incomplete; {_over(directory)}")
    return [file] if (file := _state_file(directory)).is_file() else []


def _check_parts(directory: Path, files: Sequence[Path], metadata: Sequence[Any]) -> None:
    """UserError unless each file is the part that its name says, of the checkpoint that state.json names."""
    named = read_json(_metadata_file(directory))
    position = asdict(_position(named, _metadata_file(directory)))
    for rank, (file, found) in enumerate(zip(files, metadata, strict=True)):
        if found != {**position, **_part(rank, len(files), named["save"])}:
            raise UserError(f"{file}: is not the part of the checkpoint that state.json names; {_over(directory)}")


def _over(directory: Path) -> str:
    return f"put the right file there, or delete {directory / 'latest'} to start the run over"


def _belongs(handles: Sequence[Any], names: Mapping[str, Any]) -> bool:
    """Whether the files together hold tensors of exactly these parameters' shapes; torch would broadcast some."""
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
    """These rows of a tensor whose rows are split over the files, in their order."""
    parts = [handle.get_slice(name) for handle in handles]
    found, start = [], 0
    for part in parts:
        stop = start + part.get_shape()[0]
        if max(start, rows.start) < min(stop, rows.stop):
            found.append(part[max(rows.start - start, 0) : min(rows.stop, stop) - start])
        start = stop
    return torch.cat(found) if found else torch.empty(0, *parts[0].get_shape()[1:])


def _position(metadata: Any, file: Path) -> Position:
    """The position in a file's metadata or in state.json."""
    kinds = {"step": int, "updates": int, "done": bool}
    if isinstance(metadata, dict) and "files" in metadata:
        kinds |= {"files": int, "save": int}
    known = isinstance(metadata, dict) and {key: type(value) for key, value in metadata.items()} == kinds
    if not known or metadata["step"] < 0 or not 0 < metadata.get("files", 1) < 10_000:
        raise UserError(f"{file}: is not a run's state; delete {file.parent} to start over")
    return Position(metadata["step"], metadata["updates"], metadata["done"])
