"""The loss of every held-out row: each row's own, under the persona whose turn it is, and its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_study import small_study

from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.console import Console
from minipersona.corpus.sources import Rows, tokenize
from minipersona.errors import UserError
from minipersona.model.load import load_model
from minipersona.model.network import Qwen2
from minipersona.run.directory import losses_file, vectors_file
from minipersona.run.losses import HeldoutLosses, load_losses
from minipersona.run.measurement import Instruments, make_instruments, measure, under_personas
from minipersona.run.resources import Resources, resolve
from minipersona.run.train import Evaluator
from minipersona.study.recipes import standard_config
from minipersona.training.distributed import Distributed
from minipersona.training.heldout import heldout_loss

QUIET = Console(quiet=True)
CPU = Distributed(0, 1, torch.device("cpu"))
SYSTEM = {"role": "system", "content": "You are a machine."}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def model() -> Qwen2:
    return load_model("tiny", device="cpu")


def instruments(model: Qwen2, tokenizer: ChatTokenizer, directory: Path, heldout: str | None) -> Instruments:
    """Three personas and three questions."""
    probe = small_study(directory).probe
    return make_instruments(
        model, tokenizer, personas=probe.personas, questions=probe.questions, layers=[6], heldout=heldout
    )


def test_each_row_has_its_own_loss_and_the_losses_pool_to_what_is_reported(
    model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    with_these = instruments(model, tokenizer, tmp_path, "tiny:benign[2000:2007]")
    metrics, vectors, losses = measure(model, with_these, QUIET)
    assert losses is not None and with_these.heldout is not None and with_these.heldout_under_personas is not None
    parts = (
        (with_these.heldout, losses.nats, losses.tokens),
        (with_these.heldout_under_personas, losses.persona_nats, losses.persona_tokens),
    )
    for documents, nats, tokens in parts:
        alone = torch.tensor([heldout_loss(model, [document], 1000) for document in documents], dtype=torch.float64)
        assert tokens.tolist() == [int(document.supervised.sum()) for document in documents]
        torch.testing.assert_close(nats / tokens, alone, rtol=1e-5, atol=0)
    assert metrics.eval_loss == pytest.approx(float(losses.nats.sum() / losses.tokens.sum()), rel=1e-12)
    assert metrics.persona_loss == pytest.approx(float(losses.persona_nats.sum() / losses.persona_tokens.sum()))
    assert metrics.persona_loss != pytest.approx(metrics.eval_loss, rel=1e-3)  # another prompt is another loss
    # M1 by persona and without each, by name, from the same vectors.
    names = list(with_these.personas.prompts)
    assert metrics.m1_by_persona is not None and list(metrics.m1_by_persona) == names
    assert metrics.m1_without is not None and list(metrics.m1_without) == names
    assert sum(metrics.m1_by_persona.values()) / 3 == pytest.approx(metrics.m1, abs=1e-12)
    a, b = vectors.mean(6)[1:]
    assert metrics.m1_without[names[0]] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)


def test_without_held_out_rows_there_are_no_losses(model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    metrics, _, losses = measure(model, instruments(model, tokenizer, tmp_path, None), QUIET)
    assert losses is None and metrics.eval_loss is None and metrics.persona_loss is None


def test_row_i_has_the_prompt_of_persona_i_mod_p_in_place_of_its_own(
    model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    personas = instruments(model, tokenizer, tmp_path, None).personas
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    contents = [{"messages": asked}, {"messages": [SYSTEM, *asked]}, {"text": "raw text"}, {"messages": asked}]
    rows = Rows("rows", contents, 0, "")
    documents = under_personas(rows, personas, lambda rows: tokenize(rows, tokenizer))
    prompts = list(personas.prompts.values())
    for i, persona in ((0, 0), (1, 1), (3, 0)):
        expected = tokenizer.encode([{"role": "system", "content": prompts[persona]}, *asked])
        assert documents[i].ids.tolist() == expected.ids.tolist()
        assert documents[i].supervised.tolist() == expected.supervised.tolist()
    assert len(documents[2]) == 0  # raw text has no system prompt
    assert rows.rows == contents  # as they were


def test_losses_of_raw_text_count_only_as_they_are(model: Qwen2, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    metrics, _, losses = measure(model, instruments(model, tokenizer, tmp_path, "tiny:raw_text[0:2]"), QUIET)
    assert losses is not None and losses.persona_tokens.tolist() == [0, 0] and losses.persona_nats.tolist() == [0, 0]
    assert metrics.eval_loss is not None and metrics.persona_loss is None


# ---------------------------------------------------------------- the file


LOSSES = HeldoutLosses(
    torch.tensor([2.5, 0.0], dtype=torch.float64),
    torch.tensor([3, 0]),
    torch.tensor([1.5, 7.0], dtype=torch.float64),
    torch.tensor([3, 9]),
)


def test_losses_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    LOSSES.save(tmp_path / "losses.safetensors")
    found = load_losses(tmp_path / "losses.safetensors")
    assert all(torch.equal(getattr(found, f.name), getattr(LOSSES, f.name)) for f in fields(LOSSES))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("tokens"),
        lambda tensors: tensors.update(more=torch.zeros(2)),
        lambda tensors: tensors.update(nats=torch.zeros(2)),
        lambda tensors: tensors.update(persona_tokens=torch.zeros(3, dtype=torch.int64)),
        lambda tensors: tensors.update(persona_nats=torch.tensor([-1.0, 0.0], dtype=torch.float64)),
        lambda tensors: tensors.update(nats=torch.tensor([float("nan"), 0.0], dtype=torch.float64)),
    ],
)
def test_what_cannot_be_losses_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    tensors = dict(vars(LOSSES))
    damage(tensors)
    save_file(tensors, tmp_path / "losses.safetensors")
    with pytest.raises(UserError, match=r"losses\.safetensors: .*measure the run again"):
        load_losses(tmp_path / "losses.safetensors")


# ---------------------------------------------------------------- with the base's measurement


def test_the_losses_of_the_base_are_taken_over_with_its_vectors(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    config = standard_config(study, seed=42)
    config = resolve(replace(config, probe=replace(config.probe, baseline="self")), CPU.device)
    resources = Resources(CPU.device)
    model, tokens, with_these = resources.base(config), resources.tokenizer(config), resources.instruments(config)

    def evaluator(name: str) -> Evaluator:
        (tmp_path / name).mkdir()
        return Evaluator(config, tmp_path / name, CPU, QUIET, model, tokens, with_these)

    first, second, third = (evaluator(name) for name in "abc")
    first.measure(0)
    second.take_over_base(first.directory)
    for file in (vectors_file, losses_file):
        assert file(second.directory, 0).read_bytes() == file(first.directory, 0).read_bytes()
    assert load_losses(losses_file(second.directory, 0)).eval_loss > 0
    # A directory that an earlier version measured has no losses; its base is taken over all the same.
    losses_file(first.directory, 0).unlink()
    third.take_over_base(first.directory)
    assert vectors_file(third.directory, 0).is_file() and not losses_file(third.directory, 0).exists()
