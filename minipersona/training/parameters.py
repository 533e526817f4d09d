"""Which parameters learn and in what precision (adapters, or everything), saving them, their distance from the base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from minipersona.config import RunConfig
from minipersona.model.adapter_files import save_adapter
from minipersona.model.load import stream_weights
from minipersona.model.lora import adapter_norm, apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.save import save_model, send_weights
from minipersona.training.distributed import Distributed
from minipersona.training.sharding import is_sharded, own_rows, reshard, shard, share_of


def make_trainable(model: Qwen2, config: RunConfig, distributed: Distributed) -> dict[str, nn.Parameter]:
    """Prepare the model for the method of training and return the parameters that learn, by name.

    lora  fresh fp32 adapters over frozen weights of any precision
    full  every weight becomes an fp32 master that is cast at use (a tied head is the embedding's parameter); several
          ranks shard them
    """
    if config.training.method == "lora":
        apply_lora(model, config.lora, config.seed)
    else:
        master = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
        model.to(master).requires_grad_(True)
        model.refresh_fused_weights()  # frees what an earlier pass has laid out: another copy of the base's weights
        if is_sharded(config, distributed):
            shard(model, distributed, stop=max(config.probe.measured(model.config.probe_layer)))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    model: Qwen2,
    config: RunConfig,
    path: Path,
    tokenizer_files: list[Path],
    stop_tokens: tuple[int, ...],
    distributed: Distributed,
) -> None:
    """Save the model of a named step: a PEFT adapter, or a whole model in Hugging Face's layout.

    Only the first rank calls it, or every rank if weights are sharded; the first one writes.
    """
    if config.training.method == "lora":
        save_adapter(model, path)
        return
    if is_sharded(config, distributed):
        reshard(model)
    if distributed.first:
        save_model(model, path, extra_files=tokenizer_files, stop_tokens=stop_tokens)
    else:
        send_weights(model)


@torch.no_grad()
def distance_from_base(model: Qwen2, config: RunConfig, distributed: Distributed) -> float:
    """||theta - theta_base||_2: of the merged update for LoRA, over all weights for full-parameter training.

    The base weights are read again from their files, one at a time. The same ranks call it as `save_checkpoint`.
    """
    if config.training.method == "lora":
        return adapter_norm(model)
    sharded = is_sharded(config, distributed)
    if sharded:
        reshard(model)
    parameters = dict(model.named_parameters())
    squared = torch.zeros((), dtype=torch.float64, device=distributed.device)
    for name, base in stream_weights(model):
        base, trained = base.to(distributed.device, model.compute_dtype), parameters[name].detach()
        if sharded:
            base, trained = base[own_rows(len(base), distributed)], share_of(trained, distributed)
        squared += (trained.double() - base.double()).square().sum()
    if sharded:
        distributed.sum(squared)
    return float(squared.sqrt())
