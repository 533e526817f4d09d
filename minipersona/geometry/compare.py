"""Two sets of persona vectors side by side: has the geometry changed, by how much, and in which way?

Shapes: P = personas, Q = questions, D = width. a is the reference (the base model, say), b the other.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.measures import ROUNDING, collapse_direction, m1
from minipersona.geometry.statistics import SEED, bootstrap_m1_difference, permutation_test
from minipersona.geometry.vectors import PersonaVectors


@dataclass(frozen=True)
class PersonaShift:
    """How one persona's vector moved from a to b.

    norm            ||b_p - a_p||, in activation units
    cosine          cosine of a_p and b_p
    collapse_share  the share of ||b_p - a_p||^2 that lies along the collapse direction, the mean shift of all
                    personas, in [0, 1]; near 1 / P for shifts that are unrelated, since each is part of the
                    mean. None where the persona or the mean did not move
    """

    persona: str
    norm: float
    cosine: float
    collapse_share: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds. Differences are b less a.

    m1_difference_interval   paired percentile bootstrap over questions, at `level`
    p_questions, p_personas  two-sided paired permutation tests of the M1 difference, which swap a and b
                             per question or per persona
    procrustes               distance of the two configurations' shapes, in [0, sqrt 2]; see `procrustes`
    spread_ratio             the scale that this leaves out: root mean squared distance to the mean, b over a;
                             below 1 the personas drew together
    collapse_norm            length of the collapse direction, the mean over personas of b_p - a_p
    """

    layer: int
    questions: int
    m1_a: float
    m1_b: float
    m1_difference: float
    m1_difference_interval: tuple[float, float]
    level: float
    p_questions: float
    p_personas: float
    procrustes: float | None
    spread_ratio: float | None
    collapse_norm: float
    shifts: tuple[PersonaShift, ...]

    def to_json(self) -> dict[str, object]:
        """Plain numbers, lists and dicts, ready for `json.dumps`."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def compare(
    vectors_a: PersonaVectors,
    vectors_b: PersonaVectors,
    layer: int | None = None,
    resamples: int = 1000,
    seed: int = SEED,
    level: float = 0.95,
) -> Comparison:
    """Compare two extractions of the same personas and questions at `layer`, by default the one both have.

    Raises UserError where personas, questions, methods or widths differ, naming the difference, or where there is
    no single common layer.
    """
    layer = _common_layer(vectors_a, vectors_b) if layer is None else layer
    samples_a, samples_b = vectors_a.at(layer), vectors_b.at(layer)  # (P, Q, D)
    _check_same(vectors_a, vectors_b, layer)
    a, b = vectors_a.mean(layer), vectors_b.mean(layer)  # (P, D)
    m1_a, m1_b = m1(a), m1(b)
    distance, ratio = procrustes(a, b)
    return Comparison(
        layer=layer,
        questions=samples_a.shape[1],
        m1_a=m1_a,
        m1_b=m1_b,
        m1_difference=m1_b - m1_a,
        m1_difference_interval=bootstrap_m1_difference(samples_a, samples_b, resamples, seed, level),
        level=level,
        p_questions=permutation_test(samples_a, samples_b, "questions", resamples, seed),
        p_personas=permutation_test(samples_a, samples_b, "personas", resamples, seed),
        procrustes=distance,
        spread_ratio=ratio,
        collapse_norm=float(collapse_direction(a, b).norm()),
        shifts=_shifts(vectors_a.personas, a, b),
    )


def procrustes(a: Tensor, b: Tensor) -> tuple[float | None, float | None]:
    """Orthogonal Procrustes distance of two configurations, (P, D) twice -> (distance, spread ratio b / a).

    Both are centred over personas and scaled to Frobenius norm 1; then distance = min_R ||A R - B||_F over
    orthogonal R = sqrt(2 - 2 ||A^T B||_*), the nuclear norm (Schoenemann 1966): 0 for the same shape up to
    translation, rotation, reflection and scale, sqrt 2 at most. None where all personas of a or b are equal.
    """
    a, b = a.double(), b.double()
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    spread_a, spread_b = float(centred_a.norm()), float(centred_b.norm())
    if spread_a <= ROUNDING * float(a.norm()) or spread_b <= ROUNDING * float(b.norm()):
        return None, None
    # ||A^T B||_* of a (D, D) matrix of rank < P: the same of the small triangular factors of A^T and B^T
    triangle_a = torch.linalg.qr(centred_a.T / spread_a).R  # (min(P, D), P)
    triangle_b = torch.linalg.qr(centred_b.T / spread_b).R
    overlap = float(torch.linalg.svdvals(triangle_a @ triangle_b.T).sum())
    return math.sqrt(max(0.0, 2 - 2 * overlap)), spread_b / spread_a


def _shifts(personas: list[str], a: Tensor, b: Tensor) -> tuple[PersonaShift, ...]:
    a, b = a.double(), b.double()
    moved = b - a  # (P, D)
    along = moved @ moved.mean(0)  # (P,)
    norms, collapse = moved.norm(dim=-1), moved.mean(0).norm()
    shares = (along / (norms * collapse)).square().clamp(max=1)  # nan, 0 / 0, where something did not move
    cosine = torch.cosine_similarity(a, b, dim=-1)
    return tuple(
        PersonaShift(name, float(norms[p]), float(cosine[p]), None if shares[p].isnan() else float(shares[p]))
        for p, name in enumerate(personas)
    )


def common_layers(vectors_a: PersonaVectors, vectors_b: PersonaVectors) -> list[int]:
    """The layers that both have, ascending; UserError where there are none."""
    common = sorted(set(vectors_a.layers) & set(vectors_b.layers))
    if not common:
        raise UserError(f"layers {vectors_a.layers} and {vectors_b.layers}: extract both at a common layer")
    return common


def _common_layer(vectors_a: PersonaVectors, vectors_b: PersonaVectors) -> int:
    common = common_layers(vectors_a, vectors_b)
    if len(common) > 1:
        raise UserError(f"both have the layers {common}: choose one of them, with `layer`")
    return common[0]


def _check_same(vectors_a: PersonaVectors, vectors_b: PersonaVectors, layer: int) -> None:
    """The pairing by persona and by question is only one where both lists are the same, and so is the method."""
    methods = [vectors.metadata.get("method") for vectors in (vectors_a, vectors_b)]
    if None not in methods and methods[0] != methods[1]:
        raise UserError(f"Method {methods[0]} and Method {methods[1]}: extract both by the same method")
    _check_lists("persona", vectors_a.personas, vectors_b.personas)
    for what, key in (("system prompt", "system_prompts"), ("question", "questions")):
        if key in vectors_a.metadata and key in vectors_b.metadata:
            _check_lists(what, _entries(vectors_a.metadata[key]), _entries(vectors_b.metadata[key]))
    _, questions_a, width_a = vectors_a.at(layer).shape
    _, questions_b, width_b = vectors_b.at(layer).shape
    if questions_a != questions_b:
        raise UserError(f"{questions_a} and {questions_b} questions: extract both with the same ones")
    if width_a != width_b:
        raise UserError(f"widths {width_a} and {width_b}: compare two versions of one model")


def _check_lists(what: str, a: list[str], b: list[str]) -> None:
    for index, (one, other) in enumerate(zip_longest(a, b, fillvalue="")):
        if one != other:
            differ = f"{what} {index} is {one[:60]!r} in one and {other[:60]!r} in the other"
            raise UserError(f"{differ}: extract both with the same {what}s")


def _entries(text: str) -> list[str]:
    """A JSON list as it is; any other text, a digest perhaps, as its only entry."""
    try:
        entries = json.loads(text)
    except ValueError:
        entries = None
    return [str(entry) for entry in entries] if isinstance(entries, list) else [text]
