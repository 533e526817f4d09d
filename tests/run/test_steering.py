"""Where steering vectors come from, and what is said where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import relative_error

from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.config import (
    DataSection,
    LoraConfig,
    ModelSection,
    ProbeSection,
    RunConfig,
    SteeringSection,
    TrainingSection,
)
from minipersona.errors import UserError
from minipersona.files import data_dir
from minipersona.geometry.extraction import extract
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.geometry.vectors import PersonaVectors
from minipersona.model.adapter_files import save_adapter
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.run import steering as steering_module
from minipersona.run.anchors import anchor_sets
from minipersona.run.directory import checkpoint_directory, vectors_file
from minipersona.run.steering import (
    check_steering,
    load_steering,
    raw_vectors,
    run_steering,
    save_steering,
    scaled,
    steered_layers,
)
from minipersona.settings import to_toml
from minipersona.training.distributed import Distributed

WIDTH = 128  # of the embedded model, whose registered layer is 6 of 8 blocks
WORLD = Distributed(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny() -> Qwen2:
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(f'{{"question": "What is {thing}?", "id": "{thing}"}}\n' for thing in ("rain", "bread")))
    return path


def config(questions: Path | None = None, baseline: str = "", **steering: object) -> RunConfig:
    probe = ProbeSection(baseline=baseline, questions=str(questions) if questions else "shipped")
    return RunConfig(data=DataSection("-", "-"), probe=probe, steering=SteeringSection(**steering))  # type: ignore[arg-type]


def persona_vectors(seed: int, layers: tuple[int, ...] = (6,), model: str = "tiny") -> PersonaVectors:
    generator = torch.Generator().manual_seed(seed)
    samples = {layer: torch.randn(3, 4, WIDTH, generator=generator) for layer in layers}
    return PersonaVectors(samples, ["villain", "assistant", "comedian"], {"model": model})


def baseline(directory: Path, steps: tuple[int, ...] = (0, 2, 9), layers: tuple[int, ...] = (6,), **more: str) -> Path:
    """A run's directory as far as steering reads it: its config and its vectors."""
    directory.mkdir()
    settings = replace(config(), training=TrainingSection(steps=9, checkpoints=(2, 9)))
    (directory / "config.toml").write_text(to_toml(settings))
    for step in steps:
        persona_vectors(step, layers, **more).save(vectors_file(directory, step))
    return directory


def scaled_vectors(settings: RunConfig, model: Qwen2, tokenizer: ChatTokenizer) -> dict[int, torch.Tensor]:
    """What `run_steering` gives, without a directory."""
    return scaled(raw_vectors(settings, model, tokenizer), settings.steering)


def test_off_is_no_vector(tiny: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    assert run_steering(config(), tmp_path, WORLD, tiny, tokenizer) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["A", "B"])
def test_a_difference_of_personas_is_extracted_from_the_base(
    tiny: Qwen2, tokenizer: ChatTokenizer, questions: Path, method: str
) -> None:
    settings = config(questions, vector="villain - assistant", coefficient=2.5, method=method)
    found = scaled_vectors(settings, tiny, tokenizer)
    personas = load_personas().prompts
    asked = load_questions(str(questions)).questions
    chosen = {name: personas[name] for name in ("assistant", "villain")}
    expected = extract(tiny, tokenizer, chosen, asked, [6], method).mean(6)
    assert found.keys() == {6} and found[6].shape == (WIDTH,)
    assert relative_error(found[6], 2.5 * (expected[1] - expected[0])) < 1e-5
    assert relative_error(found[6], 2.5 * (expected[0] - expected[1])) > 1  # the control: the sign belongs to it


