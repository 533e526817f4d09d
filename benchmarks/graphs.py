"""Small models with CUDA graphs of their training passes and without:

    python -m benchmarks.graphs [--steps 25] [--seconds 170] [--parts qwen.equal,smollm2.speed,...] [--out FILE]

equal          one run without graphs, twice, which shows what kernels that add in another order do to it; the same run
               with graphs, three times, of which the last only replays; and, as the control, with dropout keys that
               are never renewed, as if a graph read what an earlier step left
speed          graphs alone: what runs once a bucket is recorded is the third run
checkpointing  the same with activation checkpointing
steering, feature_anchor, r3f, kl_to_base   the same with each
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
from minipersona.chat import Document, load_tokenizer
from minipersona.config import DataSection, ExecutionSection, ObjectiveSection, RunConfig, TrainingSection
from minipersona.console import Console
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.head import ForwardPass
from minipersona.run.anchors import run_contexts
from minipersona.training.distributed import Distributed
from minipersona.training.graphs import Graphs
from minipersona.training.loop import Hooks, Trainer, train

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, with the memory they have anyway
MODELS = {"smollm2": "random:HuggingFaceTB/SmolLM2-135M-Instruct", "qwen": "random:Qwen/Qwen2.5-0.5B-Instruct"}
PARTS = (
    "qwen.equal", "smollm2.speed", "smollm2.steering", "qwen.checkpointing", "smollm2.feature_anchor", "smollm2.r3f",
    "smollm2.bits",
)  # fmt: skip
BATCH = 16
PROFILED = 10
OPTIONS = {"steps": 25, "seconds": 170, "parts": ",".join(PARTS), "tokenizer": "tiny"}


@dataclass
class Run:
    """What a run of some steps gave. Times are the device's, of every step but the first three and the profiled."""

    losses: list[float]
    weights: Tensor  # all that was trained, (N,) on the CPU
    tokens_per_second: float
    median_ms: float
    seconds: float  # in all
    profile: dict[str, float]  # empty where it was not profiled
    kernels: float  # a profiled step
    longest: list[tuple[str, int, float]]
    gib: float


def run(
    model: Qwen2,
    docs: Sequence[Document],
    steps: int,
    graphs: Graphs | None,
    *,
    profiled: bool = False,
    checkpoint: bool = False,
    objective: ObjectiveSection | None = None,
    steering: dict[int, Tensor] | None = None,
    tokenizer: str = "tiny",
) -> Run:
    """The loop itself, with the registered adapters at ten times the registered learning rate."""
    config = RunConfig(
        data=DataSection("-", "-"),
        objective=objective or ObjectiveSection(),
        training=TrainingSection(steps=steps, batch=BATCH, checkpoints=(), learning_rate=2e-4),
        execution=ExecutionSection(checkpoint_activations=checkpoint),
    )
    rows: list[dict[str, Any]] = []
    shares: dict[str, float] = {}
    measured = Profile()

    def logged(row: dict[str, Any]) -> None:
        rows.append(row)
        if profiled and row["step"] == steps - PROFILED:
            measured.start()
        if profiled and row["step"] == steps:  # before the last checkpoint is written
            shares.update(measured.stop())

    free()
    started = time.perf_counter()
    distributed = Distributed(0, 1, model.device)
    with tempfile.TemporaryDirectory() as scratch:
        contexts = run_contexts(config, Path(scratch), distributed, model, load_tokenizer(tokenizer), Console())
        trainer = Trainer(
            model, docs, config, Path(scratch), distributed, compiled=True, steering=steering, contexts=contexts,
            graphs=graphs,
        )  # fmt: skip
        train(trainer, Hooks(logged=logged))
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
        kernels=measured.kernels / PROFILED if profiled else 0.0,
        longest=measured.longest if profiled else [],
        gib=torch.cuda.max_memory_allocated() / GIB,
    )


class StaleKeys(Graphs):
    """The control: every pass drops out what the first pass of its bucket did."""

    def backward(self, model: Qwen2, pack: Pack, objective: Any, forward: ForwardPass) -> Tensor:
        """As `Graphs.backward`, of step 1."""
        return super().backward(model, pack, objective, replace(forward, step=1))


