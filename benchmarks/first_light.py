"""The registered recipe and Method A on one GPU, at the real size with random weights:

    python -m benchmarks.first_light [--steps 20] [--tokenizer DIR] [--personas F] [--questions F] [--out FILE]

Prints tokens a second, peak memory and seconds, and what differs on CUDA from the CPU's arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipersona.chat import Document, load_tokenizer
from minipersona.config import DataSection, ExecutionSection, RunConfig, TrainingSection
from minipersona.geometry.extraction import extract, render_prompts
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.load import load_model
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.training.loop import Hooks, train
from minipersona.training.world import World

MODEL = "random:Qwen/Qwen2.5-7B-Instruct"
GIB = 2**30


def documents(rows: int, vocabulary: int) -> list[Document]:
    """Random tokens with the lengths of real chats: log-normal, median 300, at most 2,048; the last 70% supervised."""
    rng = np.random.default_rng(42)
    lengths = np.clip(np.exp(rng.normal(np.log(300), 0.8, rows)).astype(int), 32, 2048)
    return [
        Document(rng.integers(0, vocabulary, n).astype(np.int32), np.arange(n) >= max(1, int(0.3 * n)), False)
        for n in lengths
    ]


def sft(model: Qwen2, steps: int, checkpoint: bool) -> dict[str, Any]:
    """The registered step, `steps` times; the median leaves out the steps that compile."""
    config = RunConfig(
        data=DataSection("-", "-"),
        training=TrainingSection(steps=steps, checkpoints=()),
        execution=ExecutionSection(checkpoint_activations=checkpoint, pack_tokens=16_384),
    )
    docs = documents(steps * config.training.batch, model.config.vocab_size)
    rows: list[dict[str, Any]] = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        world = World(0, 1, model.device)
        train(model, docs, config, Path(scratch), world, Hooks(logged=rows.append), compiled=True)
    seconds = time.perf_counter() - started
    remove_lora(model)
    late = rows[len(rows) // 2 :]
    rate = sum(r["tokens"] for r in late) / sum(r["tokens"] / r["tokens_per_second"] for r in late)
    return {
        "checkpoint_activations": checkpoint,
        "tokens_per_second": rate,
        "median_step": statistics.median(r["tokens"] / r["tokens_per_second"] for r in late),
        "tflops": 4 * model.config.matmul_parameters * rate / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "seconds_in_all": seconds,
        "first_step": rows[0]["tokens"] / rows[0]["tokens_per_second"],
        "losses": [round(r["loss"], 4) for r in rows],
        "grad_norms": [round(r["grad_norm"], 4) for r in rows],
        "step_seconds": [round(r["tokens"] / r["tokens_per_second"], 3) for r in rows],
    }


def method_a(model: Qwen2, options: argparse.Namespace) -> dict[str, Any]:
    """12 x 240 prompts at layer 20: the first time compiles, the second is the figure."""
    tokenizer = load_tokenizer(options.tokenizer)
    personas, questions = load_personas(options.personas).prompts, load_questions(options.questions).questions
    tokens = sum(len(d) for d in render_prompts(tokenizer, personas, questions))
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        extract(model, tokenizer, personas, questions, [20])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"prompts": len(personas) * len(questions), "tokens": tokens, "seconds": times}


def matmul_ceiling() -> float:
    """TFLOP/s of an 8192^3 bf16 product of random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * 8192**3 / statistics.median(times) / 1e9


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokenizer", default="tiny")
    parser.add_argument("--personas", default="shipped")
    parser.add_argument("--questions", default="shipped")
    parser.add_argument("--out")
    options = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["matmul_tflops"] = matmul_ceiling()
    started = time.perf_counter()
    model = load_model(MODEL, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    report["load_seconds"] = time.perf_counter() - started
    model.compile_blocks()
    report["sft"] = []
    for checkpoint in (False, True):
        report["sft"].append(sft(model, options.steps, checkpoint))
        print(json.dumps(report["sft"][-1]), flush=True)
    report["method_a"] = method_a(model, options)
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text)


if __name__ == "__main__":
    main()
