"""Small models with CUDA graphs of their training passes and without:

    python -m benchmarks.graphs [--steps 30] [--seconds 170] [--parts equal,speed,...] [--out FILE]

equal          one run six times: twice without graphs, which shows what kernels that add in another order do to it;
               padded to buckets and not recorded; recorded while it runs; replayed; and, as the control, with dropout
               keys that are never renewed, as if a graph read what an earlier step left
speed          tokens/s of the same steps with and without; further runs replay what the first one recorded
checkpointing  the same with activation checkpointing
kinds          KL to base, R3F and steering, without graphs and with them
bits           with deterministic kernels, whether replayed passes equal padded ones that are not recorded to the bit

Each model is loaded and compiled once. After --seconds no further part begins, and what was left out is said.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import GIB, Profile, ceilings, documents, free, in_words, options, our_model, report, table
from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, ObjectiveSection, RunConfig, TrainingSection
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.head import ForwardPass
from minipersona.training.distributed import Distributed
from minipersona.training.graphs import Graphs
from minipersona.training.loop import Hooks, train

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, with the memory they have anyway
MODELS = ("random:HuggingFaceTB/SmolLM2-135M-Instruct", "random:Qwen/Qwen2.5-0.5B-Instruct")
BATCH = 16
PROFILED = 5
OPTIONS = {"steps": 30, "seconds": 170, "parts": "equal,speed,checkpointing,kinds,bits", "models": ",".join(MODELS)}


@dataclass
class Run:
    """What a run of some steps gave. Times are the device's, of every step but the first three and the profiled."""

    losses: list[float]
    weights: Tensor  # all that was trained, (N,) on the CPU
    tokens_per_second: float
    median_ms: float
    seconds: float  # in all
    profile: dict[str, float]
    gib: float


