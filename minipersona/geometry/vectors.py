"""Persona vectors with the samples they are means of, and their file.

Shapes: P = personas, Q = questions, D = width.

The file is a safetensors file with a pair of fp32 tensors a layer,

    layer.20.mean      (P, D)      the persona vectors
    layer.20.samples   (P, Q, D)   what they are means of: for the bootstrap, variances and cross-validation

and text metadata: `personas`, the names as a JSON list; `convention`, what a layer number means; and whatever
else made the vectors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from minipersona.errors import UserError
from minipersona.files import write_atomically
from minipersona.geometry.measures import persona_vectors
from minipersona.model.tensor_file import in_order, open_safetensors

CONVENTION = (
    "layer L is the residual stream leaving decoder block L, blocks counted from 0, before the final norm: "
    "hidden_states[L + 1] in Hugging Face's numbering, but for the last block, where theirs is after the norm"
)
RESPONSE_TOKENS = "response_tokens"  # the name of that tensor in a file
OWN_KEYS = ("personas", "convention")  # metadata that the file format writes itself


@dataclass(frozen=True, eq=False)
class PersonaVectors:
    """The residuals of P personas at Q questions, at one layer or several.

    samples    layer -> (P, Q, D) fp32; layer L is the stream leaving decoder block L, blocks counted from 0
    personas   the P names, in order
    metadata   what made them, text to text. `compare` holds the JSON lists `questions` and `system_prompts`
               of two vectors against each other where both have them
    response_tokens  (P, Q) int32, the length of every response (Method B); None where there is none

    Raises UserError where shapes or types do not fit or a value is not finite.
    """

    samples: dict[int, Tensor]
    personas: list[str]
    metadata: dict[str, str] = field(default_factory=dict)
    response_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise UserError("no layer in these persona vectors: extract at least one")
        asked = {samples.shape[1] for samples in self.samples.values() if samples.ndim == 3}
        for layer, samples in self.samples.items():
            shape = tuple(samples.shape)
            if len(shape) != 3 or 0 in shape or shape[0] != len(self.personas) or len(asked) != 1:
                expected = f"({len(self.personas)} personas, questions, width)"
                raise UserError(f"samples of layer {layer} are {shape}, not {expected}: extract again")
            if samples.dtype != torch.float32:
                raise UserError(f"samples of layer {layer} are {samples.dtype}: convert them to float32")
            finite = samples.isfinite().all(-1)  # (P, Q)
            if not bool(finite.all()):
                persona, question = (~finite).nonzero()[0].tolist()
                where = f"layer {layer}, persona {self.personas[persona]!r}, question {question}"
                raise UserError(f"{where} is not finite: check whether the model has diverged")
            counts = self.response_tokens
            if counts is not None and (counts.shape != samples.shape[:2] or counts.dtype != torch.int32):
                raise UserError(f"{RESPONSE_TOKENS} is not an int32 table of personas and questions: extract again")

    @property
    def layers(self) -> list[int]:
        """The layers present, ascending."""
        return sorted(self.samples)

    def at(self, layer: int) -> Tensor:
        """The samples (P, Q, D) fp32 at a layer. Raises UserError where that was not extracted."""
        if layer not in self.samples:
            raise UserError(f"no layer {layer} in these persona vectors: choose from {self.layers}")
        return self.samples[layer]

    def mean(self, layer: int) -> Tensor:
        """The persona vectors (P, D) at a layer: means over questions, fp32, summed in fp64."""
        return persona_vectors(self.at(layer))

    def save(self, path: str | Path) -> None:
        """Write the file that `load_vectors` reads, all or nothing."""
        tensors = {}
        for layer in self.layers:
            tensors[f"layer.{layer}.mean"] = self.mean(layer).cpu()
            tensors[f"layer.{layer}.samples"] = self.samples[layer].cpu().contiguous()
        if self.response_tokens is not None:
            tensors[RESPONSE_TOKENS] = self.response_tokens.cpu().contiguous()
        own = {"personas": json.dumps(self.personas, ensure_ascii=False), "convention": CONVENTION}
        assert not set(own) & set(self.metadata)
        content = in_order(serialise(tensors, {**self.metadata, **own}))
        with write_atomically(path, len(content)) as temporary:
            temporary.write_bytes(content)


def response_lengths(vectors: PersonaVectors) -> dict[str, dict[str, float]]:
    """Tokens of each persona's responses (Method B). Where they differ, so do the means, whatever the persona."""
    assert vectors.response_tokens is not None, "Method A has no responses"
    return {
        persona: {
            "mean": float(counts.double().mean()),
            "shortest": int(counts.min()),
            "longest": int(counts.max()),
            "empty": int((counts == 0).sum()),
        }
        for persona, counts in zip(vectors.personas, vectors.response_tokens, strict=True)
    }


def load_vectors(path: str | Path, layer: int | None = None) -> PersonaVectors:
    """Read a vectors file; of several layers only the one that `layer` names, if it names one.

    Raises UserError, in one line that names the file, where it is missing, truncated or no safetensors file,
    where that layer, or a layer's mean or samples are missing, where these disagree, or where `PersonaVectors` would
    refuse them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no vectors file at {path}: make one with `extract.py --out {path}`")
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        names = list(file.keys())
        wanted = names if layer is None else [name for name in names if _concerns(name, layer)]
        tensors = {name: file.get_tensor(name) for name in wanted}
    try:
        if layer is not None and not set(tensors) - {RESPONSE_TOKENS}:
            raise UserError(f"no layer {layer} among {', '.join(names)[:200]}: extract that layer")
        return _from_file(tensors, metadata)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _concerns(name: str, layer: int) -> bool:
    """Whether a tensor of a vectors file is one of this layer, or of all."""
    return name in (f"layer.{layer}.mean", f"layer.{layer}.samples", RESPONSE_TOKENS)


def _from_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> PersonaVectors:
    response_tokens = tensors.pop(RESPONSE_TOKENS, None)
    names = {name: re.fullmatch(r"layer\.(-?\d+)\.(mean|samples)", name) for name in tensors}
    for name, match in names.items():
        if match is None:
            raise UserError(f"unknown tensor {name!r}: give a file that extract.py wrote")
    layers = {int(match[1]) for match in names.values() if match}
    for layer in layers:
        for part in ("mean", "samples"):
            if f"layer.{layer}.{part}" not in tensors:
                raise UserError(f"no tensor layer.{layer}.{part}: give a file that extract.py wrote")
    samples = {layer: tensors[f"layer.{layer}.samples"] for layer in layers}
    others = {key: text for key, text in metadata.items() if key not in OWN_KEYS}
    vectors = PersonaVectors(samples, _names(metadata), others, response_tokens)
    for layer in vectors.layers:
        _check_mean(layer, tensors[f"layer.{layer}.mean"], vectors.mean(layer))
    return vectors


def _names(metadata: dict[str, str]) -> list[str]:
    try:
        names = json.loads(metadata.get("personas", ""))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("no names under 'personas' in the metadata: give a file that extract.py wrote")
    return names


def _check_mean(layer: int, stored: Tensor, mean: Tensor) -> None:
    """`stored` must be the (P, D) fp32 mean, but for the rounding of an fp32 sum over questions."""
    fits = stored.shape == mean.shape and stored.dtype == mean.dtype
    if not fits or not bool(((stored - mean).norm(dim=-1) <= 1e-5 * mean.norm(dim=-1)).all()):
        raise UserError(f"layer.{layer}.mean is not the fp32 mean of layer.{layer}.samples: extract again")
