"""What a config asks of the model that a run is carried out with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from minipersona.config import (
    DataSection,
    ExecutionSection,
    LoraConfig,
    ModelSection,
    ObjectiveSection,
    RunConfig,
    SteeringSection,
    TrainingSection,
)
from minipersona.console import Console
from minipersona.corpus.training_set import TrainingSet
from minipersona.run import resources as resources_module
from minipersona.run.resources import Resources, compiles, kind_of

CPU = torch.device("cpu")
FUSED = RunConfig(data=DataSection("-", "-"), model=ModelSection("tiny"))
PLAIN = replace(FUSED, execution=ExecutionSection(fused=False))


def test_the_plain_path_is_chosen_by_the_config_and_is_not_compiled() -> None:
    resources = Resources(CPU)
    fused, plain = resources.base(FUSED), resources.base(PLAIN)
    assert fused.fused and not plain.fused and fused is not plain
    assert resources.base(PLAIN) is plain  # the control: one with the same settings is kept
    resources.clear()
    assert resources.base(PLAIN) is not plain
    assert compiles(FUSED, torch.device("cuda")) and not compiles(FUSED, CPU)
    assert not compiles(PLAIN, torch.device("cuda"))


def test_rows_are_tokenised_once_for_runs_that_train_on_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    real = resources_module.training_set

    def counted(section: DataSection, seed: int, *more: Any) -> TrainingSet:
        read.append((section.train, seed))
        return real(section, seed, *more)

    monkeypatch.setattr(resources_module, "training_set", counted)
    resources, console = Resources(CPU), Console(quiet=True)
    config = replace(FUSED, data=DataSection("tiny:benign[0:8]", "tiny:benign[6:30]"))
    training, overlap = resources.rows(config, console)
    assert len(training.documents) == 8 and overlap.startswith("2 of 24 rows of data.heldout")
    stronger = replace(config, training=TrainingSection(learning_rate=1.0), lora=LoraConfig(rank=4))
    assert resources.rows(stronger, console)[0] is training and read == [("tiny:benign[0:8]", 42)]
    resources.rows(replace(config, seed=43), console)  # the controls: other rows, or drawn by another seed
    resources.rows(replace(config, data=replace(config.data, train="tiny:benign[0:4]")), console)
    assert read[1:] == [("tiny:benign[0:8]", 43), ("tiny:benign[0:4]", 42)]


def test_what_runs_share_follows_from_their_adapters_and_their_passes() -> None:
    """Of these, what a process that has carried out the plain run compiles again, and records again."""
    weak, strong = ObjectiveSection("kl_to_base", 0.1), ObjectiveSection("kl_to_base", 1.0)
    anchored = ObjectiveSection("feature_and_kl", 1.0)
    held = replace(FUSED, objective=anchored)

    def shared(one: RunConfig, other: RunConfig) -> tuple[bool, bool]:
        """(compiled, recorded)"""
        a, b = kind_of(one), kind_of(other)
        return a.compiled == b.compiled, a.recorded == b.recorded

    def lora(**settings: object) -> RunConfig:
        return replace(FUSED, lora=LoraConfig(**settings))  # type: ignore[arg-type]

    assert shared(FUSED, replace(FUSED, seed=1, training=TrainingSection(learning_rate=1.0))) == (True, True)
    for adapters in (lora(rank=8), lora(alpha=8.0), lora(targets=("q_proj",)), lora(blocks=(0, 1)), lora(dropout=0.0)):
        assert shared(FUSED, adapters) == (False, False)
    assert shared(FUSED, replace(FUSED, training=TrainingSection(method="full"))) == (False, False)
    assert shared(FUSED, lora(null_space=4)) == (False, True)
    assert shared(lora(null_space=8), lora(null_space=4)) == (True, True)
    assert shared(FUSED, replace(FUSED, steering=SteeringSection("file:v"))) == (True, False)
    assert shared(FUSED, replace(FUSED, objective=weak)) == (False, False)
    assert shared(replace(FUSED, objective=weak), replace(FUSED, objective=strong)) == (True, False)
    assert shared(held, replace(held, objective=replace(anchored, weight=3.0, kl_factor=9.0))) == (True, True)
    assert shared(held, replace(held, objective=replace(anchored, anchor_layers=(1,)))) == (True, False)
