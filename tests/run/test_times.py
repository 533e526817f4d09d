"""The model of a run's time: what it counts, and the figures of docs/log.md that it must give within 30%."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minipersona.config import DataSection, ExecutionSection, LoraConfig, ObjectiveSection, RunConfig, TrainingSection
from minipersona.model.config import ModelConfig
from minipersona.model.load import architecture_offline
from minipersona.run.times import Counts, run_times
from minipersona.run.work import REACHED, Machine, forward, step, training

H200 = Machine("cuda", products=REACHED["cuda"] * 740e12, bandwidth=4.1e12, launch=60e-6)
SIZES = {
    "7b": architecture_offline("random:Qwen/Qwen2.5-7B-Instruct"),
    "135m": architecture_offline("random:HuggingFaceTB/SmolLM2-135M-Instruct"),
}
STEPS = [4000, 5000, 6000, 7000, 8000] * 4  # of the benchmarks' documents, 16 a step
PLAIN = RunConfig(DataSection("-", "-"), training=TrainingSection(steps=len(STEPS), checkpoints=()))


def config(kind: str = "cross_entropy", **execution: object) -> RunConfig:
    objective = ObjectiveSection(kind, 0.01) if kind != "cross_entropy" else ObjectiveSection()  # type: ignore[arg-type]
    return replace(PLAIN, objective=objective, execution=ExecutionSection(**execution))  # type: ignore[arg-type]


def tokens_per_second(sizes: ModelConfig, config: RunConfig, machine: Machine = H200) -> float:
    return sum(STEPS) / run_times(sizes, config, Counts(STEPS, 0, 80_000, 300_000), machine).training


@pytest.mark.parametrize(
    ("size", "asked", "measured"),
    [
        ("7b", config(checkpoint_activations=False), 17_821),
        ("7b", config(checkpoint_activations=True), 13_240),
        ("135m", config(checkpoint_activations=False), 212_764),
        ("135m", config(checkpoint_activations=False), 219_399),
        ("135m", config(checkpoint_activations=True), 161_742),
        ("135m", config("kl_to_base", checkpoint_activations=False), 162_227),
        ("135m", config(checkpoint_activations=False, graphs="off"), 29_766),
        ("135m", config(checkpoint_activations=True, graphs="off"), 23_035),
    ],
)
def test_the_measured_figures_of_the_log(size: str, asked: RunConfig, measured: float) -> None:
    assert tokens_per_second(SIZES[size], asked) == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(("tokens", "milliseconds"), [(2048, 13.8), (3072, 17.1), (3584, 18.6), (4608, 22.0)])
def test_the_measured_steps_of_a_real_run(tokens: int, milliseconds: float) -> None:
    work = step(SIZES["135m"], config(checkpoint_activations=False), tokens, 0)
    assert 1e3 * H200.seconds(work, graphs=True) == pytest.approx(milliseconds, rel=0.2)


def test_the_minute_of_a_whole_run() -> None:
    """375 steps of 16 real rows in one process, with the base and six checkpoints measured: 20 s for the base, 40 s."""
    whole = TrainingSection(steps=375, checkpoints=(10, 25, 50, 100, 200, 375))
    asked = replace(PLAIN, training=whole, execution=ExecutionSection(checkpoint_activations=False))
    steps = [2100 + 6 * number for number in range(375)]  # 1.2 M tokens, as the run had
    times = run_times(SIZES["135m"], asked, Counts(steps, 0, 52_000, 210_000), H200)
    assert times.total == pytest.approx(60, rel=0.3)


@pytest.mark.parametrize(
    ("size", "graphs", "slower", "expected"), [("135m", "off", 10, 10), ("135m", "auto", 10, 1), ("7b", "auto", 1.5, 1)]
)
def test_the_host_counts_where_kernels_are_short_and_not_recorded(
    size: str, graphs: str, slower: float, expected: float
) -> None:
    asked = config(checkpoint_activations=False, graphs=graphs)
    host = replace(H200, launch=slower * H200.launch)
    before, after = (tokens_per_second(SIZES[size], asked, machine) for machine in (H200, host))
    assert before / after == pytest.approx(expected, rel=0.05)


def test_operations_are_those_of_each_product() -> None:
    sizes = SIZES["135m"]
    weights, head = sizes.matmul_parameters, sizes.hidden_size * sizes.vocab_size
    full = replace(PLAIN.training, method="full")
    kept, recomputed = (
        replace(PLAIN, training=full, execution=ExecutionSection(checkpoint_activations=again))
        for again in (False, True)
    )
    assert forward(sizes, 10, 10).products == 2 * 10 * weights
    assert training(sizes, kept, 10, 10).products == 6 * 10 * weights
    last = sizes.num_hidden_layers * sizes.hidden_size * sizes.intermediate_size  # down_proj is not recomputed
    assert training(sizes, recomputed, 10, 10).products == 10 * (6 * weights + 2 * (weights - head - last))
    small = replace(PLAIN, lora=LoraConfig(rank=1, alpha=2.0), execution=kept.execution)
    assert training(sizes, small, 10, 10).products == pytest.approx(4 * 10 * weights, rel=0.01)


def test_what_an_objective_adds() -> None:
    plain, kl, r3f = (step(SIZES["135m"], config(kind), 5000, 0) for kind in ("cross_entropy", "kl_to_base", "r3f"))
    assert r3f.products == pytest.approx(2 * plain.products)
    assert plain.products < kl.products < r3f.products


def test_a_run_is_the_sum_of_its_parts() -> None:
    once = run_times(SIZES["135m"], PLAIN, Counts(STEPS, 0, 80_000, 300_000), H200)
    measured = replace(PLAIN, training=replace(PLAIN.training, checkpoints=(10, 20)))
    twice = run_times(SIZES["135m"], measured, Counts(STEPS, 0, 80_000, 300_000), H200)
    assert (once.measurements, twice.measurements) == (1, 3)
    assert twice.total - twice.writing == pytest.approx(once.total + 2 * once.measurement)
    assert twice.device < twice.each + twice.measurement
