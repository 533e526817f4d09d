"""What a run will need, printed before it starts: the resolved config, its tokens, memory, time and disk space."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minipersona.chat import ChatTokenizer, Document
from minipersona.config import DataSection, ExecutionSection, RunConfig
from minipersona.corpus.batch import RowOrder
from minipersona.corpus.sources import read_source, source_identity, tokenize
from minipersona.corpus.training_set import TrainingSet, training_set
from minipersona.errors import Unreachable
from minipersona.geometry.extraction import common_prefixes, render_prompts
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.config import ModelConfig
from minipersona.model.load import architecture_offline
from minipersona.objective.head import CHUNK
from minipersona.run.anchors import anchor_sets, check_anchors, make_contexts
from minipersona.run.resources import compiles, load_run_tokenizer, resolve
from minipersona.run.times import Counts, Times, checkpoint_bytes, contexts_taken, run_times, state_bytes
from minipersona.run.work import Machine, learned_parameters, measure_machine
from minipersona.settings import to_toml

GIB = 2**30
ROW_TOKENS = 450  # assumed of a row that is not here to be counted
CONTEXT_TOKENS = 60  # likewise, of a prompt that an anchor passes
PROMPT_TOKENS = 18  # likewise, of a prompt that is measured beyond what the prompts of its persona share
HELDOUT_ROWS = 500  # assumed of held-out rows that are not here to be counted
LOCAL = ("tiny:", "jsonl:", "parquet:", "pydoc:")  # sources that are read without a download
PERSONAS = 12  # of the shipped and of the registered sets
PROMPTS = PERSONAS * 240  # likewise
TULU_GB = 1.4  # allenai/tulu-3-sft-mixture as it is stored, in parquet


def plan(config: RunConfig) -> str:
    """The text of ``train.py --plan``. Loads no weights, writes nothing.

    Reads the data and the model's config.json and tokenizer where they are here or can be fetched; else tokens are
    assumed, and said to be.
    """
    device = plan_device(config.execution)
    config = resolve(config, torch.device(device))
    sizes = architecture_offline(config.model.name, config.model.revision or None)
    try:
        check_anchors(config, sizes)
        tokenizer = load_run_tokenizer(config.model)
        training = training_set(countable(config.data), config.seed, tokenizer)
        counts, largest = count(config, training.documents, tokenizer), largest_pack(training.documents, config)
        rows, about = _data_lines(training, config), ""
    except Unreachable as error:
        counts, largest = assumed_counts(config)
        rows, about = [f"# data       {assumption(str(error))}"], "about "
    machine = measure_machine(config, sizes, device)
    tokens, steps = sum(counts.steps), len(counts.steps)
    lines = [
        to_toml(config).rstrip(),
        "",
        f"# model      {sizes.parameters / 1e6:,.1f} million parameters, {sizes.num_hidden_layers} blocks; "
        f"measured at layer {config.probe.measured(sizes.probe_layer)[0]}",
        *rows,
        f"# training   {steps:,} steps of {config.training.batch} rows, {about}{tokens:,} tokens, "
        f"{tokens / steps:,.0f} a step",
        *_anchor_lines(counts.contexts, config),
        f"# memory     {memory_bytes(sizes, config, device, largest) / GIB:.1f} GiB on {device}, for packs of "
        f"{largest:,} tokens",
        *time_lines(run_times(sizes, config, counts, machine), config, machine),
        *disk_lines(kept_bytes(sizes, config) + rolling_bytes(sizes, config), config.out),
    ]
    return "\n".join(lines) + "\n"


def _data_lines(training: TrainingSet, config: RunConfig) -> list[str]:
    documents = training.documents
    counts = (
        f"# data       {len(documents):,} rows, {sum(map(len, documents)):,} tokens, "
        f"{sum(int(d.supervised.sum()) for d in documents):,} supervised; "
        f"{sum(d.truncated for d in documents):,} truncated, "
        f"{sum(not d.supervised.any() for d in documents):,} teach nothing"
    )
    epochs = config.training.steps * config.training.batch / len(documents)
    return [
        f"{counts}; {epochs:.2f} epochs",
        *(f"# mixture    {line}" for line in to_fetch(config.data) or training.report()[1:]),
    ]


def _anchor_lines(tokens: float, config: RunConfig) -> list[str]:
    if not config.objective.anchored:
        return []
    personas, questions = anchor_sets(config.objective)
    most = config.objective.anchor_responses
    answered = f", with the base's responses of up to {most} tokens" if most else ""
    return [
        f"# anchor     {config.objective.contexts} prompts a step, of {len(personas.prompts)} personas x "
        f"{len(questions.questions)} questions{answered}; {'up to ' if most else ''}"
        f"{tokens / config.training.steps:,.0f} tokens a step besides"
    ]


def time_lines(times: Times, config: RunConfig, machine: Machine) -> list[str]:
    """What a plan says of time."""
    parts = {
        "starting": times.starting,
        f"loading {config.model.name}": times.loading,
        "compiling": times.compiling,
        "recording CUDA graphs": times.recording,
        "tokenising": times.reading,
        "applying the base to the anchor's contexts": times.anchoring,
        f"{config.training.steps:,} steps of {times.step:.3f} s": times.training,
        f"{times.measurements} measurements": times.measuring,
        "writing": times.writing,
    }
    said = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts.items() if seconds >= 0.5)
    return [f"# time       {duration(times.total)} on {machine}", f"#            {said}"]


# ---------------------------------------------------------------- shared with the plan of a study


def plan_device(section: ExecutionSection) -> str:
    """The type of the device that a plan is for, cuda or cpu."""
    if section.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return section.device.split(":")[0]


def countable(data: DataSection) -> DataSection:
    """The section as far as a plan reads it: without a broad source that would have to be downloaded."""
    return replace(data, broad="", broad_kind="", ratio="") if to_fetch(data) else data


def step_lengths(documents: Sequence[Document], config: RunConfig) -> list[int]:
    """Tokens of every step."""
    order = RowOrder(len(documents), config.training.batch, config.seed)
    return [sum(len(documents[row]) for row in order.step(step)) for step in range(1, config.training.steps + 1)]


def largest_pack(documents: Sequence[Document], config: RunConfig) -> int:
    """Tokens of the largest pack."""
    return min(max(step_lengths(documents, config)), max(config.training_tokens, max(len(d) for d in documents)))


def count(config: RunConfig, documents: Sequence[Document], tokenizer: ChatTokenizer) -> Counts:
    """The tokens of a run on these rows."""
    return Counts(
        step_lengths(documents, config), context_tokens(config, tokenizer), *measured_tokens(config, tokenizer)
    )


def assumed_counts(config: RunConfig) -> tuple[Counts, int]:
    """The same, and the tokens of the largest pack, where the rows are not here to be counted.

    UserError where a source is malformed, or a local file is missing.
    """
    for source in filter(None, (config.data.train, config.data.heldout, config.data.broad)):
        source_identity(source)
    tokens, section = config.training.batch * ROW_TOKENS, config.objective
    contexts = section.anchored * section.contexts * (CONTEXT_TOKENS + section.anchor_responses)
    counts = Counts(
        [tokens] * config.training.steps,
        contexts * config.training.steps,
        PROMPTS * PROMPT_TOKENS,
        2 * HELDOUT_ROWS * ROW_TOKENS,
    )
    return counts, min(tokens, config.training_tokens)


def measured_tokens(config: RunConfig, tokenizer: ChatTokenizer) -> tuple[int, int]:
    """Tokens that a measurement computes: of the prompts, what a persona's share once, and of the held-out rows, as
    they are and under the personas. Where they cannot be counted here, as many as are assumed.
    """
    try:
        questions = load_questions(config.probe.questions).questions
        prompts = prompt_tokens(tokenizer, load_personas(config.probe.personas).prompts, questions)
        heldout = _heldout(config.data, tokenizer)
    except Unreachable:
        return PROMPTS * PROMPT_TOKENS, 2 * HELDOUT_ROWS * ROW_TOKENS
    return prompts, 2 * sum(map(len, heldout))


def _heldout(data: DataSection, tokenizer: ChatTokenizer) -> list[Document]:
    """The held-out rows as they are measured: nothing is mixed into them, whatever the rest of the section says."""
    if not data.heldout:
        return []
    return tokenize(read_source(data.heldout), tokenizer, supervise=data.supervise, max_tokens=data.max_tokens)


def prompt_tokens(tokenizer: ChatTokenizer, personas: Mapping[str, str], questions: Sequence[str]) -> int:
    """Tokens that an extraction computes: of the prompts, what a persona's share once."""
    prompts = render_prompts(tokenizer, personas, questions)
    shared = sum(common_prefixes([prompt.ids for prompt in prompts], len(questions))) * (len(questions) - 1)
    return sum(map(len, prompts)) - shared


