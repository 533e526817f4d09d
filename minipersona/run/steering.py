"""The vectors of preventative steering (Chen et al. 2025), which are added to the residual stream in training.

    h <- h + c v_l                       at one block
    h <- h + c (v_l - v_(l-1))           at every block, v_(-1) = 0: the paper's incremental form

v is raw, not of unit length. `steering.vector` says where it comes from:

    villain - assistant         the difference of two persona vectors of the model as it is before training
    collapse                    the mean over personas of trained minus base vectors of the run `probe.baseline`
    file:PATH#a - b             a difference of two persona vectors in a file that extract.py wrote
    file:PATH                   a safetensors file with one tensor `layer.L` (D,) per block, as a run's
                                steering.safetensors
    random:villain - assistant  a control: a direction drawn by the seed, as long as that difference

Differences and the collapse are of the measured personas at the measured questions or, with `steering.persona_set =
"training"`, of the training personas at the anchor questions, so that nothing measured enters training.

D = width, P = personas
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipersona.chat import ChatTokenizer
from minipersona.config import COLLAPSE, STEERING_RANDOM, RunConfig, SteeringSection, parse_difference
from minipersona.errors import UserError
from minipersona.files import digest, write_atomically
from minipersona.geometry.extraction import extract
from minipersona.geometry.measures import collapse_direction
from minipersona.geometry.prompts import PersonaSet, QuestionSet, load_personas, load_questions
from minipersona.geometry.vectors import PersonaVectors, load_vectors
from minipersona.model.config import ModelConfig
from minipersona.model.lora import remove_lora
from minipersona.model.network import Qwen2
from minipersona.model.tensor_file import open_safetensors
from minipersona.run.anchors import anchor_sets, check_unmeasured
from minipersona.run.directory import CONFIG, STEERING_VECTORS, read_config, vectors_file
from minipersona.run.resources import load_checkpoint
from minipersona.training.distributed import Distributed


def run_steering(
    config: RunConfig,
    directory: Path,
    distributed: Distributed,
    model: Qwen2,
    tokenizer: ChatTokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Tensor]:
    """What `train` takes as `steering`, for a run in `directory`; empty where steering is off.

    The first rank makes the raw vectors once and keeps them in the run's directory, so that a run which continues is
    steered by the same numbers. Call it on every rank, while nothing is attached to the model.
    """
    if not config.steering.vector:
        return {}
    file = directory / STEERING_VECTORS
    if distributed.first and not file.is_file():
        save_steering(file, raw_vectors(config, model, tokenizer, progress))
    distributed.barrier()
    return scaled(load_steering(file, steered_layers(config.steering, model.config)), config.steering)


def check_steering(config: RunConfig, directory: Path, model: Qwen2, tokenizer: ChatTokenizer) -> None:
    """UserError where anything that `run_steering` will need is missing or does not fit. Extracts nothing."""
    section = config.steering
    if not section.vector or (directory / STEERING_VECTORS).is_file():
        return
    if section.persona_set == "training":
        check_unmeasured(_persona_sets(config), _measured_sets(config))
    if section.vector == COLLAPSE and section.persona_set == "training":
        steered_layers(section, model.config)
        _collapsed_run(Path(config.probe.baseline))
    elif section.vector == COLLAPSE or section.file is not None:
        raw_vectors(config, model, tokenizer)
    else:
        steered_layers(section, model.config)
        _known_pair(config)


def scaled(raw: Mapping[int, Tensor], section: SteeringSection) -> dict[int, Tensor]:
    """Raw vectors, block -> (D,), times the coefficient, in the incremental form where every block is steered."""
    if section.all_layers:
        raw = {layer: v - raw[layer - 1] if layer else v for layer, v in raw.items()}
    return {layer: section.coefficient * vector for layer, vector in raw.items()}


def steered_layers(section: SteeringSection, sizes: ModelConfig) -> list[int]:
    """The blocks that are steered, ascending, counted from 0."""
    blocks = sizes.num_hidden_layers
    if section.all_layers:
        return list(range(blocks))
    layer = sizes.probe_layer if section.layer == -1 else section.layer
    if layer >= blocks:
        raise UserError(f"steering.layer = {layer}: this model has blocks 0 to {blocks - 1}; choose one of them")
    return [layer]


def raw_vectors(
    config: RunConfig, model: Qwen2, tokenizer: ChatTokenizer, progress: Callable[[int, int], None] | None = None
) -> dict[int, Tensor]:
    """block -> raw vector (D,) fp32, for the blocks that are steered; none of them zero or not finite.

    The model is the base; a difference of personas is extracted from it.
    UserError where a persona, a layer, a file or the baseline is missing or does not fit.
    """
    section = config.steering
    layers = steered_layers(section, model.config)
    if section.vector == COLLAPSE and section.persona_set == "training":
        vectors = _collapse_of_training(config, layers, model, tokenizer, progress)
    elif section.vector == COLLAPSE:
        vectors = _collapse(Path(config.probe.baseline), layers, model)
    elif (file := section.file) is not None:
        if names := section.vector.partition("#")[2]:
            vectors = _differences(_extracted(file, layers), layers, *parse_difference(names), str(file))
        else:
            vectors = load_steering(file, layers)
    else:
        vectors = _persona_difference(config, layers, model, tokenizer, progress)
        if section.vector.startswith(STEERING_RANDOM):
            vectors = _random(vectors, config.seed)
    for layer, vector in vectors.items():
        where = f"steering.vector = {section.vector!r} at layer {layer}"
        if vector.shape != (model.config.hidden_size,):
            raise UserError(
                f"{where} has shape {tuple(vector.shape)}, the model's stream ({model.config.hidden_size},); "
                "name one of this model"
            )
        if not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise UserError(f"{where} is zero or not finite; choose another")
    return vectors


def _persona_difference(
    config: RunConfig,
    layers: Sequence[int],
    model: Qwen2,
    tokenizer: ChatTokenizer,
    progress: Callable[[int, int], None] | None,
) -> dict[int, Tensor]:
    pair = _known_pair(config)
    vectors = extract(
        model,
        tokenizer,
        pair,
        _persona_sets(config)[1].questions,
        layers,
        config.steering.method,
        progress=progress,
    )
    plus, minus = pair
    return _differences(vectors, layers, plus, minus, _whose(config))


def _persona_sets(config: RunConfig) -> tuple[PersonaSet, QuestionSet]:
    """The personas and questions of which a vector is made."""
    return anchor_sets(config.objective) if config.steering.persona_set == "training" else _measured_sets(config)


def _measured_sets(config: RunConfig) -> tuple[PersonaSet, QuestionSet]:
    return load_personas(config.probe.personas), load_questions(config.probe.questions)


def _whose(config: RunConfig) -> str:
    return "the training personas" if config.steering.persona_set == "training" else "probe.personas"


def _known_pair(config: RunConfig) -> dict[str, str]:
    """The two personas of a difference, plus then minus, and their system prompts."""
    known = _persona_sets(config)[0].prompts
    pair = parse_difference(config.steering.difference)
    for name in pair:
        if name not in known:
            raise UserError(f"steering.vector: {name!r} is not one of {_whose(config)}: {', '.join(known)}")
    return {name: known[name] for name in pair}


def _random(vectors: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    """A random direction a block, each as long as the vector (D,) there; drawn on the CPU, the same on every device."""
    drawn = {}
    for layer, vector in vectors.items():
        generator = torch.Generator().manual_seed(int(digest(["steering", seed, layer])[:15], 16))
        direction = torch.randn(vector.shape, generator=generator)
        drawn[layer] = direction.to(vector.device) * (vector.norm() / direction.norm())
    return drawn


def _collapse(baseline: Path, layers: Sequence[int], model: Qwen2) -> dict[int, Tensor]:
    """The mean over personas of trained minus base vectors (Method A), between a run's step 0 and its last step."""
    what, trained_by = _collapsed_run(baseline)
    steps = trained_by.training.steps
    for step in (0, steps):
        if not vectors_file(baseline, step).is_file():
            raise UserError(f"{what} has no vectors of step {step}; finish that run with step {steps} a checkpoint")
    base, trained = (_extracted(vectors_file(baseline, step), layers) for step in (0, steps))
    _check_same_model(what, base.metadata.get("model"), model)
    if base.personas != trained.personas:
        raise UserError(f"{what}: steps 0 and {steps} were measured on other personas; run it again")
    return {layer: collapse_direction(base.mean(layer), trained.mean(layer)) for layer in layers}


