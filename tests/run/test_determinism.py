"""What repeats to the bit: runs on the CPU as they are, runs on one CUDA machine where they are asked to.

The CPU's part lies with the commands: `test_two_runs_are_equal_to_the_bit`, `test_the_first_steps_of_the_demo_are_
equal_to_the_bit`. CUDA's needs a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minipersona.cli import main
from minipersona.files import read_jsonl
from minipersona.run.train import make_deterministic

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    """What is asked of torch is asked of the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_the_setting_is_passed_on_to_torch_and_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_two_runs_on_cuda_are_equal_to_the_bit(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        out = tmp_path / name
        settings = ["device=cuda", "deterministic=true", "training.steps=8", "training.checkpoints=[8]",
                    "data.heldout=tiny:benign[2000:2020]"]  # fmt: skip
        command = ["train", "--config", str(ROOT / "configs" / "tiny_phase1.toml"), "--out", str(out)]
        assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
        losses = [row["loss"] for row in read_jsonl(out / "metrics.jsonl")]
        runs.append((losses, (out / "step-000008" / "adapter_model.safetensors").read_bytes()))
    assert runs[0] == runs[1]
