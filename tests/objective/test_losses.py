"""The three objectives on given states: chunked equals naive, loss and gradient; the gradients are the loss's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor

from minipersona.model.pack import IGNORE
from minipersona.objective.cross_entropy import cross_entropy
from minipersona.objective.head import Reference, head_logits
from minipersona.objective.kl_to_base import Direction, divergence_and_slope, kl_to_base
from minipersona.objective.r3f import r3f

TOKENS, WIDTH, VOCABULARY = 37, 24, 50
BOUNDS = pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
DIRECTIONS: tuple[Direction, ...] = ("symmetric", "forward", "reverse")
Loss = Callable[..., Tensor]


def tensors(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States of two branches, the head, and targets. The branches are near each other, as they are in use."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    other = hidden + 0.3 * torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64) / 3
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, other, weight))
    hidden, other, weight = leaves
    return hidden, other, weight, torch.randint(0, VOCABULARY, (tokens,), generator=generator)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """torch's own: the sum of KL(p || q) of logits p and q (T, V)."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)


def naive_divergence(p: Tensor, q: Tensor, direction: str) -> Tensor:
    one_sided = {"forward": kl(p, q), "reverse": kl(q, p)}
    return sum(one_sided.values()) if direction == "symmetric" else one_sided[direction]  # type: ignore[return-value]


