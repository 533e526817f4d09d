"""The frontier control: the baseline's own update, scaled down.

Whatever learns less moves less, and so keeps M1. A recipe is better than doing less only where it lies below this
curve: M1 and loss of theta_base + s (theta_baseline - theta_base) at s = 0, 0.1 ... 1. Nothing is trained for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

import torch

from minipersona.files import explained
from minipersona.model.lora import adapters
from minipersona.model.network import Qwen2
from minipersona.records import write_record
from minipersona.run.directory import link_or_copy, losses_file, stored_measurement, vectors_file
from minipersona.run.judgement import learned_share
from minipersona.run.measurement import measure
from minipersona.run.result import Metrics
from minipersona.study.cell import Cell, Study
from minipersona.study.worker import Worker
from minipersona.verdict.files import Frontier, FrontierPoint, frontier_losses, frontier_vectors

SCALES = tuple(step / 10 for step in range(11))


def measure_frontier(study: Study, worker: Worker) -> None:
    """Write frontier.json, its points' vectors and losses. The two ends are the baseline's own measurements."""
    config, directory = study.placed_config(study.baseline), study.cell_directory(study.baseline)
    instruments = worker.resources.instruments(config)
    protocol = instruments.protocol(worker.resources.base(config))
    last = config.training.steps
    base, baseline = (stored_measurement(directory, step, protocol) for step in (0, last))
    assert base is not None and baseline is not None, "the baseline is published"
    points = []
    row: Metrics
    for scale in SCALES:
        kept_vectors, kept_losses = frontier_vectors(study.directory, scale), frontier_losses(study.directory, scale)
        if scale in (0.0, 1.0):
            row, step = (base, 0) if scale == 0 else (baseline, last)
            for file, target in ((vectors_file, kept_vectors), (losses_file, kept_losses)):
                if (source := file(directory, step)).is_file():  # there are no losses without held-out rows
                    with explained(target):
                        link_or_copy(source, target)
        else:
            worker.console.say(f"frontier: the baseline's update, scaled by {scale}")
            model = scaled_baseline(study, study.baseline, scale, worker)
            row, vectors, losses = measure(model, instruments, worker.console)
            vectors.save(kept_vectors)
            if losses is not None:
                losses.save(kept_losses)
        points.append(_point(row, scale, base.eval_loss, baseline.eval_loss, baseline.delta_norm))
    write_record(study.directory / "frontier.json", Frontier(study.baseline.hash, tuple(points)))


def scaled_baseline(study: Study, baseline: Cell, scale: float | Sequence[float], worker: Worker) -> Qwen2:
    """The model at theta_base + scale (theta_baseline - theta_base), for a baseline with any seed.

    scale  as in `scale_update`
    """
    config = study.placed_config(baseline)
    model = worker.trained_model(config, study.cell_directory(baseline), config.training.steps)
    scale_update(model, None if config.training.method == "lora" else worker.resources.base(config), scale)
    return model


@torch.no_grad()
def scale_update(model: Qwen2, base: Qwen2 | None, scale: float | Sequence[float]) -> None:
    """theta <- theta_base + scale (theta - theta_base), in place.

    Without a `base` the update is the model's adapters, and their B is scaled; with one, all weights are compared.

    scale  one number, or one a block; the weights outside of the blocks (embedding, last norm, head) then have the
           mean, so that equal numbers are one scale, and zeros are the base
    """
    if isinstance(scale, Sequence):
        assert len(scale) == model.config.num_hidden_layers
        by_block, outside = scale, fmean(scale)
    else:
        by_block, outside = [scale] * model.config.num_hidden_layers, scale

    def scale_of(name: str) -> float:
        block = re.match(r"model\.layers\.(\d+)\.", name)
        return outside if block is None else by_block[int(block[1])]

    if base is None:
        for name, adapter in adapters(model).items():
            adapter.lora_B.mul_(scale_of(name))
        return
    origin = dict(base.named_parameters())
    for name, weight in model.named_parameters():
        weight.copy_(torch.lerp(origin[name].to(weight.device, torch.float32), weight.float(), scale_of(name)))


def _point(row: Metrics, scale: float, base: float | None, baseline: float | None, delta_norm: float) -> FrontierPoint:
    return FrontierPoint(
        scale=scale,
        m1=row.m1,
        m1_ci95=(row.m1_low, row.m1_high),
        eval_loss=row.eval_loss,
        learned=learned_share(row.eval_loss, base, baseline),
        delta_norm=scale * delta_norm,
    )
