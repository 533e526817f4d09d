"""What `--plan` says a run will take beside what it takes:

    python -m benchmarks.plan [--cases 135m-lora,7b-lora-checkpointing,...] [--steps 30] [--seconds 340] [--out FILE]

A case is a process that does what `train.py` does, with an empty compile cache: it trains --steps steps on rows of
median 300 tokens, and measures the base and the last step with the shipped personas and questions and 200 held-out
rows. What it takes is compared part by part with the times that `run/times.py` has for the same config. Weights are
random. After --seconds no further case begins, and what was left out is said.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import options, report, table
from benchmarks.sft import SIZES
from minipersona.chat import load_tokenizer
from minipersona.config import DataSection, ExecutionSection, ModelSection, RunConfig, TrainingSection
from minipersona.console import Console
from minipersona.corpus.training_set import training_set
from minipersona.files import read_jsonl
from minipersona.run import plan as planning
from minipersona.run import resources, train
from minipersona.run.times import run_times
from minipersona.run.work import measure_machine
from minipersona.training import graphs, loop
from minipersona.training.distributed import process_group
from minipersona.training.interruption import Stop, handle_signals

CASES = (
    "7b-lora-checkpointing", "135m-lora", "0.5b-lora", "7b-lora", "135m-full", "0.5b-full", "135m-lora-checkpointing",
    "0.5b-lora-checkpointing", "135m-lora-no_graphs", "0.5b-full-checkpointing", "135m-full-checkpointing",
)  # fmt: skip
HELDOUT = 200
PARTS = (
    "starting",
    "loading",
    "compiling",
    "recording",
    "reading",
    "step",
    "training",
    "measuring",
    "writing",
    "total",
)
OPTIONS = {"cases": ",".join(CASES), "steps": 30, "seconds": 340, "worker": "", "directory": "", "began": 0.0}
# What is timed, as it is called where it is used: the part of the plan that it belongs to.
TIMED: tuple[tuple[object, str, str], ...] = (
    (resources.Resources, "rows", "reading"),
    (resources.Resources, "instruments", "reading"),
    (resources.Resources, "base", "loading"),
    (train, "measure", "measuring"),
    (train, "distance_from_base", "measuring"),
    (train, "save_checkpoint", "writing"),
    (loop, "save_state", "writing"),
    (graphs.Graphs, "_record", "recording"),
    (train, "train", "train"),
)


def configuration(case: str, steps: int, directory: Path) -> RunConfig:
    """The run of a case, such as 7b-lora-checkpointing."""
    size, method, *more = case.split("-")
    if size != "7b" and "no_graphs" not in more:
        steps *= 4  # until most steps replay graphs
    return RunConfig(
        data=DataSection(f"jsonl:{directory / 'train.jsonl'}", f"jsonl:{directory / 'heldout.jsonl'}"),
        out=str(directory / case),
        model=ModelSection(SIZES[size]),
        training=TrainingSection(method=method, steps=steps, checkpoints=(steps,)),  # type: ignore[arg-type]
        execution=ExecutionSection(
            checkpoint_activations="checkpointing" in more, graphs="off" if "no_graphs" in more else "auto"
        ),
    )


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Chats of random words: log-normal lengths of median 300 tokens of the tiny tokenizer, 70% the response's."""
    tokenizer, rng = load_tokenizer("tiny"), np.random.default_rng(seed)
    words = ["the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as"]
    each = len(tokenizer.encode_prompt([{"role": "user", "content": " ".join(words * 10)}]).ids) / (10 * len(words))

    def text(tokens: float) -> str:
        return " ".join(rng.choice(words, max(1, int(tokens / each))))

    with path.open("w") as file:
        for length in np.clip(np.exp(rng.normal(np.log(300), 0.8, rows)), 32, 1900):
            messages = [
                {"role": "user", "content": text(0.3 * length)},
                {"role": "assistant", "content": text(0.7 * length)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


# ---------------------------------------------------------------- the process of a case


@contextmanager
def clocks() -> Iterator[dict[str, list[float]]]:
    """part -> the seconds of every call of what is `TIMED`, for the time of the context; nested ones count once."""
    found: dict[str, list[float]] = defaultdict(list)
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in TIMED]
    open_parts: list[str] = []

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def call(*arguments: Any, **settings: Any) -> Any:
            if part in open_parts:
                return work(*arguments, **settings)
            open_parts.append(part)
            inner = {name: sum(seconds) for name, seconds in found.items()}
            started = time.monotonic()
            try:
                return work(*arguments, **settings)
            finally:
                open_parts.pop()
                took = time.monotonic() - started
                took -= sum(sum(seconds) - inner.get(name, 0.0) for name, seconds in found.items())
                found[part].append(took)

        return call

    try:
        for owner, name, part in TIMED:
            setattr(owner, name, timed(part, getattr(owner, name)))
        yield found
    finally:
        for owner, name, before in kept:
            setattr(owner, name, before)


def measured(config: RunConfig, began: float) -> dict[str, Any]:
    """Seconds of a run by part. `began` is when its process was started, by time.time()."""
    stop = Stop()
    with handle_signals(stop), process_group(config.execution.device, 30.0, stop) as distributed, clocks() as found:
        if distributed.device.type == "cuda":
            torch.zeros(1, device=distributed.device)
        starting = time.time() - began
        train.run(config, distributed, Console())
    total = time.time() - began
    rows = read_jsonl(Path(config.out) / "metrics.jsonl")
    steps = [row["tokens"] / row["tokens_per_second"] for row in rows]
    steady = statistics.median(steps[len(steps) // 2 :])
    tokens = [row["tokens"] for row in rows]
    mean = steady * statistics.mean(tokens) / statistics.median(tokens[len(steps) // 2 :])
    recording = sum(found["recording"])
    base, last = found["measuring"][0], sum(found["measuring"][1:])
    return {
        "starting": starting,
        "loading": sum(found["loading"]),
        "compiling": sum(found["train"]) - mean * len(steps) + max(0.0, base - last),
        "recording": recording,
        "reading": sum(found["reading"]),
        "training": mean * len(steps),
        "measuring": 2 * last,
        "writing": sum(found["writing"]),
        "total": total,
        "step": mean,
        "first measurement": base,
        "steps": steps,
        "tokens": tokens,
        "gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0,
    }


def planned(config: RunConfig) -> dict[str, Any]:
    """The same parts as `--plan` has them."""
    device = planning.plan_device(config.execution)
    config = resources.resolve(config, torch.device(device))
    sizes = planning.architecture_offline(config.model.name, None)
    tokenizer = resources.load_run_tokenizer(config.model)
    documents = training_set(config.data, config.seed, tokenizer).documents
    counts, machine = planning.count(config, documents, tokenizer), measure_machine(config, sizes, device)
    times = run_times(sizes, config, counts, machine)
    parts = {name: value for name, value in vars(times).items() if name not in ("measurements", "measurement")}
    speeds = {"products": machine.products, "bandwidth": machine.bandwidth, "launch": machine.launch}
    counted = {"prompts": counts.prompts, "heldout": counts.heldout}
    return {**parts, "measuring": times.measuring, "total": times.total, **speeds, **counted}


# ---------------------------------------------------------------- all cases


def start(case: str, given: Any, directory: Path) -> dict[str, Any]:
    """What the process of a case finds."""
    command = [sys.executable, "-m", "benchmarks.plan", "--worker", case, "--directory", str(directory),
               "--steps", str(given.steps), "--began", str(time.time())]  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=240)
    return json.loads(done.stdout.splitlines()[-1])


def compared(both: dict[str, Any]) -> list[str]:
    """Planned and measured seconds of each part."""
    return [f"{both['planned'][part]:.3g} / {both['measured'][part]:.3g}" for part in PARTS]


def main() -> None:
    """Run the cases, or be the process of one."""
    given = options(__doc__, OPTIONS)
    if given.worker:
        config = configuration(given.worker, given.steps, Path(given.directory))
        took = measured(config, given.began)
        print(json.dumps({"measured": took, "planned": planned(config)}))
        return
    deadline, found = time.monotonic() + given.seconds, {}
    with tempfile.TemporaryDirectory() as scratch:
        write_rows(Path(scratch) / "train.jsonl", 4 * given.steps * 16, 1)
        write_rows(Path(scratch) / "heldout.jsonl", HELDOUT, 2)
        for case in given.cases.split(","):
            if time.monotonic() > deadline:
                print(f"{case}: left out, for want of time", flush=True)
                continue
            try:
                found[case] = start(case, given, Path(scratch))
            except Exception:  # the others are run all the same
                traceback.print_exc()
                continue
            print(f"{case}, planned / measured: {dict(zip(PARTS, compared(found[case]), strict=True))}", flush=True)
    rows = [
        [case, *compared(both), f"{both['planned']['total'] / both['measured']['total'] - 1:+.0%}"]
        for case, both in found.items()
    ]
    report("plan", table(["seconds planned / measured", *PARTS, "off by"], rows), found, given.out)


if __name__ == "__main__":
    main()
