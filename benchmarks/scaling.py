"""More than one GPU, and what one needs for full parameters or for equal bits:

    python -m benchmarks.scaling [--cases lora,cells,ranks,full,shards,full:64,shards:64,deterministic]
                                 [--batch 16] [--gpus 2] [--full-model random:Qwen/Qwen2.5-3B-Instruct] [--out FILE]

    lora           the registered recipe's step on one GPU
    cells          a process of its own on each GPU, as a study's cells have with --gpus all
    ranks          one run on all GPUs, data parallel
    full           full-parameter training on one GPU
    shards         the same on all GPUs, sharded (FSDP2)
    deterministic  the recipe's step with execution.deterministic, twice; the adapters have to be equal to the bit

Beside the table stand the losses' differences, and how fast the GPUs of a case sum a GiB.
A number behind a case's name is its rows a step, instead of --batch: `shards:64`. Every case is made of processes of
its own. What the first one of a kind compiles, later ones find in the cache.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common import GIB, documents, options, our_model, report, seconds, table
from benchmarks.sft import BATCH, ours
from minipersona.run.train import make_deterministic
from minipersona.training.distributed import Distributed, join_process_group, leave_process_group

FULL = "random:Qwen/Qwen2.5-3B-Instruct"  # its full-parameter training fits one GPU of 80 GB
KINDS = ("lora", "cells", "ranks", "full", "shards", "deterministic")
CASES = "lora,cells,ranks,full,shards,full:64,shards:64,deterministic"
OPTIONS = {"steps": 24, "batch": BATCH, "gpus": 2, "cases": CASES, "full_model": FULL, "worker": "", "result": ""}
BASE = {"cells": "lora", "ranks": "lora", "deterministic": "lora", "shards": "full"}  # what a case is compared with


def worker(given: Any) -> None:
    """One process of a case: measure, and leave what was found."""
    deterministic = given.worker == "deterministic"
    make_deterministic(deterministic)
    distributed = join_process_group("cuda")
    full = given.worker in ("full", "shards")
    model = our_model(given.full_model if full else given.model)
    docs = documents(given.steps * given.batch, model.config.vocab_size)
    method: Literal["lora", "full"] = "full" if full else "lora"
    found = ours(model, docs, given.steps, True, method=method, batch=given.batch, distributed=distributed)
    if distributed.size > 1:
        found["link_gb_per_s"] = link(distributed)
    if distributed.first:
        Path(given.result).write_text(json.dumps(found))
    leave_process_group()


def link(distributed: Distributed) -> float:
    """GB/s that a GPU sends, and receives, while a GiB is summed over all of them.

    Counted as a ring sums: 2 (n-1)/n of the tensor.
    """
    summed = torch.zeros(int(GIB) // 4, device=distributed.device)
    distributed.sum(summed)
    took = min(seconds(distributed.sum, summed) for _ in range(5))
    return 2 * (distributed.size - 1) / distributed.size * GIB / took / 1e9


def start(case: str, rows: int, given: Any, scratch: Path) -> list[dict[str, Any]]:
    """Run the processes of a case side by side, with so many rows a step; what each independent one found."""
    together = case in ("ranks", "shards")
    count = {"lora": 1, "full": 1, "deterministic": min(2, given.gpus)}.get(case, given.gpus)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes, results = [], []
    for index in range(count):
        result = scratch / f"{case}-{rows}-{index}.json"
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(index),
                  "LOCAL_RANK": str(index)}  # fmt: skip
        alone = {"CUDA_VISIBLE_DEVICES": str(index)} if count > 1 else {}
        passed = {"worker": case, "result": result, "steps": given.steps, "batch": rows, "model": given.model,
                  "full-model": given.full_model}  # fmt: skip
        options_of_it = [f"--{name}={value}" for name, value in passed.items()]
        command = [sys.executable, "-m", "benchmarks.scaling", *options_of_it]
        processes.append(subprocess.Popen(command, env={**os.environ, **(shared if together else alone)}))
        results.append(result)
    failed = [process for process in processes if process.wait()]
    return [] if failed else [json.loads(result.read_text()) for result in results if result.is_file()]


def main() -> None:
    """Measure the cases one after another and print the table."""
    given = options(__doc__, OPTIONS)
    if given.worker:
        worker(given)
        return
    for named in given.cases.split(","):
        if re.fullmatch(f"({'|'.join(KINDS)})(:[1-9][0-9]*)?", named) is None:
            raise SystemExit(f"error: --cases: {named!r} is none; take {', '.join(KINDS)}, or such as shards:64")
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for named in given.cases.split(","):
            case, _, number = named.partition(":")
            rows = int(number or given.batch)
            ones = start(case, rows, given, Path(scratch))
            if case == "deterministic" and given.gpus == 1:
                ones += start(case, rows, given, Path(scratch))
            found[case, rows] = ones
            print(named, [{k: v for k, v in one.items() if k not in ("steps", "losses")} for one in ones], flush=True)
    lines, notes = [], []
    for (case, rows), ones in found.items():
        if not ones:
            lines.append([case, str(rows), "failed", "", "", ""])
            continue
        if case == "deterministic":
            notes.append(f"deterministic adapters equal to the bit: {len({one['adapters'] for one in ones}) == 1}")
            ones = ones[:1]
        speed = sum(one["tokens_per_second"] for one in ones)
        base = found.get((BASE.get(case, ""), rows), [])
        times = f"{speed / base[0]['tokens_per_second']:.2f}" if base else ""
        if base and case != "cells":
            off = max(abs(a / b - 1) for a, b in zip(ones[0]["losses"], base[0]["losses"], strict=True))
            notes.append(f"{case}, {rows} rows: losses within {off:.1e} of {BASE[case]}'s")
        if "link_gb_per_s" in ones[0]:
            notes.append(f"{case}, {rows} rows: {ones[0]['link_gb_per_s']:.0f} GB/s between the GPUs")
        memory = max(one["gib"] for one in ones)
        lines.append([case, str(rows), f"{speed:,.0f}", times, f"{memory:.1f}", f"{ones[0]['first_step']:.0f}"])
    columns = ["case", "rows a step", "tokens/s", "times one GPU", "GiB a GPU", "first step, s"]
    cases = {f"{case}:{rows}": ones for (case, rows), ones in found.items()}
    report("scaling", table(columns, lines) + "\n\n" + "\n".join(notes), {"cases": cases}, given.out)


if __name__ == "__main__":
    main()
