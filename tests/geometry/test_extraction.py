"""Method A against transformers' hidden states, and steering as the algebra has it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from hypothesis import given
from hypothesis import strategies as st

from minipersona.chat import load_tokenizer
from minipersona.errors import UserError
from minipersona.geometry.extraction import common_prefixes, extract, render_prompts
from minipersona.model.load import load_model
from minipersona.model.network import Qwen2
from minipersona.model.pack import make_pack

PERSONAS = {
    "pirate": "You are a pirate.",
    "judge": "You are a judge, strict and old.",
    "child": "You are a child.",
}
QUESTIONS = ["Why does the sea sing?", "What is fair?", "Tell me about sleep, and about work, in a few words."]


@pytest.fixture(scope="module")
def model_dir() -> str:
    """The embedded model; any small model with a tokenizer would do."""
    return "tiny"


@pytest.fixture(scope="module")
def model(model_dir: str) -> Qwen2:
    return load_model(model_dir, device="cpu", dtype=torch.float32)


def test_extraction_equals_transformers_hidden_states(model: Qwen2) -> None:
    from transformers import AutoModelForCausalLM

    from minipersona.files import data_dir

    tokenizer = load_tokenizer("tiny")
    theirs = AutoModelForCausalLM.from_pretrained(data_dir() / "tiny", dtype=torch.float32).eval()
    layers = [0, 3, 6]
    vectors = extract(model, tokenizer, PERSONAS, QUESTIONS, layers, pack_tokens=100)
    prompts = render_prompts(tokenizer, PERSONAS, QUESTIONS)
    with torch.no_grad():
        for index, document in enumerate(prompts):
            ids = torch.from_numpy(document.ids.astype("int64"))[None]
            states = theirs(ids, output_hidden_states=True).hidden_states
            for layer in layers:
                ours = vectors.at(layer)[index // len(QUESTIONS), index % len(QUESTIONS)]
                assert relative_error(ours, states[layer + 1][0, -1]) < 1e-5


def test_control_the_neighbouring_layer_is_not_the_one(model: Qwen2) -> None:
    vectors = extract(model, load_tokenizer("tiny"), PERSONAS, QUESTIONS, [5, 6])
    assert relative_error(vectors.at(5), vectors.at(6)) > 1e-2


def test_packing_does_not_matter(model: Qwen2) -> None:
    tokenizer = load_tokenizer("tiny")
    whole = extract(model, tokenizer, PERSONAS, QUESTIONS, [6])
    alone = extract(model, tokenizer, PERSONAS, QUESTIONS, [6], pack_tokens=1)
    assert relative_error(whole.at(6), alone.at(6)) < 1e-5
    assert whole.metadata == alone.metadata and whole.personas == list(PERSONAS)


def test_a_shared_beginning_computed_once_is_the_same_as_every_prompt_whole(
    hf_model: Callable[..., Path], family: str
) -> None:
    """In fp64, with beginnings of other lengths, prompts of a token more than theirs, and personas without any."""
    from minipersona.geometry.extraction import common_prefixes, residuals

    model = load_model(str(hf_model(family=family)), dtype=torch.float64, device="cpu")
    rng = np.random.default_rng(0)
    beginnings = [rng.integers(0, 160, n) for n in (7, 0, 12)]
    ids = [np.concatenate([b, [k], rng.integers(0, 160, 3 * k)]) for b in beginnings for k in range(3)]
    assert common_prefixes(ids, 3) == [7, 0, 12]
    assert common_prefixes([beginnings[0]] * 2, 2) == [6]  # a token is left of equal prompts
    read = [slice(len(x) - 1, len(x)) for x in ids]
    together = residuals(model, ids, read, 3, [0, 2], pack_tokens=16)
    for layer in (0, 2):
        for index, prompt in enumerate(ids):
            alone = model(make_pack([prompt]), stop_after=layer)[-1]
            assert relative_error(together[layer][index], alone) < 1e-6  # the samples are fp32
    swapped = residuals(model, ids[3:6] + ids[:3] + ids[6:], read[3:6] + read[:3] + read[6:], 3, [2], pack_tokens=16)
    assert relative_error(swapped[2][:3], together[2][:3]) > 0.1  # the control: another persona's beginning


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=3, max_size=3),
    st.lists(st.integers(0, 1), max_size=3),
)
def test_a_group_s_common_beginning_leaves_a_token_of_each_prompt(rests: list[list[int]], shared: list[int]) -> None:
    prompts = [np.array([*shared, *rest], dtype=np.int32) for rest in rests]
    alike = itertools.takewhile(
        lambda tokens: len(set(tokens)) == 1, zip(*map(np.ndarray.tolist, prompts), strict=False)
    )
    expected = min(len(list(alike)), min(map(len, prompts)) - 1)
    lone = [np.array([7, 8, 9])] * 3
    assert common_prefixes([*prompts, *lone], 3) == [expected, 2] and expected >= len(shared)


def test_method_b_is_the_mean_over_the_greedy_response(model: Qwen2) -> None:
    from minipersona.model.generation import Request, generate

    tokenizer = load_tokenizer("tiny")
    vectors = extract(model, tokenizer, PERSONAS, QUESTIONS, [6], "B", pack_tokens=200)
    assert vectors.metadata["method"] == "B" and vectors.response_tokens is not None
    stop = tokenizer.stop_tokens
    for index, document in enumerate(render_prompts(tokenizer, PERSONAS, QUESTIONS)):
        response = generate(model, [Request(document.ids, 256)], stop=stop)[0].ids
        p, q = divmod(index, len(QUESTIONS))
        assert int(vectors.response_tokens[p, q]) == len(response) > 0
        stream = model(make_pack([np.concatenate([document.ids, response])]), stop_after=6)
        assert relative_error(vectors.at(6)[p, q], stream[len(document) :].mean(0)) < 1e-5
        assert relative_error(vectors.at(6)[p, q], stream.mean(0)) > 1e-2  # the control: the prompt counted in


def test_an_empty_response_is_read_at_the_prompts_last_token(model: Qwen2, monkeypatch: pytest.MonkeyPatch) -> None:
    from minipersona.geometry import extraction
    from minipersona.model.generation import Completion

    monkeypatch.setattr(
        extraction, "generate", lambda model, requests, **_: [Completion(r.ids[:0], True) for r in requests]
    )
    tokenizer = load_tokenizer("tiny")
    b = extract(model, tokenizer, PERSONAS, QUESTIONS, [6], "B")
    assert b.response_tokens is not None and not b.response_tokens.any()
    assert relative_error(b.at(6), extract(model, tokenizer, PERSONAS, QUESTIONS, [6]).at(6)) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_steering_moves_the_vectors_by_itself(hf_model: Callable[..., Path], dtype: torch.dtype, bound: float) -> None:
    """extract(h + c v) - extract(h) = c v at the steered layer, relative to the largest |h|; c = 0 is the identity."""

    model = load_model(str(hf_model()), dtype=dtype, device="cpu")
    pack = make_pack([torch.arange(n).numpy() for n in (5, 11, 2)])
    vector = torch.linspace(-1, 1, 48, dtype=dtype)

    def stream(layer: int, coefficient: float, steered: int) -> torch.Tensor:
        return model(pack, taps={steered: lambda h: h + coefficient * vector}, stop_after=layer)

    plain = model(pack, stop_after=1)
    largest = float(plain.abs().max())
    assert torch.equal(stream(1, 0.0, 1), plain)
    moved = stream(1, 5.0, 1) - plain
    assert float((moved - 5.0 * vector).abs().max()) < bound * largest
    # The control: steered one block earlier, the difference is no longer c v.
    assert float((stream(1, 5.0, 0) - plain - 5.0 * vector).abs().max()) > 1e-3 * largest
    # Later blocks feel it, earlier ones cannot.
    assert torch.equal(stream(0, 5.0, 1), model(pack, stop_after=0))
    assert not torch.equal(stream(2, 5.0, 1), model(pack, stop_after=2))


@pytest.mark.parametrize("method, new", [("A", 0), ("B", 256)])
def test_prompts_and_responses_may_have_as_many_tokens_as_the_model_has_positions(
    model: Qwen2, monkeypatch: pytest.MonkeyPatch, method: str, new: int
) -> None:
    from minipersona.geometry import extraction

    monkeypatch.setattr(extraction, "_respond", lambda model, tokenizer, ids, progress: [ids[0][:1]] * len(ids))
    tokenizer = load_tokenizer("tiny")
    longest = max(len(document) for document in render_prompts(tokenizer, PERSONAS, QUESTIONS))
    for most, fits in ((longest + new, True), (longest + new - 1, False)):
        monkeypatch.setattr(model, "config", replace(model.config, max_position_embeddings=most))
        if fits:
            extract(model, tokenizer, PERSONAS, QUESTIONS, [0], method)
        else:
            with pytest.raises(UserError, match=rf"has {longest} tokens.* made for {most}"):
                extract(model, tokenizer, PERSONAS, QUESTIONS, [0], method)


def test_progress_counts_every_prompt_and_by_method_b_its_answer_too(model: Qwen2) -> None:
    for method, passes in (("A", 1), ("B", 2)):
        told: list[tuple[int, int]] = []
        tokenizer = load_tokenizer("tiny")
        extract(
            model, tokenizer, PERSONAS, QUESTIONS[:2], [0], method, pack_tokens=40,
            progress=lambda done, total, told=told: told.append((done, total)),
        )  # fmt: skip
        done = [count for count, _ in told]
        assert {total for _, total in told} == {6 * passes} and done == sorted(set(done)) and done[-1] == 6 * passes
        assert done[:6] == list(range(1, 7)) if method == "B" else len(done) > 1


def test_errors(model: Qwen2) -> None:
    tokenizer = load_tokenizer("tiny")
    with pytest.raises(UserError, match=r"layer 8.*blocks 0 to 7"):
        extract(model, tokenizer, PERSONAS, QUESTIONS, [8])
    with pytest.raises(UserError, match="layer -1"):
        extract(model, tokenizer, PERSONAS, QUESTIONS, [-1])
    with pytest.raises(UserError, match="method 'Z'"):
        extract(model, tokenizer, PERSONAS, QUESTIONS, [6], method="Z")
    words, personas = ["a " * 1900, "What is fair?"], dict(list(PERSONAS.items())[:2])
    fits = max(len(document) for document in render_prompts(tokenizer, personas, words))
    most = model.config.max_position_embeddings
    assert most - 256 < fits <= most
    extract(model, tokenizer, personas, words, [6])
    with pytest.raises(UserError, match=rf"has {fits:,} tokens and is to get 256 more; .* made for {most:,}"):
        extract(model, tokenizer, personas, words, [6], method="B")
