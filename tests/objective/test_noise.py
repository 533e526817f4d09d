"""R3F's noise: its distribution, what it depends on, and whether a model's precision carries it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error

from minipersona.chat import Document
from minipersona.corpus.batch import pack_documents
from minipersona.model.dropout import _mix, channel_keys, token_keys
from minipersona.model.load import load_model
from minipersona.model.network import EMBEDDING, Qwen2
from minipersona.model.pack import make_pack
from minipersona.objective.noise_check import CARRIED, EPSILONS, check_noise, realised_cosine
from minipersona.objective.r3f import add_to_second_half, embedding_noise, twice

CHANNELS = 500


def keys(tokens: int = 1000, step: int = 3, seed: int = 42) -> torch.Tensor:
    return token_keys(seed, step, make_pack([np.zeros(tokens, dtype=np.int64)]))


def test_noise_is_the_hash_that_numpy_computes() -> None:
    """Wellons' lowbias32 of token and channel, whose upper 24 bits are the uniform number, to the bit."""
    tokens, channels = keys(200), channel_keys("embedding noise", CHANNELS)
    words = _mix(tokens.numpy().view(np.uint32)[:, None] ^ channels.numpy().view(np.uint32))  # (T, D)
    uniform = ((words.view(np.int32) >> 8) + 0.5) * 2.0**-23
    expected = torch.from_numpy(uniform)
    assert torch.equal(embedding_noise(tokens, "uniform", 1.0, CHANNELS).double(), expected)
    normal = embedding_noise(tokens, "normal", 1e-3, CHANNELS)
    assert relative_error(normal, 1e-3 * torch.special.ndtri((1 + expected) / 2)) < 1e-5


