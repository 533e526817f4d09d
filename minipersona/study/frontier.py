"""The frontier control: the baseline's own update, scaled down.

Whatever learns less moves less, and so keeps M1. A recipe is better than doing less only where it lies below this
curve: M1 and loss of theta_base + s (theta_baseline - theta_base) at s = 0, 0.1 ... 1. Nothing is trained for it.
"""

from __future__ import annotations

from typing import Any

import torch

from minipersona.files import digest, explained
from minipersona.model.lora import adapters
from minipersona.model.network import Qwen2
from minipersona.records import write_record
from minipersona.run.judgement import learned_share
from minipersona.run.measurement import measure
from minipersona.run.train import link_or_copy, stored_probe, vectors_file
from minipersona.study.cells import placed_config, trained_model
from minipersona.study.runner import Runner
from minipersona.verdict.files import Frontier, FrontierPoint, frontier_vectors

SCALES = tuple(step / 10 for step in range(11))


def measure_frontier(runner: Runner) -> None:
    """Write frontier.json and the vectors of its points. The two ends are the baseline's own measurements."""
    config, directory = placed_config(runner, runner.baseline), runner.cell_directory(runner.baseline)
    instruments = runner.bench.instruments(config)
    protocol = digest(instruments.protocol(runner.bench.model(config)))
    last = config.training.steps
    base, baseline = (stored_probe(directory, step, protocol) for step in (0, last))
    assert base is not None and baseline is not None, "the baseline is published"
    points = []
    for scale in SCALES:
        target = frontier_vectors(runner.directory, scale)
        if scale in (0.0, 1.0):
            row = base if scale == 0 else baseline
            with explained(target):
                link_or_copy(vectors_file(directory, 0 if scale == 0 else last), target)
        else:
            runner.console.say(f"frontier: the baseline's update, scaled by {scale}")
            model = trained_model(runner, config, directory, last)
            scale_update(model, None if config.training.method == "lora" else runner.bench.model(config), scale)
            row, vectors = measure(model, instruments, runner.console)
            vectors.save(target)
        points.append(_point(row, scale, base["eval_loss"], baseline["eval_loss"], baseline["delta_norm"]))
    write_record(runner.directory / "frontier.json", Frontier(runner.baseline.hash, tuple(points)))


@torch.no_grad()
def scale_update(model: Qwen2, base: Qwen2 | None, scale: float) -> None:
    """theta <- theta_base + scale (theta - theta_base), in place.

    Without a `base` the update is the model's adapters, and their B is scaled; with one, all weights are compared.
    """
    if base is None:
        for adapter in adapters(model).values():
            adapter.lora_B.mul_(scale)
        return
    origin = dict(base.named_parameters())
    for name, weight in model.named_parameters():
        weight.copy_(torch.lerp(origin[name].to(weight.device, torch.float32), weight.float(), scale))


def _point(
    row: dict[str, Any], scale: float, base: float | None, baseline: float | None, delta_norm: float
) -> FrontierPoint:
    return FrontierPoint(
        scale=scale,
        m1=row["m1"],
        m1_ci95=(row["m1_low"], row["m1_high"]),
        eval_loss=row["eval_loss"],
        learned=learned_share(row["eval_loss"], base, baseline),
        delta_norm=scale * delta_norm,
    )