def naive_cross_entropy(hidden: Tensor, other: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def naive_kl_to_base(direction: str, detached: bool = True) -> Loss:
    def loss(hidden: Tensor, other: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        q = other @ weight.T
        divergence = naive_divergence(hidden @ weight.T, q.detach() if detached else q, direction)
        return naive_cross_entropy(hidden, other, weight, targets) + 0.7 * divergence

    return loss


def naive_r3f(hidden: Tensor, other: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    divergence = naive_divergence(hidden @ weight.T, other @ weight.T, "symmetric")
    return naive_cross_entropy(hidden, other, weight, targets) + 0.7 * divergence


def ours(kind: str, chunk: int, compiled: bool = False) -> Loss:
    def loss(hidden: Tensor, other: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if kind == "cross_entropy":
            return cross_entropy(hidden, weight, targets, chunk=chunk, compiled=compiled)
        if kind == "r3f":
            return r3f(hidden, other, weight, targets, lam=0.7, chunk=chunk, compiled=compiled)[0]
        base = Reference(other.detach(), weight.detach())
        settings = {"beta": 0.7, "direction": kind, "chunk": chunk, "compiled": compiled}
        return kl_to_base(hidden, weight, targets, base, **settings)[0]  # type: ignore[arg-type]

    return loss


def naive(kind: str) -> Loss:
    known = {"cross_entropy": naive_cross_entropy, "r3f": naive_r3f}
    return known.get(kind) or naive_kl_to_base(kind)


def loss_and_gradients(loss: Loss, *inputs: Tensor) -> list[Tensor]:
    """Of three times the loss; zeros where it does not depend on an input."""
    value = loss(*inputs)
    learned = inputs[:3]
    return [value, *torch.autograd.grad(3 * value, learned, allow_unused=True, materialize_grads=True)]


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest relative error of a tensor; both must be zero where one is."""
    assert [bool(x.any()) for x in a] == [bool(x.any()) for x in b]
    return max(relative_error(x, y) for x, y in zip(a, b, strict=True) if y.any())


KINDS = ("cross_entropy", *DIRECTIONS, "r3f")


@BOUNDS
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_naive(kind: str, dtype: torch.dtype, bound: float) -> None:
    inputs = tensors(dtype)
    expected = loss_and_gradients(naive(kind), *inputs)
    for chunk in (1, 10, 37, 1000):
        assert worst(loss_and_gradients(ours(kind, chunk), *inputs), expected) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_rows_whose_target_is_ignored_add_nothing(kind: str) -> None:
    """The loss and every gradient are those of the other rows alone; nothing reaches the states that are ignored."""
    hidden, other, weight, targets = tensors(torch.float64)
    kept = torch.arange(TOKENS) % 3 > 0
    found = loss_and_gradients(ours(kind, 10), hidden, other, weight, targets.masked_fill(~kept, IGNORE))
    parts = (x.detach()[kept].requires_grad_() for x in (hidden, other))
    value, *states, head = loss_and_gradients(naive(kind), *parts, weight, targets[kept])
    spread = [torch.zeros_like(hidden).masked_scatter(kept[:, None], slope) for slope in states]
    assert worst(found, [value, *spread, head]) < 1e-10
    whole = loss_and_gradients(ours(kind, 10), hidden, other, weight, targets)  # the control
    assert relative_error(whole[0], value) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_control_another_objective_is_not_within_the_bound(kind: str) -> None:
    """Wrong targets, the other direction, a mean for the sum: each is far outside."""
    hidden, other, weight, targets = tensors(torch.float64)
    expected = loss_and_gradients(naive(kind), hidden, other, weight, targets)
    wrong = [loss_and_gradients(ours(kind, 10), hidden, other, weight, targets.roll(1))]
    wrong += [
        loss_and_gradients(ours(other_kind, 10), hidden, other, weight, targets)
        for other_kind in KINDS
        if other_kind != kind and {kind, other_kind} != {"symmetric", "r3f"}  # these differ in the other branch only
    ]
    wrong.append([x / TOKENS for x in expected])
    for values in wrong:
        assert relative_error(values[0], expected[0]) > 1e-4
        assert relative_error(values[1], expected[1]) > 1e-3


def test_the_base_is_a_constant() -> None:
    """No gradient reaches it; counted in, the head's gradient would be another (the control)."""
    hidden, other, weight, targets = tensors(torch.float64)
    mine = loss_and_gradients(ours("symmetric", 10), hidden, other, weight, targets)
    assert not mine[2].any()
    leaking = loss_and_gradients(naive_kl_to_base("symmetric", detached=False), hidden, other, weight, targets)
    assert leaking[2].any() and relative_error(leaking[3], mine[3]) > 1e-2


def test_r3f_learns_through_both_branches() -> None:
    """The control: with the noisy branch held constant, the head's gradient would be another."""
    inputs = tensors(torch.float64)
    mine = loss_and_gradients(ours("r3f", 10), *inputs)
    one_sided = loss_and_gradients(naive_kl_to_base("symmetric"), *inputs)
    assert mine[2].any() and not one_sided[2].any()
    assert relative_error(mine[1], one_sided[1]) < 1e-12 and relative_error(mine[3], one_sided[3]) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    hidden, other, weight, targets = tensors(torch.float64, tokens=4)
    learned = (hidden, other, weight) if kind == "r3f" else (hidden, weight)
    fixed, head = other.detach().clone(), weight.detach().clone()  # gradcheck moves its inputs in place

    def loss(*inputs: Tensor) -> Tensor:
        if kind == "r3f":
            return r3f(inputs[0], inputs[1], inputs[2], targets, lam=0.7, chunk=3)[0]
        if kind == "cross_entropy":
            return cross_entropy(*inputs, targets, chunk=3)
        return kl_to_base(*inputs, targets, Reference(fixed, head), beta=0.7, direction=kind, chunk=3)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, learned)


def test_terms_add_up_and_carry_no_gradient() -> None:
    hidden, other, weight, targets = tensors(torch.float64)
    loss, terms = r3f(hidden, other, weight, targets, lam=0.7, chunk=10)
    assert not terms.requires_grad and terms[0] == loss.detach()
    assert relative_error(terms[1], naive_cross_entropy(hidden, other, weight, targets)) < 1e-10
    assert relative_error(terms[2], naive_divergence(hidden @ weight.T, other @ weight.T, "symmetric")) < 1e-10
    assert relative_error(terms[1] + 0.7 * terms[2], terms[0]) < 1e-12


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_model_at_its_base_has_no_divergence_and_no_slope(direction: Direction) -> None:
    hidden, _, weight, targets = tensors(torch.float32)
    base = Reference(hidden.detach(), weight.detach())
    loss, terms = kl_to_base(hidden, weight, targets, base, beta=5.0, direction=direction)
    assert terms[2] == 0 and loss.detach() == terms[1]
    plain = loss_and_gradients(ours("cross_entropy", 1000), hidden, hidden, weight, targets)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    assert torch.equal(gradient, plain[1])


def test_a_small_symmetric_divergence_survives_in_fp32() -> None:
    """Logits 1e-4 apart give a KL of 1e-8 a token, which a one-sided sum (the control) buries in rounding."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(8, 20_000, generator=generator, dtype=torch.float64)
    near = z + 1e-4 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    exact, _ = divergence_and_slope(z.log_softmax(-1), near.log_softmax(-1), "symmetric")
    p, q = z.float().log_softmax(-1), near.float().log_softmax(-1)
    found = {direction: float(divergence_and_slope(p, q, direction)[0]) for direction in DIRECTIONS}
    assert found["symmetric"] == pytest.approx(float(exact), rel=0.02)
    one_sided, _ = divergence_and_slope(z.log_softmax(-1), near.log_softmax(-1), "forward")
    assert abs(found["forward"] - float(one_sided)) > 2 * float(one_sided)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_no_loss_and_no_gradient(kind: str) -> None:
    hidden, other, weight, targets = tensors(torch.float32, tokens=0)
    values = loss_and_gradients(ours(kind, 10), hidden, other, weight, targets)
    assert not any(value.any() for value in values) and values[1].shape == (0, WIDTH)


def test_half_precision_states_meet_in_fp32_logits() -> None:
    hidden, other, weight, targets = (
        x.detach().bfloat16() if x.is_floating_point() else x for x in tensors(torch.float32)
    )
    assert head_logits(hidden, weight).dtype == torch.float32
    loss, terms = r3f(hidden.requires_grad_(), other, weight, targets, lam=0.7)
    loss.backward()
    assert terms.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    exact = naive_divergence(hidden.double() @ weight.double().T, other.double() @ weight.double().T, "symmetric")
    assert relative_error(terms[2], exact) < 1e-5
    rounded = naive_divergence((hidden @ weight.T).double(), (other @ weight.T).double(), "symmetric")
    assert relative_error(rounded, exact) > 1e-4  # the control: what bf16 logits would have made of it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_compiled_and_in_half_precision(kind: str) -> None:
    exact = [x.detach().bfloat16().double() if x.is_floating_point() else x for x in tensors(torch.float32)]
    for x in exact[:3]:
        x.requires_grad_()
    expected = loss_and_gradients(naive(kind), *exact)
    inputs = [x.detach().cuda().bfloat16().requires_grad_() if x.is_floating_point() else x.cuda() for x in exact]
    for compiled in (False, True):
        found = [x.cpu() for x in loss_and_gradients(ours(kind, 10, compiled), *inputs)]
        assert relative_error(found[0], expected[0]) < 1e-5
        assert worst(found, expected) < 1e-2