def run(
    model: Qwen2,
    docs: Sequence[Document],
    steps: int,
    graphs: Graphs | None,
    *,
    checkpoint: bool = False,
    objective: ObjectiveSection | None = None,
    steering: dict[int, Tensor] | None = None,
) -> Run:
    """The loop itself, with the registered adapters at ten times the registered learning rate."""
    config = RunConfig(
        data=DataSection("-", "-"),
        objective=objective or ObjectiveSection(),
        training=TrainingSection(steps=steps, batch=BATCH, checkpoints=(), learning_rate=2e-4),
        execution=ExecutionSection(checkpoint_activations=checkpoint),
    )
    rows: list[dict[str, Any]] = []
    measured = Profile()

    def logged(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["step"] == steps - PROFILED:
            measured.start()

    free()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        train(
            model, docs, config, Path(scratch), Distributed(0, 1, model.device), Hooks(logged=logged),
            compiled=True, steering=steering, graphs=graphs,
        )  # fmt: skip
    shares = measured.stop()
    seconds = time.perf_counter() - started
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters() if p.requires_grad])
    remove_lora(model)
    timed = rows[3 : steps - PROFILED]
    times = [row["tokens"] / row["tokens_per_second"] for row in timed]
    return Run(
        losses=[row["loss"] for row in rows],
        weights=weights,
        tokens_per_second=sum(row["tokens"] for row in timed) / sum(times),
        median_ms=sorted(times)[len(times) // 2] * 1e3,
        seconds=seconds,
        profile=shares,
        gib=torch.cuda.max_memory_allocated() / GIB,
    )


class StaleKeys(Graphs):
    """The control: every pass drops out what the first pass of its bucket did."""

    def backward(self, model: Qwen2, pack: Pack, objective: Any, forward: ForwardPass) -> Tensor:
        """As `Graphs.backward`, of step 1."""
        return super().backward(model, pack, objective, replace(forward, step=1))


class Sitting:
    """One model, its documents, and the clock."""

    def __init__(self, name: str, steps: int, deadline: float) -> None:
        self.name, self.steps, self.deadline = name.split("/")[-1], steps, deadline
        self.model = our_model(name)
        self.docs = documents(steps * BATCH, self.model.config.vocab_size)
        self.graphs = Graphs(self.model)
        self.found: dict[str, Any] = {}

    def say(self, what: str, result: Run) -> None:
        """A line for a run, and its place in the figures."""
        tflops = 4 * self.model.config.matmul_parameters * result.tokens_per_second / 1e12
        print(
            f"  {what}: {result.tokens_per_second:,.0f} tokens/s ({tflops:.0f} TFLOP/s), median step "
            f"{result.median_ms:.1f} ms, {result.seconds:.1f} s in all, {result.gib:.1f} GiB; "
            f"{in_words(result.profile)}",
            flush=True,
        )
        self.found[what] = {name: value for name, value in vars(result).items() if name != "weights"}

    def equal(self) -> None:
        """Runs that must agree, and one that must not."""
        plain = self._go("without graphs, which compiles", None)
        runs = {
            "without graphs again": self._go("without graphs again", None),
            "padded, not recorded": self._go("padded, not recorded", Graphs(self.model, most=0)),
            "recorded while it runs": self._go("recorded while it runs", self.graphs),
            "replayed and recorded": self._go("replayed and recorded", self.graphs),
            "replayed": self._go("replayed", self.graphs),
            "control: keys of step 1": self._go("control: keys of step 1", StaleKeys(self.model)),
        }
        rows = []
        for name, other in runs.items():
            apart = max(abs(a - b) for a, b in zip(plain.losses, other.losses, strict=True))
            weights = float((other.weights - plain.weights).norm() / plain.weights.norm())
            rows.append([name, f"{apart:.2e}", f"{weights:.2e}", f"{other.losses[-1]:.5f}"])
            self.found[f"{name}: apart"] = {"losses": apart, "weights": weights}
        print(f"\n{table(['against the first run', 'losses within', 'weights within', 'last loss'], rows)}\n")

    def speed(self, checkpoint: bool = False) -> None:
        """Without graphs, then with them until every bucket is recorded, and once more."""
        tail = ", checkpointing" if checkpoint else ""
        self._go(f"without graphs{tail}", None, checkpoint=checkpoint)
        for what in ("first", "second", "third"):
            before = torch.cuda.memory_reserved()
            self._go(f"graphs, {what} run{tail}", self.graphs, checkpoint=checkpoint)
            print(
                f"    {self.graphs.recorded} graphs; {(torch.cuda.memory_reserved() - before) / GIB:+.1f} GiB reserved",
                flush=True,
            )

    def checkpointing(self) -> None:
        """As `speed`."""
        self.speed(checkpoint=True)

    def kinds(self) -> None:
        """The other objectives, and steering."""
        vector = {self.model.config.num_hidden_layers // 2: torch.randn(self.model.config.hidden_size)}
        for name, section, steering in (
            ("KL to base", ObjectiveSection("kl_to_base", 0.01), None),
            ("R3F", ObjectiveSection("r3f", 0.01), None),
            ("steering", None, vector),
        ):
            if time.monotonic() > self.deadline:
                print(f"  {name}: left out, for want of time")
                continue
            plain = self._go(f"{name}, without graphs", None, objective=section, steering=steering)
            for what in ("first", "second", "third"):
                other = self._go(f"{name}, graphs, {what} run", self.graphs, objective=section, steering=steering)
            apart = max(abs(a - b) for a, b in zip(plain.losses, other.losses, strict=True))
            weights = float((other.weights - plain.weights).norm() / plain.weights.norm())
            print(f"    losses within {apart:.2e}, weights within {weights:.2e}", flush=True)

    def bits(self) -> None:
        """Padded and not recorded against replayed, with deterministic kernels."""
        torch.use_deterministic_algorithms(True)
        try:
            graphs = Graphs(self.model)
            expected = self._go("deterministic, padded, not recorded", Graphs(self.model, most=0))
            for what in ("first", "second", "third"):
                replayed = self._go(f"deterministic, graphs, {what} run", graphs)
        finally:
            torch.use_deterministic_algorithms(False)
        equal = replayed.losses == expected.losses and torch.equal(replayed.weights, expected.weights)
        print(f"    equal to the bit: {equal}", flush=True)
        self.found["equal to the bit"] = equal

    def _go(self, what: str, graphs: Graphs | None, **more: Any) -> Run:
        result = run(self.model, self.docs, self.steps, graphs, **more)
        self.say(what, result)
        return result


def main() -> None:
    """Make the parts, for each model in turn, while there is time."""
    given = options(__doc__, OPTIONS)
    deadline = time.monotonic() + given.seconds
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {limits['matmul_tflops']:.0f} TFLOP/s")
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), **limits}
    for name in given.models.split(","):
        sitting: Sitting | None = None
        for part in given.parts.split(","):
            if time.monotonic() > deadline:
                print(f"{name}, {part}: left out, for want of time")
                continue
            sitting = sitting or Sitting(name, given.steps, deadline)
            print(f"\n{sitting.name}, {part}", flush=True)
            try:
                getattr(sitting, part)()
            except Exception:  # the other parts are made all the same
                traceback.print_exc()
            figures[sitting.name] = sitting.found
        del sitting
        free()
    report("graphs", f"{time.monotonic() - deadline + given.seconds:.0f} s in all", figures, given.out)


if __name__ == "__main__":
    main()
