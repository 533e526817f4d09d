"""The vectors file: round trip, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minipersona.errors import UserError
from minipersona.geometry.vectors import PersonaVectors, load_vectors, response_lengths

P, Q, D = 3, 5, 4
NAMES = ["poet", "villain", "café owner"]
META = {"personas": json.dumps(NAMES)}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    samples = gaussian(P, Q, D)
    return {"layer.20.samples": samples, "layer.20.mean": samples.mean(1), **changes}


def test_round_trip(tmp_path: Path) -> None:
    samples = {20: gaussian(P, Q, D), 7: gaussian(P, Q, D, seed=1).transpose(1, 2).contiguous().transpose(1, 2)}
    vectors = PersonaVectors(samples, NAMES, {"model": "tiny", "method": "A"})
    vectors.save(tmp_path / "deep" / "v.safetensors")
    loaded = load_vectors(tmp_path / "deep" / "v.safetensors")
    assert loaded.layers == [7, 20]
    assert loaded.personas == NAMES
    assert loaded.metadata == {"model": "tiny", "method": "A"}
    for layer in (7, 20):
        assert torch.equal(loaded.at(layer), samples[layer])
        assert torch.equal(loaded.mean(layer), vectors.mean(layer))


def test_one_layer_is_read_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    others = {"layer.7.samples": gaussian(P, Q, D, seed=1), "layer.7.mean": gaussian(P, D)}  # a mean of other samples
    save_file(tensors(**others), path, META)
    loaded = load_vectors(path, layer=20)
    assert loaded.layers == [20] and torch.equal(loaded.at(20), tensors()["layer.20.samples"])
    with pytest.raises(UserError, match=r"layer\.7\.mean is not the fp32 mean"):
        load_vectors(path, layer=7)
    with pytest.raises(UserError, match=r"v\.safetensors: no layer 3 among layer\.20\.mean, .*extract that layer"):
        load_vectors(path, layer=3)


def test_file_format(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    PersonaVectors({20: gaussian(P, Q, D)}, NAMES, {"model": "tiny"}).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}
    assert shapes == {"layer.20.mean": (P, D), "layer.20.samples": (P, Q, D)}
    assert dtypes == {torch.float32}
    assert json.loads(metadata["personas"]) == NAMES
    assert metadata["model"] == "tiny"
    assert "counted from 0" in metadata["convention"] and "hidden_states[L + 1]" in metadata["convention"]


def test_file_follows_the_umask_and_leaves_nothing_else(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        PersonaVectors({20: gaussian(P, Q, D)}, NAMES).save(tmp_path / "v.safetensors")
    finally:
        os.umask(umask)
    assert os.listdir(tmp_path) == ["v.safetensors"]
    assert (tmp_path / "v.safetensors").stat().st_mode & 0o777 == 0o644


def test_mean_is_the_mean_over_questions() -> None:
    samples = gaussian(P, Q, D)
    vectors = PersonaVectors({20: samples}, NAMES)
    assert vectors.mean(20).dtype == torch.float32
    torch.testing.assert_close(vectors.mean(20), samples.mean(1))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(vectors.mean(20)[:, :P], samples.mean(0)[:P, :P])
    with pytest.raises(UserError, match=r"no layer 7 .*choose from \[20\]"):
        vectors.mean(7)


@pytest.mark.parametrize(
    "samples, message",
    [
        ({}, "no layer"),
        ({20: gaussian(P + 1, Q, D)}, r"layer 20 are \(4, 5, 4\), not \(3 personas"),
        ({20: gaussian(P, D)}, "layer 20"),
        ({20: gaussian(P, 0, D)}, "layer 20"),
        ({20: gaussian(P, Q, D), 21: gaussian(P, Q + 1, D)}, "layer 20"),
        ({20: gaussian(P, Q, D).half()}, "torch.float16"),
    ],
)
def test_samples_that_do_not_fit(samples: dict[int, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PersonaVectors(samples, NAMES)


def test_a_value_that_is_not_finite_is_found() -> None:
    samples = gaussian(P, Q, D)
    samples[1, 3, 2] = torch.nan
    with pytest.raises(UserError, match="layer 20, persona 'villain', question 3 is not finite"):
        PersonaVectors({20: samples}, NAMES)


@pytest.mark.parametrize(
    "content, metadata, message",
    [
        ({"layer.20.mean": gaussian(P, D)}, META, "no tensor layer.20.samples"),
        ({"layer.20.samples": gaussian(P, Q, D)}, META, "no tensor layer.20.mean"),
        ({"weight": gaussian(P, D)}, META, "unknown tensor 'weight'"),
        (tensors(**{"layer.20.mean": gaussian(P, D, seed=1)}), META, "not the fp32 mean"),
        (tensors(**{"layer.20.mean": gaussian(D, seed=1)}), META, "not the fp32 mean"),
        (tensors(**{"layer.20.mean": gaussian(P, Q, D).mean(1).bfloat16()}), META, "not the fp32 mean"),
        (tensors(**{"layer.20.samples": gaussian(P, D)}), META, "samples of layer 20"),
        (tensors(**{"layer.20.samples": torch.full((P, Q, D), torch.nan)}), META, "not finite"),
        (tensors(), {}, "'personas'"),
        (tensors(), {"personas": "poet, villain"}, "'personas'"),
        (tensors(), {"personas": "[1, 2, 3]"}, "'personas'"),
        (tensors(), {"personas": '["poet"]'}, "1 personas"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, content: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "v.safetensors"
    save_file(content, path, metadata)
    with pytest.raises(UserError, match=message) as caught:
        load_vectors(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_right_file_of_another_writer_loads(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "v.safetensors", META)
    assert load_vectors(tmp_path / "v.safetensors").personas == NAMES


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "v.safetensors"
    PersonaVectors({20: gaussian(P, Q, D)}, NAMES).save(whole)
    content = whole.read_bytes()
    broken = {
        "cut in the data": content[:-10],
        "cut in the header": content[:50],
        "empty": b"",
        "text": b"m1 = 0.9\n" * 9,
    }
    for what, damaged in broken.items():
        path = tmp_path / what
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="could not be read as safetensors") as caught:
            load_vectors(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="no vectors file"):
            load_vectors(path)


def test_response_lengths_travel_with_the_vectors(tmp_path: Path) -> None:
    counts = torch.tensor([[1, 2, 3, 4, 0], [5, 5, 5, 5, 5], [9, 8, 7, 6, 0]], dtype=torch.int32)
    PersonaVectors({20: gaussian(P, Q, D)}, NAMES, response_tokens=counts).save(tmp_path / "v.safetensors")
    loaded = load_vectors(tmp_path / "v.safetensors")
    assert loaded.response_tokens is not None and torch.equal(loaded.response_tokens, counts)
    assert response_lengths(loaded)["poet"] == {"mean": 2.0, "shortest": 0, "longest": 4, "empty": 1}
    for wrong in (counts[:2], counts.long()):
        with pytest.raises(UserError, match="response_tokens"):
            PersonaVectors({20: gaussian(P, Q, D)}, NAMES, response_tokens=wrong)
