"""Comparison of two extractions: planted rotations, contractions and shifts, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.compare import compare, procrustes
from minipersona.geometry.measures import collapse_direction, m1
from minipersona.geometry.statistics import bootstrap_m1_difference, permutation_test
from minipersona.geometry.vectors import PersonaVectors

P, Q, D = 6, 20, 16
NAMES = [f"persona {p}" for p in range(P)]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(samples: Tensor, layer: int = 20, **metadata: str) -> PersonaVectors:
    return PersonaVectors({layer: samples}, NAMES[: len(samples)], metadata)


BASE = 2 + gaussian(P, 1, D, seed=0) + 0.5 * gaussian(P, Q, D, seed=1)
TRAINED = BASE.mean(0) + 0.3 * (BASE - BASE.mean(0)) + gaussian(D, seed=2)


def test_comparison_collects_the_parts() -> None:
    a, b = vectors(BASE), vectors(TRAINED)
    found = compare(a, b, resamples=200)
    mean_a, mean_b = a.mean(20), b.mean(20)
    assert (found.layer, found.questions, found.level) == (20, Q, 0.95)
    assert (found.m1_a, found.m1_b) == (m1(mean_a), m1(mean_b))
    assert found.m1_difference == found.m1_b - found.m1_a > 0
    assert found.m1_difference_interval == bootstrap_m1_difference(BASE, TRAINED, 200)
    assert found.p_questions == permutation_test(BASE, TRAINED, "questions", 200)
    assert found.p_personas == permutation_test(BASE, TRAINED, "personas", 200)
    assert found.collapse_norm == pytest.approx(float(collapse_direction(mean_a, mean_b).norm()))
    assert [shift.persona for shift in found.shifts] == NAMES
    back = compare(b, a, resamples=200)
    assert back.m1_difference == -found.m1_difference
    assert back.p_questions == found.p_questions


def test_comparison_is_json() -> None:
    plain = compare(vectors(BASE), vectors(TRAINED), resamples=50).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["shifts"][0].keys() == {"persona", "norm", "cosine", "collapse_share"}  # type: ignore[index]


def test_a_shift_that_all_share_lies_along_the_collapse_direction() -> None:
    shift = gaussian(D, seed=3)
    found = compare(vectors(BASE), vectors(BASE + shift), resamples=20)
    for p in range(P):
        assert found.shifts[p].norm == pytest.approx(float(shift.norm()), rel=1e-5)
        assert found.shifts[p].collapse_share == pytest.approx(1, abs=1e-5)
        mean = BASE[p].mean(0)
        assert found.shifts[p].cosine == pytest.approx(float(torch.cosine_similarity(mean, mean + shift, dim=0)))
    assert found.procrustes == pytest.approx(0, abs=1e-5)


def test_rounding_makes_no_share_larger_than_one() -> None:
    """Shifts that all personas share to the bit; without the clamp about every third is above 1 by 2e-16."""
    base = (8 * BASE[:, :1]).round() / 8
    for seed in range(12):
        shift = (64 * gaussian(D, seed=seed)).round() / 64  # its sum with the base is exact
        found = compare(vectors(base.expand(P, 2, D)), vectors((base + shift).expand(P, 2, D)), resamples=2)
        assert all(each.collapse_share is not None and 1 - 1e-12 < each.collapse_share <= 1 for each in found.shifts)


def test_unrelated_shifts_share_about_one_over_p() -> None:
    base, shifts = gaussian(P, Q, 4096, seed=4), gaussian(P, 1, 4096, seed=5)
    found = compare(vectors(base), vectors(base + shifts), resamples=20)
    shares = [shift.collapse_share for shift in found.shifts]
    assert all(share == pytest.approx(1 / P, abs=0.05) for share in shares)


def test_nothing_moved() -> None:
    found = compare(vectors(BASE), vectors(BASE.clone()), resamples=50)
    assert found.m1_difference == 0 and found.m1_difference_interval == (0, 0)
    assert found.p_questions == found.p_personas == 1
    assert found.procrustes == pytest.approx(0, abs=1e-7) and found.spread_ratio == 1
    assert {(shift.norm, shift.collapse_share) for shift in found.shifts} == {(0, None)}


# Procrustes


def test_procrustes_forgives_rotation_translation_and_scale_only() -> None:
    a = gaussian(P, D, seed=6).double()
    turn = torch.linalg.qr(gaussian(D, D, seed=7).double()).Q
    distance, ratio = procrustes(a, 0.2 * a @ turn + 3)
    assert distance == pytest.approx(0, abs=1e-6)
    assert ratio == pytest.approx(0.2, rel=1e-9)
    shear = torch.eye(D, dtype=torch.float64) + 0.5 * gaussian(D, D, seed=8).double()
    for other in (a @ shear, a.roll(1, 0), a + 0.3 * gaussian(P, D, seed=9)):
        distance, _ = procrustes(a, other)
        assert distance is not None and distance > 0.05


@pytest.mark.parametrize("width", [3, 16])  # fewer and more dimensions than personas
def test_procrustes_agrees_with_scipy(width: int) -> None:
    spatial = pytest.importorskip("scipy.spatial")
    a, b = gaussian(P, width, seed=10).double(), gaussian(P, width, seed=11).double()
    _, _, disparity = spatial.procrustes(a.numpy(), b.numpy())  # min over R and scale: 1 - overlap^2
    distance, _ = procrustes(a, b)
    assert distance is not None
    overlap = 1 - distance**2 / 2
    assert 1 - overlap**2 == pytest.approx(disparity, abs=1e-12)
    assert disparity != pytest.approx(distance**2, abs=1e-3)  # without the best scale it is another


def test_procrustes_of_one_point_has_no_value() -> None:
    a, point = gaussian(P, D, seed=12), 100 * gaussian(D, seed=13).double()
    assert procrustes(a, a[:1].expand(P, D)) == (None, None)
    rounded = point + 1e-12 * gaussian(P, D, seed=14)  # its distances are those of fp64 rounding
    assert procrustes(a, rounded) == procrustes(rounded, a) == (None, None)
    assert procrustes(a, point + 1e-6 * gaussian(P, D, seed=14))[0] is not None  # the control


# refusals


def test_layers() -> None:
    both = PersonaVectors({14: BASE, 20: BASE}, NAMES)
    assert compare(both, vectors(BASE), resamples=10).layer == 20
    assert compare(both, both, layer=14, resamples=10).layer == 14
    with pytest.raises(UserError, match="choose one"):
        compare(both, both)
    with pytest.raises(UserError, match="common layer"):
        compare(vectors(BASE, 14), vectors(BASE, 20))
    with pytest.raises(UserError, match="no layer 7"):
        compare(both, both, layer=7)


def test_different_lists_are_refused_by_name() -> None:
    a = vectors(BASE, questions=json.dumps(["Why?", "How?"]))
    compare(a, vectors(BASE), resamples=10)  # nothing is known of the other's questions
    renamed = replace(a, personas=[*NAMES[:2], "villain", *NAMES[3:]])
    with pytest.raises(UserError, match="persona 2 is 'persona 2' in one and 'villain' in the other"):
        compare(a, renamed)
    with pytest.raises(UserError, match="persona 5 is 'persona 5' in one and '' in the other"):
        compare(a, vectors(BASE[:5]))
    with pytest.raises(UserError, match=r"question 1 is 'How\?' in one and 'Who\?' in the other"):
        compare(a, vectors(BASE, questions=json.dumps(["Why?", "Who?"])))
    with pytest.raises(UserError, match="Method A and Method B: extract both by the same method"):
        compare(vectors(BASE, method="A"), vectors(BASE, method="B"))
    with pytest.raises(UserError, match="system prompt 0 is 'one digest'"):
        compare(vectors(BASE, system_prompts="one digest"), vectors(BASE, system_prompts="another"))
    with pytest.raises(UserError, match="20 and 10 questions"):
        compare(a, vectors(BASE[:, :10]))
    with pytest.raises(UserError, match="widths 16 and 8"):
        compare(a, vectors(BASE[..., :8]))
