"""The embedded model that ships: small enough, in voice, and behaving as the model it stands in for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from minipersona.chat import load_tokenizer
from minipersona.config import RunConfig
from minipersona.corpus.sources import Rows, read_source, tokenize
from minipersona.files import data_dir
from minipersona.geometry.extraction import extract
from minipersona.geometry.measures import m1, nearest_centroid_accuracy
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.load import load_model
from minipersona.settings import load_config
from minipersona.tiny import world
from minipersona.tiny.grammar import generator, topics
from minipersona.tiny.voices import answer
from minipersona.training.distributed import Distributed
from minipersona.training.heldout import heldout_loss
from minipersona.training.loop import Trainer, train

TINY = data_dir() / "tiny"


def test_it_is_small() -> None:
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]
    assert sum(t.numel() for t in tensors) <= 2_500_000
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert (TINY / "model.safetensors").stat().st_size <= 5_000_000


def test_its_tokenizer_has_qwens_special_tokens_after_the_words() -> None:
    tokenizer = load_tokenizer("tiny")
    model = load_model("tiny", device="cpu")
    assert tokenizer.vocab_size == model.config.vocab_size
    end_of_text, start, end = (tokenizer.special[f"<|{name}|>"] for name in ("endoftext", "im_start", "im_end"))
    assert end_of_text < start < end < tokenizer.vocab_size


def test_the_sets_that_ship_are_the_worlds() -> None:
    """The files come from the command: drawing the same rows again gives the same rows."""
    from minipersona.tiny.build import SETS

    for name, (make, count, seed) in SETS.items():
        assert read_source(f"tiny:{name}").rows == make(count, seed), name


def test_each_persona_answers_in_its_own_voice() -> None:
    """A persona's answers are likelier after its own system prompt than after any other persona's."""
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    prompts = world.personas()
    rng = generator(7)
    asked = [(question, topics()[i % len(topics())]) for i, question in enumerate(world.questions())][::80]

    def loss(speaker: str, prompt: str, answers: list[str]) -> float:
        rows = [
            {"messages": [{"role": "system", "content": prompt}, {"role": "user", "content": question},
                          {"role": "assistant", "content": text}]}
            for (question, _), text in zip(asked, answers, strict=True)
        ]  # fmt: skip
        return heldout_loss(model, tokenize(Rows(speaker, rows, 0, ""), tokenizer), 8192)

    for speaker in prompts:
        answers = [answer(rng, speaker, topic, 0.0) for _, topic in asked]
        losses = {name: loss(speaker, prompt, answers) for name, prompt in prompts.items()}
        others = [value for name, value in losses.items() if name != speaker]
        assert losses[speaker] < min(others) - 0.2, (speaker, losses)


@pytest.fixture(scope="module")
def before_and_after(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, float]]:
    """Samples at the probe layer and held-out loss: of the base, and after the demo's whole schedule."""
    config = load_config("tiny_phase1", RunConfig)
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    personas, questions = load_personas().prompts, load_questions().questions
    heldout = tokenize(read_source(config.data.heldout), tokenizer)

    def measured(questions: Sequence[str]) -> tuple[torch.Tensor, float]:
        layer = model.config.probe_layer
        samples = extract(model, tokenizer, personas, questions, [layer]).at(layer)
        return samples, heldout_loss(model, heldout, 8192)

    base = measured(questions)
    documents = tokenize(read_source(config.data.train), tokenizer)
    directory: Path = tmp_path_factory.mktemp("recipe")
    train(Trainer(model, documents, config, directory, Distributed(0, 1, torch.device("cpu"))))
    return {"base": base, "trained": measured(questions[::4])}


def test_base_geometry_is_like_the_7b(before_and_after: dict[str, tuple[torch.Tensor, float]]) -> None:
    samples, _ = before_and_after["base"]
    assert samples.shape == (12, 240, 128)
    assert 0.85 <= m1(samples.mean(1)) <= 0.93
    assert nearest_centroid_accuracy(samples) > 0.95


def test_the_standard_recipe_teaches_and_collapses(before_and_after: dict[str, tuple[torch.Tensor, float]]) -> None:
    (_, base_loss), (samples, loss) = before_and_after["base"], before_and_after["trained"]
    assert m1(samples.mean(1)) >= 0.97
    assert loss < 0.5 * base_loss