def _collapse_of_training(
    config: RunConfig,
    layers: Sequence[int],
    model: Qwen2,
    tokenizer: ChatTokenizer,
    progress: Callable[[int, int], None] | None,
) -> dict[int, Tensor]:
    """The same of the training personas, which the baseline did not measure: extracted from the base and from it."""
    baseline = Path(config.probe.baseline)
    what, trained_by = _collapsed_run(baseline)
    _check_same_model(what, trained_by.model.name, model)
    personas, questions = _persona_sets(config)
    asked = (tokenizer, personas.prompts, questions.questions, layers)
    base = extract(model, *asked, progress=progress)
    after = load_checkpoint(model, trained_by, baseline, trained_by.training.steps)
    trained = extract(after, *asked, progress=progress)
    if after is model:
        remove_lora(model)
    return {layer: collapse_direction(base.mean(layer), trained.mean(layer)) for layer in layers}


def _collapsed_run(baseline: Path) -> tuple[str, RunConfig]:
    """What errors call the baseline, and its config. UserError where it is not a run."""
    what = f'steering.vector = "collapse": baseline {baseline}'
    if not (baseline / CONFIG).is_file():
        raise UserError(f"{what} is not a run directory; name one that train.py made in probe.baseline")
    return what, read_config(baseline)