class Sitting:
    """One model, its documents, and the clock."""

    def __init__(self, name: str, steps: int, tokenizer: str) -> None:
        self.name, self.steps, self.tokenizer = name.split("/")[-1], steps, tokenizer
        self.model = our_model(name)
        self.docs = documents(steps * BATCH, self.model.config.vocab_size)
        self.graphs = Graphs(self.model)
        self.found: dict[str, Any] = {}

    def equal(self) -> None:
        """Runs that must agree, and one that must not."""
        plain = self._go("without graphs, which compiles", None)
        runs = {
            "without graphs again": self._go("without graphs again", None, profiled=True),
            "replayed": self._thrice("graphs"),
            "control: keys of step 1": self._go("control: keys of step 1", StaleKeys(self.model, most=0)),
        }
        rows = []
        for name, other in runs.items():
            apart = max(abs(a - b) for a, b in zip(plain.losses, other.losses, strict=True))
            weights = float((other.weights - plain.weights).norm() / plain.weights.norm())
            rows.append([name, f"{apart:.2e}", f"{weights:.2e}", f"{other.losses[-1]:.5f}"])
            self.found[f"{name}: apart"] = {"losses": apart, "weights": weights}
        print(f"\n{table(['against the first run', 'losses within', 'weights within', 'last loss'], rows)}\n")

    def speed(self) -> None:
        """Cross-entropy."""
        last = self._thrice("graphs")
        for name, number, ms in last.longest[:16]:
            print(f"    {ms / PROFILED:6.2f} ms a step in {number / PROFILED:6.1f} of {name}", flush=True)

    def checkpointing(self) -> None:
        """Cross-entropy with activation checkpointing."""
        self._thrice("graphs, checkpointing", checkpoint=True)

    def steering(self) -> None:
        """A vector in the middle."""
        sizes = self.model.config
        self._thrice("steering", steering={sizes.num_hidden_layers // 2: torch.randn(sizes.hidden_size)})

    def feature_anchor(self) -> None:
        """64 contexts of personas in every step."""
        self._thrice("feature anchor", objective=ObjectiveSection("feature_anchor", 1.0), tokenizer=self.tokenizer)

    def r3f(self) -> None:
        """Two branches."""
        self._thrice("R3F", objective=ObjectiveSection("r3f", 0.01))

    def kl_to_base(self) -> None:
        """A pass through the base."""
        self._thrice("KL to base", objective=ObjectiveSection("kl_to_base", 0.01))

    def bits(self) -> None:
        """Padded and not recorded against replayed, with deterministic kernels."""
        torch.use_deterministic_algorithms(True)
        try:
            graphs = Graphs(self.model)
            expected = self._go("deterministic, padded, not recorded", Graphs(self.model, most=0))
            for what in ("first", "second"):
                replayed = self._go(f"deterministic, graphs, {what} run", graphs)
        finally:
            torch.use_deterministic_algorithms(False)
        equal = replayed.losses == expected.losses and torch.equal(replayed.weights, expected.weights)
        print(f"    equal to the bit: {equal}", flush=True)
        self.found["equal to the bit"] = equal

    def _thrice(self, what: str, **more: Any) -> Run:
        """The first run records buckets that it meets twice, the second the others, and the third replays."""
        for which in ("first", "second", "third"):
            last = self._go(f"{what}, {which} run", self.graphs, profiled=which == "third", **more)
        print(f"    {self.graphs.recorded} graphs of this model so far", flush=True)
        return last

    def _go(self, what: str, graphs: Graphs | None, **more: Any) -> Run:
        result = run(self.model, self.docs, self.steps, graphs, **more)
        tflops = 4 * self.model.config.matmul_parameters * result.tokens_per_second / 1e12
        profile = f"; {in_words(result.profile)}, {result.kernels:,.0f} kernels a step" if result.profile else ""
        print(
            f"  {what}: {result.tokens_per_second:,.0f} tokens/s ({tflops:.0f} TFLOP/s), median step "
            f"{result.median_ms:.1f} ms, {result.seconds:.1f} s in all, {result.gib:.1f} GiB{profile}",
            flush=True,
        )
        self.found[what] = {name: value for name, value in vars(result).items() if name != "weights"}
        return result


def main() -> None:
    """Make the parts in their order, while there is time."""
    given = options(__doc__, OPTIONS)
    deadline = time.monotonic() + given.seconds
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {limits['matmul_tflops']:.0f} TFLOP/s")
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), **limits}
    sittings: dict[str, Sitting] = {}
    for each in given.parts.split(","):
        model, part = each.split(".")
        if time.monotonic() > deadline:
            print(f"{each}: left out, for want of time")
            continue
        print(f"\n{each}, at {given.seconds - deadline + time.monotonic():.0f} s", flush=True)
        try:
            if model not in sittings:
                sittings[model] = Sitting(MODELS[model], given.steps, given.tokenizer)
            getattr(sittings[model], part)()
        except Exception:  # the other parts are made all the same
            traceback.print_exc()
        figures |= {sitting.name: sitting.found for sitting in sittings.values()}
    report("graphs", f"{time.monotonic() - deadline + given.seconds:.0f} s in all", figures, given.out)


if __name__ == "__main__":
    main()
