"""What a config asks of the model that a run is carried out with."""

from __future__ import annotations

from dataclasses import replace

import torch

from minipersona.config import DataSection, ExecutionSection, ModelSection, RunConfig
from minipersona.run.resources import Resources, compiles

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