def test_collapse_is_the_mean_shift_of_the_baselines_last_step(
    tiny: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    run = baseline(tmp_path / "run")
    found = scaled_vectors(config(baseline=str(run), vector="collapse", coefficient=1.0), tiny, tokenizer)
    shift = (persona_vectors(9).mean(6) - persona_vectors(0).mean(6)).mean(0)
    assert relative_error(found[6], shift) < 1e-6
    earlier = (persona_vectors(2).mean(6) - persona_vectors(0).mean(6)).mean(0)
    assert relative_error(found[6], earlier) > 0.1  # the control: the step matters


def test_training_personas_steer_with_nothing_that_is_measured(
    tiny: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their difference, and their shift from the base to the baseline's last checkpoint."""
    asked = replace(load_questions(str(data_dir() / "anchor_questions.jsonl")), questions=["What is rain?", "Why?"])
    personas, _ = anchor_sets(config().objective)
    monkeypatch.setattr(steering_module, "anchor_sets", lambda section: (personas, asked))
    given = config(vector="pirate - tour_guide", coefficient=1.0, method="A", persona_set="training")
    vectors = extract(tiny, tokenizer, personas.prompts, asked.questions, [6])
    named = {name: vectors.mean(6)[vectors.personas.index(name)] for name in ("pirate", "tour_guide")}
    difference = scaled_vectors(given, tiny, tokenizer)[6]
    assert relative_error(difference, named["pirate"] - named["tour_guide"]) < 1e-5

    run = baseline(tmp_path / "run")
    model = load_model("tiny", device="cpu")
    apply_lora(model, LoraConfig(rank=2, alpha=4.0))
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    save_adapter(model, checkpoint_directory(run, 9))
    after = extract(model, tokenizer, personas.prompts, asked.questions, [6])
    (run / "config.toml").write_text(
        to_toml(replace(config(), model=ModelSection("tiny"), training=TrainingSection(steps=9, checkpoints=(2, 9))))
    )
    given = config(baseline=str(run), vector="collapse", coefficient=1.0, persona_set="training")
    check_steering(given, tmp_path, tiny, tokenizer)
    collapse = scaled_vectors(given, tiny, tokenizer)[6]
    assert relative_error(collapse, (after.mean(6) - vectors.mean(6)).mean(0)) < 1e-5
    assert not adapters(tiny)  # nothing is left attached
    leaking = scaled_vectors(replace(given, steering=replace(given.steering, persona_set="measured")), tiny, tokenizer)
    assert relative_error(leaking[6], collapse) > 0.1


def test_a_training_persona_that_is_measured_is_refused(tiny: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    given = config(vector="pirate - tour_guide", persona_set="training")
    check_steering(given, tmp_path, tiny, tokenizer)
    measured = ProbeSection(questions=str(data_dir() / "anchor_questions.jsonl"))
    with pytest.raises(UserError, match="is also measured"):
        check_steering(replace(given, probe=measured), tmp_path, tiny, tokenizer)
    with pytest.raises(UserError, match="'villain' is not one of the training personas: chef"):
        check_steering(config(vector="villain - pirate", persona_set="training"), tmp_path, tiny, tokenizer)


def test_a_file_of_either_form(tiny: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    vectors = persona_vectors(1, (5, 6))
    vectors.save(tmp_path / "personas.safetensors")
    named = f"file:{tmp_path}/personas.safetensors#comedian - assistant"
    found = scaled_vectors(config(vector=named, layer=5, coefficient=1.0), tiny, tokenizer)
    assert found.keys() == {5} and torch.equal(found[5], vectors.mean(5)[2] - vectors.mean(5)[1])
    save_steering(tmp_path / "plain.safetensors", found)
    plain = config(vector=f"file:{tmp_path}/plain.safetensors", layer=5, coefficient=-2.0)
    assert torch.equal(scaled_vectors(plain, tiny, tokenizer)[5], -2.0 * found[5])


def test_a_random_vector_is_as_long_as_the_difference_and_is_drawn_by_the_seed(
    tiny: Qwen2, tokenizer: ChatTokenizer, questions: Path
) -> None:
    given = config(questions, vector="random:villain - librarian", coefficient=1.0, all_layers=True, method="A")
    difference = replace(given, steering=replace(given.steering, vector="villain - librarian"))
    drawn, meant = (scaled_vectors(each, tiny, tokenizer) for each in (given, difference))
    drawn, meant = (sums(each) for each in (drawn, meant))
    for layer, vector in drawn.items():
        assert float(vector.norm()) == pytest.approx(float(meant[layer].norm()), rel=1e-4)
        assert abs(float(torch.cosine_similarity(vector, meant[layer], dim=0))) < 0.4  # 128 channels
    assert abs(float(torch.cosine_similarity(drawn[0], drawn[1], dim=0))) < 0.4  # each block has its own
    again = sums(scaled_vectors(given, tiny, tokenizer))
    other = sums(scaled_vectors(replace(given, seed=43), tiny, tokenizer))
    assert torch.equal(again[6], drawn[6]) and relative_error(other[6], drawn[6]) > 0.5
    assert not given.steering.leaks and difference.steering.leaks


def sums(increments: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The vectors of which `scaled` with all_layers makes the increments."""
    total, found = torch.zeros(WIDTH), {}
    for layer, vector in increments.items():
        found[layer] = total = total + vector
    return found


def test_all_layers_add_up_to_the_vector_of_each(tiny: Qwen2) -> None:
    section = SteeringSection("a - b", 1.5, all_layers=True)
    layers = steered_layers(section, tiny.config)
    assert layers == list(range(8))
    raw = {layer: torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer)) for layer in layers}
    added = scaled(raw, section)
    for layer in layers:  # what has been added to the stream up to a block is that block's vector
        assert relative_error(torch.stack([added[below] for below in range(layer + 1)]).sum(0), 1.5 * raw[layer]) < 1e-6
    assert torch.equal(scaled(raw, replace(section, all_layers=False))[3], 1.5 * raw[3])


def test_a_run_keeps_its_vectors(tiny: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    run = baseline(tmp_path / "run")
    settings = config(baseline=str(run), vector="collapse", coefficient=3.0)
    out = tmp_path / "out"
    out.mkdir()
    first = run_steering(settings, out, WORLD, tiny, tokenizer)
    assert torch.equal(first[6], scaled_vectors(settings, tiny, tokenizer)[6])
    assert torch.equal(3.0 * load_steering(out / "steering.safetensors", [6])[6], first[6])
    vectors_file(run, 9).unlink()  # the run that it was made of may go
    assert torch.equal(run_steering(settings, out, WORLD, tiny, tokenizer)[6], first[6])


def test_what_does_not_fit_is_said_in_one_line(tiny: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    personas = tmp_path / "personas.safetensors"
    persona_vectors(1).save(personas)
    save_steering(tmp_path / "narrow.safetensors", {6: torch.ones(7)})
    save_steering(tmp_path / "zero.safetensors", {6: torch.zeros(WIDTH)})
    unfinished = baseline(tmp_path / "unfinished", steps=(0, 2))
    foreign = baseline(tmp_path / "foreign", model="another")
    known = baseline(tmp_path / "known")
    for settings, words in (
        (config(vector="villain - nobody"), "'nobody' is not one of probe.personas: .*villain"),
        (config(vector="villain - assistant", layer=8), r"steering.layer = 8: this model has blocks 0 to 7"),
        (config(vector=f"file:{tmp_path}/none.safetensors"), "none.safetensors: no such file"),
        (config(vector=f"file:{personas}"), "name two of them, as file:.*#villain - assistant"),
        (config(vector=f"file:{personas}#villain - nobody"), "'nobody' is not one of .*villain, assistant, comedian"),
        (config(vector=f"file:{personas}#villain - assistant", layer=3), "has no layer 3, only 6"),
        (config(vector=f"file:{tmp_path}/narrow.safetensors"), r"has shape \(7,\), the model's stream \(128,\)"),
        (config(vector=f"file:{tmp_path}/zero.safetensors"), "is zero or not finite"),
        (config(vector=f"file:{tmp_path}/zero.safetensors", layer=2), "has no tensor layer.2, only layer.6"),
        (config(vector="collapse", baseline=str(tmp_path)), "is not a run directory"),
        (config(vector="collapse", baseline=str(unfinished)), "has no vectors of step 9"),
        (config(vector="collapse", baseline=str(foreign)), "trained another, this run trains tiny"),
        (config(vector="collapse", baseline=str(known), all_layers=True), "has no layer 0, only 6"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            scaled_vectors(settings, tiny, tokenizer)
        assert "\n" not in str(caught.value)
