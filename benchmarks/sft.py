"""The registered recipe's step beside its peers, on the same documents:

    python -m benchmarks.sft [--steps 40] [--peer-steps 3] [--out FILE]

Tokens are useful ones: padding counts for nothing. TFLOP/s counts 4 operations a matmul weight and token, the least
that LoRA needs, whatever is recomputed.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common import GIB, Profile, Sitting, documents, free, in_words, report, seconds, sit, table
from minipersona.chat import ChatTokenizer, Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, ObjectiveSection, RunConfig, TrainingSection
from minipersona.console import Console
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.run.anchors import run_contexts
from minipersona.training.distributed import Distributed
from minipersona.training.loop import Hooks, train

BATCH = 16
PROFILED = 4
LIGER = " + Liger"


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
        train(
            model, docs, config, Path(scratch), distributed, Hooks(logged=logged), compiled=True, steering=steering,
            contexts=contexts,
        )  # fmt: skip
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


def with_liger(model: Any) -> bool:
    """Give transformers' model the Liger kernels, for good; False where they are not installed."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    except ImportError:
        return False
    apply_liger_kernel_to_qwen2(model=model)
    return True


def peer(model: Any, docs: Sequence[Document], steps: int, micro: int, checkpoint: bool) -> dict[str, Any]:
    """transformers + peft as usually driven: padded micro-batches, accumulation, torch's AdamW."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    recipe = LoraConfig()
    adapted = get_peft_model(
        model,
        PeftConfig(r=recipe.rank, lora_alpha=int(recipe.alpha), lora_dropout=recipe.dropout,
                   target_modules=list(recipe.targets)),
    )  # fmt: skip
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapted.train()
    learned = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-5)
    free()

    def step(index: int) -> None:
        rows = docs[index * BATCH : (index + 1) * BATCH]
        for start in range(0, BATCH, micro):
            part = rows[start : start + micro]
            longest = max(map(len, part))
            ids = torch.zeros(micro, longest, dtype=torch.int64)
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for row, document in enumerate(part):
                tokens = torch.from_numpy(document.ids.astype("int64"))
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
                labels[row, : len(tokens)] = torch.where(torch.from_numpy(document.supervised), tokens, -100)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = adapted(input_ids=ids.cuda(), attention_mask=mask.cuda(), labels=labels.cuda()).loss
            (loss * micro / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    times = [seconds(step, i) for i in range(1, steps + 1)]
    tokens = sum(map(len, docs[BATCH : (steps + 1) * BATCH]))
    result = {"tokens_per_second": tokens / sum(times), "gib": torch.cuda.max_memory_allocated() / GIB}
    adapted.unload()
    if checkpoint:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    return result


OPTIONS = {"steps": 40, "peer_steps": 3, "no_peers": False}


def run(sitting: Sitting) -> None:
    """Measure ours, then the peers, and print the table."""
    given, model, about = sitting.given, sitting.model, sitting.about
    docs = documents(given.steps * BATCH, model.config.vocab_size)
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in (True, False):
        name = "minipersona" + (", checkpointing" if checkpoint else "")
        found[name] = ours(model, docs, given.steps, checkpoint)
        found[name]["gib"] -= sitting.beside
        print(name, found[name]["tokens_per_second"], found[name]["gib"], in_words(found[name]["profile"]), flush=True)
    if not given.no_peers:
        theirs = sitting.theirs()
        for kind, micro, checkpoint in (("", 4, True), ("", 2, False), (LIGER, 2, True), (LIGER, 2, False)):
            if kind == LIGER and not with_liger(theirs):
                continue
            name = f"transformers + peft{kind}, padded {BATCH // micro} x {micro}"
            name += ", checkpointing" if checkpoint else ""
            found[name] = peer(theirs, docs, given.peer_steps, micro, checkpoint)
            found[name]["gib"] -= model.config.parameters * 2 / GIB  # of our weights, which lie beside theirs
            print(name, found[name], flush=True)
    rows = []
    for name, row in found.items():
        tflops = 4 * model.config.matmul_parameters * row["tokens_per_second"] / 1e12
        share = tflops / about["matmul_tflops"]
        rows.append([name, f"{row['tokens_per_second']:,.0f}", f"{tflops:.0f}", f"{share:.0%}", f"{row['gib']:.1f}"])
    columns = ["", "tokens/s", "TFLOP/s", "of the ceiling", "GiB"]
    profiles = "\n".join(f"{n}: {in_words(r['profile'])}" for n, r in found.items() if "profile" in r)
    text = f"{about['device']}, {about['versions']}\nceilings: {about['matmul_tflops']:.0f} TFLOP/s, "
    text += f"{about['copy_tb_per_s']:.2f} TB/s\n\n{table(columns, rows)}\n\n{profiles}"
    report("sft", text, {**about, "rows": found}, given.out)


if __name__ == "__main__":
    run(sit(__doc__, OPTIONS))