def _check_same_model(what: str, made_by: str | None, model: Qwen2) -> None:
    name = str(model.source.get("name"))
    if made_by != name:
        raise UserError(f"{what} trained {made_by}, this run trains {name}; name a run of the same model")


def _extracted(file: Path, layers: Sequence[int]) -> PersonaVectors:
    """A file of persona vectors that holds these layers."""
    vectors = load_vectors(file)
    for layer in layers:
        if layer not in vectors.samples:
            raise UserError(
                f"{file}: has no layer {layer}, only {', '.join(map(str, vectors.layers))}; extract it too "
                "(extract.py --layer, probe.layers of a run), or steer at one of these"
            )
    return vectors


def _differences(
    vectors: PersonaVectors, layers: Sequence[int], plus: str, minus: str, where: str
) -> dict[int, Tensor]:
    for name in (plus, minus):
        if name not in vectors.personas:
            raise UserError(f"steering.vector: {name!r} is not one of {where}: {', '.join(vectors.personas)}")
    first, second = vectors.personas.index(plus), vectors.personas.index(minus)
    means = {layer: vectors.mean(layer) for layer in layers}  # (P, D)
    return {layer: mean[first] - mean[second] for layer, mean in means.items()}


# ---------------------------------------------------------------- the file of raw vectors


def save_steering(path: Path, raw: Mapping[int, Tensor]) -> None:
    """Write block -> raw vector (D,) as tensors `layer.L`, all or nothing."""
    tensors = {f"layer.{layer}": vector.float().cpu().contiguous() for layer, vector in raw.items()}
    with write_atomically(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary)


def load_steering(path: Path, layers: Sequence[int]) -> dict[int, Tensor]:
    """Read the raw vectors (D,) fp32 of these blocks."""
    with open_safetensors(path) as file:
        held = set(file.keys())
        for layer in layers:
            if f"layer.{layer}.mean" in held:
                raise UserError(f"{path}: holds persona vectors; name two of them, as file:{path}#villain - assistant")
            if f"layer.{layer}" not in held:
                raise UserError(f"{path}: has no tensor layer.{layer}, only {', '.join(sorted(held))}")
        return {layer: file.get_tensor(f"layer.{layer}").to(torch.float32) for layer in layers}
