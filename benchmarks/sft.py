"""The registered recipe's step beside its peers (`peers.py`), on one list of documents:

    python -m benchmarks.sft [--sizes 7b,0.5b,135m] [--peers strongest,naive] [--steps 40] [--seconds 540] [--out FILE]

Without --sizes it is --model. Weights are random. Tokens are useful ones: padding counts for nothing. TFLOP/s counts 4
operations a matmul weight and token, the least that LoRA needs, whatever is recomputed. The limit is every matrix
product at the measured ceiling, those that are recomputed included.

A peer first computes the loss of each of a few documents, which must be ours within bf16's rounding. The strongest
computes them again with documents that see each other, which must differ. What is not installed, fails or would begin
after --seconds is left out, and said.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.common import (
    GIB,
    MODEL,
    Profile,
    Sitting,
    documents,
    free,
    in_words,
    machine,
    options,
    our_model,
    report,
    table,
)  # fmt: skip
from benchmarks.peers import NAMES, document_losses, drive, missing, naive, strongest
from minipersona.chat import ChatTokenizer, Document
from minipersona.config import DataSection, ExecutionSection, ObjectiveSection, RunConfig, TrainingSection
from minipersona.console import Console
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.run.anchors import run_contexts
from minipersona.run.resources import uses_graphs
from minipersona.training.distributed import Distributed
from minipersona.training.graphs import Graphs
from minipersona.training.heldout import document_losses as our_document_losses
from minipersona.training.loop import Hooks, Trainer, train

SIZES = {
    "7b": MODEL,
    "0.5b": "random:Qwen/Qwen2.5-0.5B-Instruct",
    "135m": "random:HuggingFaceTB/SmolLM2-135M-Instruct",
}
BATCH = 16
PROFILED = 4
COMPARED = 6  # documents
OURS = "minipersona"
APART = 0.03  # nats that the mean loss of a document may differ by; bf16 makes 0.002 of the 135M, 0.017 of the 7B


def ours(
    model: Qwen2,
    docs: Sequence[Document],
    steps: int,
    checkpoint: bool,
    objective: ObjectiveSection | None = None,
    steering: dict[int, torch.Tensor] | None = None,
    *,
    method: Literal["lora", "full"] = "lora",
    batch: int = BATCH,
    distributed: Distributed | None = None,
    tokenizer: ChatTokenizer | None = None,
    graphs: Graphs | None = None,
) -> dict[str, Any]:
    """The loop itself, `steps` times. The last four are profiled; timed is what else the second half has, one at least.

    tokenizer  of the prompts of an anchored objective

    The first dozen are slower: packs of new sizes need products that CUDA has not loaded yet.
    """
    if steps < PROFILED + 2:
        raise SystemExit(f"error: {steps} steps are too few; take {PROFILED + 2} or more: the first compiles")
    config = RunConfig(
        data=DataSection("-", "-"),
        objective=objective or ObjectiveSection(),
        training=TrainingSection(method=method, steps=steps, batch=batch, checkpoints=()),
        execution=ExecutionSection(checkpoint_activations=checkpoint),
    )
    rows: list[dict[str, Any]] = []
    measured = Profile()

    def logged(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["step"] == steps - PROFILED:
            measured.start()

    distributed = distributed or Distributed(0, 1, model.device)
    with tempfile.TemporaryDirectory() as scratch:
        contexts = run_contexts(config, Path(scratch), distributed, model, tokenizer, Console()) if tokenizer else None
        free()
        started = time.perf_counter()
        trainer = Trainer(
            model, docs, config, Path(scratch), distributed, compiled=True, steering=steering, contexts=contexts,
            graphs=graphs,
        )  # fmt: skip
        train(trainer, Hooks(logged=logged))
    shares = measured.stop()
    trained = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad and method == "lora":
            trained.update(parameter.detach().cpu().numpy().tobytes())
    remove_lora(model)
    times = [row["tokens"] / row["tokens_per_second"] for row in rows]
    late = slice(min(steps // 2, steps - PROFILED - 1), steps - PROFILED)
    return {
        "tokens_per_second": sum(row["tokens"] for row in rows[late]) / sum(times[late]),
        "median_step": statistics.median(times[late]),
        "first_step": times[0],
        "seconds_in_all": time.perf_counter() - started,
        "gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "losses": [row["loss"] for row in rows],
        "steps": [[row["tokens"], took] for row, took in zip(rows, times, strict=True)],
        "adapters": trained.hexdigest(),
        "profile": shares,
    }


def ours_steady(model: Qwen2, docs: Sequence[Document], steps: int, checkpoint: bool) -> dict[str, Any]:
    """`ours`; where it trains by CUDA graphs, the third run of the same steps, which only replays them."""
    if not uses_graphs(RunConfig(data=DataSection("-", "-")), model.device, model.config):
        return ours(model, docs, steps, checkpoint)
    graphs = Graphs(model)
    for _ in range(3):
        found = ours(model, docs, steps, checkpoint, graphs=graphs)
    return {**found, "gib": found["reserved_gib"], "graphs": graphs.recorded}  # the graphs' memory is reserved


def theirs(
    peer: str, sitting: Sitting, docs: Sequence[Document], expected: Tensor, steps: int, checkpoint: bool,
    deadline: float,
) -> dict[str, Any]:  # fmt: skip
    """A peer's figures. `apart` is how far the losses of the first documents are from those `expected`, (COMPARED,)."""
    from torch._dynamo.utils import counters

    model, sizes = sitting.theirs(), sitting.model.config
    if peer == "strongest":
        execution = ExecutionSection(checkpoint_activations=checkpoint)
        pack_tokens = RunConfig(data=DataSection("-", "-"), execution=execution).training_tokens
        entered = strongest(model, checkpoint, pack_tokens)
    else:
        entered = naive(model, checkpoint, micro=2 if sizes.matmul_parameters > 2e9 and not checkpoint else 4)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    beside = torch.cuda.memory_allocated() - weights
    counters.clear()
    with entered as driven:
        differs = {}
        for name, passes in {"apart": driven.passes, "control": driven.control}.items():
            if passes:
                found = document_losses(driven, docs[:COMPARED], passes)
                differs[name] = float((found - expected).abs().max())
        free()
        figures = drive(driven, docs, range(1, steps + 1), steps // 2 if peer == "strongest" else 1, deadline)
        gib = (torch.cuda.max_memory_allocated() - beside) / GIB
    return {**figures, **differs, "gib": gib, "compiled": counters["stats"]["unique_graphs"],
            "graph_breaks": sum(counters["graph_break"].values())}  # fmt: skip


def doubt(figures: dict[str, Any]) -> str:
    """What to say of a peer that does not compute what ours does, or of a comparison that would not show it."""
    if figures.get("apart", 0.0) > APART:
        return " (other losses than ours)"
    return " (losses that do not show it)" if figures.get("control", 1.0) < APART else ""


OPTIONS = {"steps": 40, "naive_steps": 3, "peers": ",".join(NAMES), "no_peers": False, "seconds": 540}


def measure(sitting: Sitting, deadline: float) -> dict[str, dict[str, Any]]:
    """All figures of one model by name and checkpointing, as far as there is time and nothing fails."""
    given, model = sitting.given, sitting.model
    docs = documents(given.steps * BATCH, model.config.vocab_size)
    found: dict[str, dict[str, Any]] = {}

    def make(name: str, checkpoint: bool, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        name += ", checkpointing" if checkpoint else ""
        if time.monotonic() > deadline:
            print(f"{name}: left out, for want of time", flush=True)
            return
        try:
            found[name] = figures = work(*arguments)
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            free()
            return
        said = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        said |= {"first losses": figures["losses"][:3]}
        print(f"{name}: {said}", in_words(figures.get("profile", {})), flush=True)

    for checkpoint in (False, True):
        make(OURS, checkpoint, ours_steady, model, docs, given.steps, checkpoint)
        if (name := OURS + ", checkpointing" * checkpoint) in found:
            found[name]["gib"] -= sitting.beside
    with torch.compiler.set_stance("force_eager"):
        nats, tokens = our_document_losses(model, docs[:COMPARED], BATCH * 2048)
    peers = [] if given.no_peers else given.peers.split(",")
    if not all(map(missing, peers)):  # a peer that is there has the device for itself
        sitting.theirs()
        model.fused = False
        model.refresh_fused_weights()
        model.to("cpu")
    for peer in peers:
        if lacking := missing(peer):
            print(f"{NAMES[peer]}: left out, since {', '.join(lacking)} is not installed", flush=True)
            continue
        steps = given.steps if peer == "strongest" else given.naive_steps + 1
        for checkpoint in (False, True):
            make(NAMES[peer], checkpoint, theirs, peer, sitting, docs, nats / tokens, steps, checkpoint, deadline)
    return found


def run(sitting: Sitting, deadline: float | None = None) -> None:
    """Measure ours, then the peers, and print the table."""
    about, sizes = sitting.about, sitting.model.config
    found = measure(sitting, deadline or time.monotonic() + sitting.given.seconds)
    ceiling = about["matmul_tflops"]

    def cell(tokens_per_second: float) -> list[str]:
        tflops = 4 * sizes.matmul_parameters * tokens_per_second / 1e12
        return [f"{tokens_per_second:,.0f}", f"{tflops:.0f}", f"{tflops / ceiling:.0%}"]

    rows = [[name + doubt(row), *cell(row["tokens_per_second"]), f"{row['gib']:.1f}"] for name, row in found.items()]
    head = sizes.hidden_size * sizes.vocab_size
    for name, operations in (
        ("limit", 4 * sizes.matmul_parameters),
        ("limit, checkpointing", 6 * (sizes.matmul_parameters - head) + 4 * head),
    ):
        rows.append([name, *cell(ceiling * 1e12 / operations), ""])
    profiles = "\n".join(f"{n}: {in_words(r['profile'])}" for n, r in found.items() if "profile" in r)
    text = f"{about['device']}, {about['versions']}\nceilings: {ceiling:.0f} TFLOP/s, "
    text += f"{about['copy_tb_per_s']:.2f} TB/s\n\n"
    text += table(["", "tokens/s", "TFLOP/s", "of the ceiling", "GiB"], rows) + f"\n\n{profiles}"
    report(f"sft, {sitting.given.model}", text, {**about, "rows": found}, sitting.given.out)


def main() -> None:
    """The table of each size, one model after another."""
    given = options(__doc__, {**OPTIONS, "sizes": ""})
    deadline, about = time.monotonic() + given.seconds, machine()
    for name in given.sizes.split(",") if given.sizes else [given.model]:
        torch.compiler.reset()
        given.model = SIZES.get(name, name)
        run(Sitting(given, our_model(given.model), about), deadline)
        free()


if __name__ == "__main__":
    main()