def assumption(why: str) -> str:
    """What to say of such lengths."""
    return f"tokens are an estimate, {ROW_TOKENS} a row, since the rows cannot be counted here: {why}"


def to_fetch(data: DataSection) -> list[str]:
    """What to say of a broad source that the run would download. A plan does not: it counts the rows as they are."""
    if not data.broad or data.broad.startswith(LOCAL):
        return []
    said = f"{data.ratio} with {data.broad}, fetched when the run starts; counted here are the rows that it replaces"
    whole = f"{data.broad} is the whole mixture: a download of {TULU_GB} GB"
    return [said, whole] if re.fullmatch(r"tulu(\[\d*:(:\d*)?\])?", data.broad) else [said]


def context_tokens(config: RunConfig, tokenizer: ChatTokenizer) -> int:
    """Tokens of the contexts of all steps, responses as long as they may be; 0 where the objective is not anchored."""
    if not config.objective.anchored:
        return 0
    contexts = make_contexts(config, tokenizer)
    taken = (c for step in range(1, config.training.steps + 1) for group in contexts.groups(step) for c in group)
    return sum(len(contexts.ids[c]) + config.objective.anchor_responses for c in taken)


def memory_bytes(sizes: ModelConfig, config: RunConfig, device: str, tokens: int) -> float:
    """Bytes at the peak of a step: weights, masters with gradient and moments, activations or one chunk of logits."""
    compute = 2 if config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and device == "cuda") else 4
    learned = learned_parameters(sizes, config)
    # Where all weights learn, there is a base beside them only for the objective that applies it in every step.
    frozen = config.training.method == "lora" or config.objective.kind == "kl_to_base"
    weights = frozen * sizes.parameters * compute + 16 * learned
    if config.objective.anchors_predictions:  # the base's state at every token
        held = config.objective.anchor_responses or CONTEXT_TOKENS
        weights += compute * sizes.hidden_size * contexts_taken(config) * held
    d, f, q, k = sizes.hidden_size, sizes.intermediate_size, sizes.query_width, sizes.key_width
    # A token's tensors that one block keeps for its backward pass, and, recomputed, needs within it. Both factors are
    # fitted to the peaks of the 7B in docs/log.md, which they meet within a tenth.
    block = compute * (5 * d + 3 * q + 2 * k + 4.3 * f)
    stream = compute * d * sizes.num_hidden_layers
    recomputed = config.execution.checkpoint_activations
    kept = stream + 2.1 * block if recomputed else 0.93 * block * sizes.num_hidden_layers
    fused = 1.0 if compiles(config, torch.device(device)) else 1.6  # unfused passes keep intermediates besides
    logits = min(tokens, CHUNK) * sizes.vocab_size * (4 + 2 * compute)
    heads = 2 if config.objective.kind in ("kl_to_base", "r3f") or config.objective.anchors_predictions else 1
    # A chunk's logits are gone before the backward pass through the blocks begins.
    return weights + max(tokens * kept * fused, tokens * stream + logits) + (heads - 1) * logits


def kept_bytes(sizes: ModelConfig, config: RunConfig) -> int:
    """Bytes of what a finished run keeps: each named checkpoint, its vectors and the base's."""
    vectors = vectors_bytes(sizes, config)
    return len(config.training.checkpoints) * (checkpoint_bytes(sizes, config) + vectors) + vectors


def vectors_bytes(sizes: ModelConfig, config: RunConfig) -> int:
    """Bytes of the vectors of one measurement."""
    return 4 * PROMPTS * sizes.hidden_size * max(1, len(config.probe.layers))


def rolling_bytes(sizes: ModelConfig, config: RunConfig) -> int:
    """Bytes that a run needs besides while it goes on: the rolling checkpoint, and the one that replaces it."""
    return 2 * state_bytes(sizes, config)


def disk_lines(needed: int, out: str) -> list[str]:
    """What a plan says of the disk: a line, and a warning where the free space is not enough."""
    free = shutil.disk_usage(_existing(Path(out))).free
    line = f"# disk       {needed / GIB:.2f} GiB of checkpoints and vectors; {free / GIB:.1f} GiB are free"
    warning = "# WARNING    that does not fit on the disk; free some space, choose another --out or fewer checkpoints"
    return [line, warning] if needed > free else [line]


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
