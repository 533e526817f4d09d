"""The directions of `training/null_space.py` for a run: those of the base's inputs at prompts of training personas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from minipersona.chat import ChatTokenizer
from minipersona.config import RunConfig
from minipersona.console import Console
from minipersona.files import write_atomically
from minipersona.geometry.extraction import check_positions, render_prompts
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.adapter_config import AdapterConfig
from minipersona.model.lora import adapted_layers
from minipersona.model.network import Qwen2
from minipersona.model.tensor_file import open_safetensors
from minipersona.run.anchors import anchor_sets, check_unmeasured
from minipersona.run.directory import NULL_SPACE
from minipersona.training.distributed import Distributed
from minipersona.training.null_space import input_directions

CONTEXTS = 1_024  # of the prompts of all personas and questions: many times k, and their inputs fit into memory
DRAW = 102  # of these, beside the seed


def check_null_space(config: RunConfig) -> None:
    """UserError where a context is also measured."""
    if config.lora.null_space:
        measured = load_personas(config.probe.personas), load_questions(config.probe.questions)
        check_unmeasured(anchor_sets(config.objective), measured)


def run_null_space(
    config: RunConfig, directory: Path, distributed: Distributed, model: Qwen2, tokenizer: ChatTokenizer,
    console: Console,
) -> dict[str, Tensor]:  # fmt: skip
    """What `train` takes as `null_space`: U (I, k) by the input's name; empty where `lora.null_space` is 0.

    The first rank makes them once and keeps them in the run's directory, so that every rank and a run that continues
    have the same numbers. Call it on every rank, while nothing is attached to the model.
    """
    if not config.lora.null_space:
        return {}
    file = directory / NULL_SPACE
    if distributed.first and not file.is_file():
        personas, questions = anchor_sets(config.objective)
        prompts = [p.ids for p in render_prompts(tokenizer, personas.prompts, questions.questions)]
        check_positions(model, prompts, 0)
        order = np.random.Generator(np.random.PCG64([config.seed, DRAW])).permutation(len(prompts))
        chosen = [prompts[i] for i in order[:CONTEXTS]]
        console.say(f"null space: {config.lora.null_space} directions of every input at {len(chosen):,} prompts")
        layers = adapted_layers(model, AdapterConfig.of(config.lora, model.config.num_hidden_layers))
        tokens = config.execution.measuring_tokens
        directions = input_directions(model, chosen, list(layers), config.lora.null_space, tokens)
        stored = {name: u.cpu().contiguous() for name, u in directions.items()}
        with write_atomically(file, sum(u.nbytes for u in stored.values())) as temporary:
            save_file(stored, temporary)
    distributed.barrier()
    with open_safetensors(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}
