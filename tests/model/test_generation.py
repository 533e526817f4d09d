"""Generation: greedy tokens against transformers, and a request's tokens whatever it shares a batch with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import reference

from minipersona.config import LoraConfig
from minipersona.model import cache, generation
from minipersona.model.generation import Completion, Request, draw, generate
from minipersona.model.load import load_model
from minipersona.model.lora import adapter_disabled, adapters, apply_lora, merge_adapter
from minipersona.model.network import Qwen2

LENGTHS = [3, 17, 1, 8, 8, 30, 2]
NEW = 21


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, SIZES.vocab_size, n) for n in LENGTHS]


@pytest.fixture(scope="module")
def model(hf_model: Callable[..., Path], family: str) -> Qwen2:
    return load_model(str(hf_model(family=family)), dtype=torch.float64)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids.tolist() for completion in completions]


@pytest.fixture(scope="module")
def expected(hf_model: Callable[..., Path], family: str) -> list[list[int]]:
    """What transformers says, one prompt at a time, greedily, in fp64."""
    theirs = reference(hf_model(family=family), torch.float64)
    out = []
    for prompt in prompts():
        ids = torch.from_numpy(prompt)[None]
        said = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                               eos_token_id=None, pad_token_id=0)  # fmt: skip
        out.append(said[0, ids.shape[1] :].tolist())
    return out


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_greedy_tokens_equal_transformers_in_any_batch(
    model: Qwen2, expected: list[list[int]], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "WINDOW", 16)  # several windows, and prompts that take several packs
    monkeypatch.setattr(generation, "LARGE_PASS", 20)
    completions = generate(model, [Request(p, NEW) for p in prompts()], stop=(), batch=batch)
    assert tokens(completions) == expected
    assert not any(completion.stopped for completion in completions)


def test_control_a_token_that_does_not_see_the_one_before_it_says_something_else(
    model: Qwen2, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = cache.Cache.stepping

    def forgetful(self: cache.Cache, lengths: torch.Tensor, window: int) -> list[cache.Stepping]:
        return honest(self, (lengths - 1).clamp(min=1), window)

    monkeypatch.setattr(cache.Cache, "stepping", forgetful)
    assert tokens(generate(model, [Request(p, NEW) for p in prompts()], stop=())) != expected


def test_a_stop_token_ends_a_completion_and_is_left_out(model: Qwen2, expected: list[list[int]]) -> None:
    stop = expected[1][4]
    done: dict[int, Completion] = {}
    completions = generate(
        model, [Request(p, NEW) for p in prompts()], stop=(stop,), batch=2, on_done=lambda i, c: done.update({i: c})
    )
    for index, (completion, whole) in enumerate(zip(completions, expected, strict=True)):
        assert done[index] is completion
        assert completion.stopped == (stop in whole)
        assert completion.ids.tolist() == (whole[: whole.index(stop)] if stop in whole else whole)
    assert completions[1].stopped


def test_lengths_may_differ(model: Qwen2, expected: list[list[int]]) -> None:
    limits = [1, 21, 8, 9, 16, 2, 7]
    requests = [Request(p, n) for p, n in zip(prompts(), limits, strict=True)]
    assert tokens(generate(model, requests, stop=(), batch=3)) == [e[:n] for e, n in zip(expected, limits, strict=True)]


def test_a_drawn_completion_hangs_on_its_own_seed_alone(model: Qwen2) -> None:
    requests = [Request(p, NEW, temperature=1.0, top_p=0.9, seed=i) for i, p in enumerate(prompts())]
    together = tokens(generate(model, requests, stop=()))
    assert tokens(generate(model, requests, stop=(), batch=2)) == together
    assert tokens(generate(model, [requests[3]], stop=())) == together[3:4]
    assert tokens(generate(model, [replace(requests[3], seed=99)], stop=())) != together[3:4]
    mixed = [Request(prompts()[0], NEW), *requests[1:]]  # a greedy one among them
    assert tokens(generate(model, mixed, stop=()))[1:] == together[1:]


def test_adapters_are_active_and_the_base_is_there_without_them(
    model: Qwen2, hf_model: Callable[..., Path], family: str
) -> None:
    adapted = load_model(str(hf_model(family=family)), dtype=torch.float64)
    requests = [Request(p, NEW) for p in prompts()]
    base = tokens(generate(model, requests, stop=()))
    apply_lora(adapted, LoraConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters(adapted).values():
        adapter.lora_B.data.normal_(0, 0.3, generator=generator)
    said = tokens(generate(adapted, requests, stop=()))
    with adapter_disabled(adapted):
        assert tokens(generate(adapted, requests, stop=())) == base
    merge_adapter(adapted)
    assert tokens(generate(adapted, requests, stop=())) == said != base


# ---------------------------------------------------------------- drawing


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-32, 32).map(lambda n: n / 4), min_size=2, max_size=12),  # no two almost equal
    uniform=st.floats(0, 1, exclude_max=True, width=32),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_drawing_inverts_the_distribution(
    logits: list[float], uniform: float, temperature: float, top_p: float
) -> None:
    scaled = np.array(logits, dtype=np.float32) / np.float32(temperature)
    p = np.exp(scaled.astype(np.float64) - scaled.max())
    p /= p.sum()
    kept = np.zeros(len(p), dtype=bool)
    order = np.argsort(-p, kind="stable")
    kept[order[np.cumsum(p[order]) - p[order] < top_p - 1e-6]] = True
    token = int(
        draw(torch.tensor([logits]), torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([uniform]))
    )
    near = np.cumsum(p[order]) - p[order] < top_p + 1e-6  # a token at the very edge may fall on either side
    assert kept[token] or token in order[near]
    edges = np.cumsum(np.where(kept, p, 0)) / p[kept].sum()
    if np.abs(edges - uniform).min() > 1e-5 and (kept == np.isin(np.arange(len(p)), order[near])).all():
        assert token == int(np.searchsorted(edges, uniform, side="right"))


def test_drawn_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    uniforms = (torch.arange(4000) + 0.5) / 4000
    ones = torch.ones(4000)
    drawn = draw(logits.expand(4000, 4), ones, None, uniforms)
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=1e-3, rtol=0)
    colder = torch.bincount(draw(logits.expand(4000, 4), ones / 2, None, uniforms), minlength=4) / 4000
    assert float((colder - shares).abs().max()) > 0.1  # the control


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_replayed_graph_says_what_the_plain_step_says(
    hf_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(hf_model()), dtype=torch.float64, device="cuda")
    requests = [Request(p, NEW, temperature=float(i % 2), seed=i) for i, p in enumerate(prompts())]
    replayed = tokens(generate(model, requests, stop=(), batch=3))
    monkeypatch.setattr(generation.Slots, "_replay", lambda slots: slots._step(slots.cache.length))
    assert tokens(generate(model, requests, stop=(), batch=3)) == replayed


def test_less_memory_means_fewer_slots_and_the_same_words(
    model: Qwen2, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = cache.Cache(model, 3, 16)
    assert cache.Cache.slot_bytes(model, 16) * 3 == sum(x.numel() * x.itemsize for x in held.keys + held.values)
    monkeypatch.setattr(generation, "room_for", lambda model, length: 2)
    assert tokens(generate(model, [Request(p, NEW) for p in prompts()], stop=(), batch=64)) == expected