def test_normal_noise_has_a_normals_quantiles() -> None:
    z = embedding_noise(keys(), "normal", 1e-3, CHANNELS).double() / 1e-3
    assert z.shape == (1000, CHANNELS) and z.isfinite().all()
    n = z.numel()
    normal = torch.distributions.Normal(0.0, 1.0)
    for x in (-3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0):
        share = float(normal.cdf(torch.tensor(x, dtype=torch.float64)))
        assert float((z <= x).double().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
    assert abs(float(z.mean())) < 5 / n**0.5
    assert float(z.var()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    assert float(z.abs().max()) > 4


def test_uniform_noise_fills_its_interval_evenly() -> None:
    z = embedding_noise(keys(), "uniform", 0.5, CHANNELS).double()
    counts = torch.histc(z, 20, -0.5, 0.5)
    assert counts.sum() == z.numel() and float(z.abs().max()) < 0.5
    expected = z.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 19 + 5 * (2 * 19) ** 0.5  # chi squared


def test_tokens_channels_steps_and_seeds_are_independent() -> None:
    z = embedding_noise(keys(), "normal", 1.0, CHANNELS).double()
    for other in (
        z.roll(1, 0),
        z.roll(1, 1),
        z.roll((1, 1), (0, 1)),
        embedding_noise(keys(step=4), "normal", 1.0, CHANNELS),
        embedding_noise(keys(seed=43), "normal", 1.0, CHANNELS),
    ):
        for a, b in ((z, other.double()), (z.square() - 1, other.double().square() - 1)):
            assert abs(float((a * b).mean())) < 5 * float(a.std() * b.std()) / z.numel() ** 0.5


def test_noise_follows_the_document_not_the_pack(documents: list[Document]) -> None:
    pack = pack_documents(documents[:5], range(5))
    turned = pack_documents(documents[:5][::-1], range(5)[::-1])
    together = embedding_noise(token_keys(42, 3, pack), "normal", 1e-3, 48)
    again = embedding_noise(token_keys(42, 3, turned), "normal", 1e-3, 48)
    assert torch.equal(together[: len(documents[0])], again[-len(documents[0]) :])
    # The control: another document at the same place has other noise.
    assert not torch.equal(together[:3], again[:3])


def model_of(hf_model: Callable[..., Path], dtype: torch.dtype, scale: float) -> Qwen2:
    """The small model with embeddings of a chosen size; the 7B's are about 0.02."""
    model = load_model(str(hf_model()), dtype=torch.float32, device="cpu")
    model.model.embed_tokens.weight.data *= scale / 0.1
    model.to(dtype)
    model.compute_dtype = dtype
    return model


def test_plain_addition_in_bf16_loses_the_papers_noise(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    pack = pack_documents(documents[:8])
    tokens = token_keys(42, 1, pack)
    cosines = {
        (dtype, epsilon): realised_cosine(
            model_of(hf_model, dtype, 0.02), pack, embedding_noise(tokens, "normal", epsilon, 48)
        )
        for dtype in (torch.bfloat16, torch.float32)
        for epsilon in EPSILONS
    }
    assert cosines[torch.bfloat16, 1e-5] < 0.6 and cosines[torch.bfloat16, 1e-3] > 0.99
    assert all(cosines[torch.float32, epsilon] > 0.999 for epsilon in EPSILONS)


def test_the_search_takes_the_smallest_epsilon_that_arrives(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    pack = pack_documents(documents[:8])
    tokens = token_keys(42, 1, pack)
    fine = check_noise(model_of(hf_model, torch.float32, 0.02), pack, tokens, "normal")
    assert (fine.epsilon, fine.effective) == (1e-5, True) and fine.kl == fine.kl_fp32
    half = model_of(hf_model, torch.bfloat16, 0.02)
    coarse = check_noise(half, pack, tokens, "normal")
    assert coarse.epsilon > 1e-5 and coarse.effective and coarse.cosine >= CARRIED
    assert half.compute_dtype == torch.bfloat16  # as it was
    below = EPSILONS[EPSILONS.index(coarse.epsilon) - 1]
    assert not check_noise(half, pack, tokens, "normal", (below,)).effective
    # The fp32 reference is a model of the same bf16 weights in fp32.
    wide = model_of(hf_model, torch.bfloat16, 0.02).float()
    wide.compute_dtype = torch.float32
    assert check_noise(wide, pack, tokens, "normal", (coarse.epsilon,)).kl == pytest.approx(coarse.kl_fp32, rel=1e-4)
    assert coarse.kl != pytest.approx(coarse.kl_fp32, rel=1e-4)


def test_noise_that_never_arrives_is_ineffective_at_the_largest_epsilon(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    pack = pack_documents(documents[:8])
    check = check_noise(model_of(hf_model, torch.bfloat16, 20.0), pack, token_keys(42, 1, pack), "uniform")
    assert (check.epsilon, check.effective) == (1e-3, False) and check.cosine < CARRIED


def test_divergence_is_quadratic_in_epsilon(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    pack = pack_documents(documents[:8])
    tokens = token_keys(42, 1, pack)
    small, large = (check_noise(model, pack, tokens, "normal", (epsilon,)).kl for epsilon in (1e-5, 1e-4))
    assert 0 < small < 1e-6
    assert large / small == pytest.approx(100, rel=0.01)


def test_the_doubled_pack_holds_the_pack_twice(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    pack = pack_documents(documents[:5])
    noise = embedding_noise(token_keys(42, 1, pack), "normal", 0.1, 48)
    both = twice(pack)
    clean, noisy = model(both, taps={EMBEDDING: add_to_second_half(noise)}).chunk(2)
    assert relative_error(clean, model(pack)) < 1e-12
    assert relative_error(noisy, model(pack, taps={EMBEDDING: lambda h: h + noise})) < 1e-12
    assert relative_error(noisy, clean) > 1e-2
    assert torch.equal(both.targets[both.supervised], pack.targets[pack.supervised].repeat(2))
    assert torch.equal(token_keys(42, 1, both), token_keys(42, 1, pack).repeat(2))
