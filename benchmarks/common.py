"""What the benchmarks share: the documents, the ceilings of this machine, peers, the table and the JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from minipersona.chat import Document
from minipersona.model.acceleration.compiler import compile_blocks
from minipersona.model.load import load_model
from minipersona.model.network import Qwen2

MODEL = "random:Qwen/Qwen2.5-7B-Instruct"
GIB = 2**30
T = TypeVar("T")


@dataclass
class Sitting:
    """What tables that are made in one sitting share: the machine, our model, and transformers' beside it."""

    given: argparse.Namespace
    model: Qwen2
    about: dict[str, Any]
    _theirs: Any = None

    def theirs(self) -> Any:
        """transformers' model, made when it is first asked for."""
        self._theirs = self._theirs or their_model(self.model)
        return self._theirs

    @property
    def beside(self) -> float:
        """GiB of transformers' weights, where they lie on the device: no measurement's own."""
        return 0.0 if self._theirs is None else 2 * self.model.config.parameters / GIB


def sit(description: str | None, defaults: Mapping[str, Any]) -> Sitting:
    """Read the options, load the model, measure the machine."""
    given = options(description, defaults)
    return Sitting(given, our_model(given.model), machine())


def options(description: str | None, defaults: Mapping[str, Any]) -> argparse.Namespace:
    """The options that every benchmark has, and more with the type of their defaults. Ends where there is no GPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"default {MODEL}")
    parser.add_argument("--out", help="write the figures there too, as JSON")
    for name, default in defaults.items():
        if default is False:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: the benchmarks need a CUDA device")
    return given


def our_model(name: str) -> Qwen2:
    """The model on the GPU in bf16, its blocks compiled."""
    model = load_model(name, device="cuda", dtype=torch.bfloat16)
    compile_blocks(model)
    return model


def their_model(model: Qwen2) -> Any:
    """transformers' model of the same architecture on the same device, in the same precision, with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config.to_json())
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, dtype=model.compute_dtype)
    theirs = theirs.to_empty(device=model.device)
    theirs.tie_weights()
    ours = {name: parameter for name, parameter in model.named_parameters() if "adapter" not in name}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(ours[name])
    # The rotary buffers are computed, not loaded.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config).to(model.device)
    return theirs.eval()


def documents(rows: int, vocabulary: int) -> list[Document]:
    """Random tokens with the lengths of real chats: log-normal, median 300, at most 2,048; the last 70% supervised."""
    rng = np.random.default_rng(42)
    lengths = np.clip(np.exp(rng.normal(np.log(300), 0.8, rows)).astype(int), 32, 2048)
    return [
        Document(rng.integers(0, vocabulary, n).astype(np.int32), np.arange(n) >= max(1, int(0.3 * n)), False)
        for n in lengths
    ]


def timed(work: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Wall time of `work`, the device's included, and what it returns."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work(*arguments)
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Wall time of `work`, the device's included."""
    return timed(work, *arguments)[0]


def ceilings() -> dict[str, float]:
    """TFLOP/s of an 8192^3 bf16 product of random data, and TB/s of a copy of 4 GiB, as medians."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2 * GIB, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    product, copy = [], []
    for _ in range(12):
        product.append(seconds(torch.matmul, a, b))
        copy.append(seconds(target.copy_, source))
    return {
        "matmul_tflops": 2 * 8192**3 / statistics.median(product) / 1e12,
        "copy_tb_per_s": 2 * source.numel() * 2 / statistics.median(copy) / 1e12,
    }


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    versions = {"torch": torch.__version__}
    for name in ("transformers", "peft", "liger_kernel", "torchtune"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"device": torch.cuda.get_device_name(), "versions": versions, **ceilings()}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(name: str, text: str, figures: dict[str, Any], out: str | None) -> None:
    """Print the table, and write the figures behind it."""
    print(f"\n## {name}\n\n{text}", flush=True)
    if out:
        path = Path(out)
        path.write_text(
            json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), name: figures}, indent=1)
        )


def free() -> None:
    """Give cached memory back, so that the next measurement's peak is its own."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class Profile:
    """Shares of the wall time between `start` and `stop`: products, attention, and so on, and gaps.

    After `stop`, `kernels` are how many ran, and `longest` the name, number and ms of those that took longest together.

    What runs side by side counts twice: where GPUs send each other tensors during the passes, gaps may be negative.
    """

    def start(self) -> None:
        """Begin once the device has nothing left to do."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        self._profiler = profile(activities=[ProfilerActivity.CUDA])
        self._profiler.__enter__()
        self._started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """The shares; together with the gaps they are 1."""
        torch.cuda.synchronize()
        wall = time.perf_counter() - self._started
        self._profiler.__exit__(None, None, None)
        shares = dict.fromkeys(("gemm", "attention", "elementwise", "copies", "communication"), 0.0)
        events = sorted(self._profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        self.kernels = sum(event.count for event in events if event.self_device_time_total)
        self.longest = [(event.key[:70], event.count, event.self_device_time_total / 1e3) for event in events[:30]]
        for event in events:
            shares[_kind(event.key.lower())] += event.self_device_time_total / 1e6 / wall
        return {**{kind: share for kind, share in shares.items() if share}, "gaps": 1 - sum(shares.values())}


def profile(work: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """The profile of one call."""
    measured = Profile()
    measured.start()
    work(*arguments)
    return measured.stop()


def _kind(kernel: str) -> str:
    if "nccl" in kernel:
        return "communication"
    if any(word in kernel for word in ("nvjet", "gemm", "splitk", "cutlass_80", "cublas")):
        return "gemm"
    if any(word in kernel for word in ("flash", "sdpa", "fmha")):
        return "attention"
    return "copies" if "memcpy" in kernel or "memset" in kernel else "elementwise"


def in_words(shares: dict[str, float]) -> str:
    """A profile as a line of text."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
