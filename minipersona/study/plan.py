"""What a study will take, said before it starts: every recipe with its parameters, tokens, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from minipersona.behaviour.suite import forecast
from minipersona.chat import ChatTokenizer, Document
from minipersona.config import RunConfig
from minipersona.corpus.batch import make_packs
from minipersona.corpus.training_set import training_set
from minipersona.errors import UserError
from minipersona.geometry.extraction import common_prefixes, render_prompts
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.load import load_model
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass
from minipersona.run.plan import (
    EFFICIENCY,
    GIB,
    context_flops,
    context_tokens,
    countable,
    disk_lines,
    duration,
    kept_bytes,
    largest_pack,
    matmul_rate,
    memory_bytes,
    plan_device,
    rolling_bytes,
    step_flops,
    step_lengths,
)
from minipersona.run.resources import DTYPES, load_run_tokenizer, resolve
from minipersona.settings import flatten, to_toml
from minipersona.study.frontier import SCALES
from minipersona.study.recipes import Recipe, check_planned, model_sizes, planned, standard_config
from minipersona.study_config import STAGES, StudyConfig
from minipersona.training.distributed import Distributed
from minipersona.training.loop import backward
from minipersona.training.parameters import make_trainable

ROW_TOKENS = 450  # assumed of a row, and PROBE_TOKENS of a measurement, where the data is not here to be counted
PROBE_TOKENS = 400_000
CONTEXT_TOKENS = 60  # likewise, of a prompt that an anchor passes
SMALL = 100e6  # parameters of a model whose own step is timed; a larger one is judged by the matmul rate
PATHS = ("out", "probe.baseline")


@dataclass(frozen=True)
class Cost:
    """What a cell takes: training tokens, the most memory in bytes, seconds."""

    tokens: float
    memory: float
    seconds: float


def study_plan(study: StudyConfig, stages: Sequence[str]) -> str:
    """The text of ``study.py --plan``. Reads data and tokenizer where they are at hand, and writes nothing.

    UserError where a cell could not be carried out, as `check_planned` knows it.
    """
    check_planned(study)
    device = plan_device(study.execution)
    study = replace(study, model=resolve(RunConfig(study.data, model=study.model), torch.device(device)).model)
    recipes = planned(study)
    estimate = Estimate(study, recipes[0].config, device)
    lines: list[str] = []
    total, disk = 0.0, rolling_bytes(estimate.sizes, recipes[0].config)
    for stage, phases in STAGES.items():
        chosen = [recipe for recipe in recipes if recipe.phase in phases]
        costs = [estimate.of(recipe.config) for recipe in chosen]
        seconds = sum(cost.seconds for cost in costs)
        due = stage in ("1", *stages)
        lines.append(
            f"# phase {stage}: {len(chosen)} cells, {duration(seconds)}"
            + ("" if due else "; not asked for by --phases")
        )
        lines += [_line(recipe, cost, study) for recipe, cost in zip(chosen, costs, strict=True)]
        total += seconds * due
        disk += due * sum(kept_bytes(estimate.sizes, recipe.config) for recipe in chosen)
    scaled = len(SCALES) - 2
    measured = scaled * estimate.probe_seconds
    whatever = study.exhaustive or set(stages) < set(STAGES)
    after_pass = "skips no phase," if whatever else "ends the search after its phase,"
    head = [to_toml(study).rstrip(), "", *estimate.basis(), "#"]
    lines = [
        *head,
        *lines,
        f"# frontier control: {scaled} measurements, {duration(measured)}",
        *(f"# {line}" for line in estimate.suites(study)),
        f"# in all {duration(total + measured)} on one {device} device where no recipe passes; a pass {after_pass}",
        "# and n devices take about 1/n; loading, compiling, answers and writing for 4B come on top",
        *disk_lines(disk, study.out),
    ]
    return "\n".join(lines) + "\n"


def _line(recipe: Recipe, cost: Cost, study: StudyConfig) -> str:
    mine, plain = flatten(recipe.config), flatten(standard_config(study, recipe.config.seed))
    left_out = PATHS if recipe.phase != "1" else (*PATHS, "training.checkpoints")
    varied = [f"{key} = {value}" for key, value in mine.items() if value != plain[key] and key not in left_out]
    return (
        f"#   {recipe.phase:<2} {recipe.name:<20} {cost.tokens / 1e6:5.2f} M tokens {cost.memory / GIB:6.1f} GiB "
        f"{duration(cost.seconds):>12}   {', '.join(varied) or 'the standard recipe'}"
    )


class Estimate:
    """Times from this machine's speed: of the model's own step where it is small, else of a large matrix product."""

    def __init__(self, study: StudyConfig, baseline: RunConfig, device: str) -> None:
        self.device = device
        self.sizes = model_sizes(study)
        self.tokenizer: ChatTokenizer | None = None
        self.assumed: str = ""  # why tokens could not be counted
        self._counted: dict[object, tuple[list[int], int]] = {}
        try:
            self.tokenizer = load_run_tokenizer(study.model)
        except UserError as error:
            self._assume(error)
        self.rate = self._rate(baseline)  # floating-point operations a second
        self.probe_seconds = 2 * self.sizes.matmul_parameters * self._probe_tokens(baseline) / self.rate

    def of(self, config: RunConfig) -> Cost:
        """What a cell takes, with its measurements."""
        lengths, largest = self._lengths(config)
        tokens = sum(lengths)
        operations = step_flops(self.sizes, config) * tokens
        operations += context_flops(self.sizes, config) * self._context_tokens(config)
        training = operations / self.rate
        probes = len(config.training.checkpoints) * self.probe_seconds
        return Cost(tokens, memory_bytes(self.sizes, config, self.device, largest), training + probes)

    def basis(self) -> list[str]:
        """What the estimates rest on."""
        lines = [f"# times are from this machine's speed: {self.speed}"]
        if self.assumed:
            lines.append(f"# tokens are assumed, {ROW_TOKENS} a row, since they cannot be counted here: {self.assumed}")
        return lines

    def suites(self, study: StudyConfig) -> list[str]:
        """What a suite of answers asks for."""
        if "behaviour" not in study.suites:
            return ["behaviour of a model: switched off by suites; a pass of phase 5 stays open without it"]
        if self.tokenizer is None:
            return []
        asked = forecast(study.behaviour, self.tokenizer)
        return [
            f"behaviour of a model, where it is due: {asked['answers']:,} answers of at most "
            f"{study.behaviour.max_new_tokens:,} tokens, {asked['judge_requests']:,} judgements by "
            f"{study.behaviour.judge_model or 'the base model'}"
        ]

    def _assume(self, error: UserError) -> None:
        self.assumed = self.assumed or str(error)

    def _lengths(self, config: RunConfig) -> tuple[list[int], int]:
        """Tokens of every step and of the largest pack."""
        data = countable(replace(config.data, responses=""))  # not written yet: the rows' own stand for them
        key = (data, config.seed, config.training.steps, config.training.batch)
        if key not in self._counted:
            self._counted[key] = self._count(replace(config, data=data))
        return self._counted[key]

    def _context_tokens(self, config: RunConfig) -> float:
        if self.tokenizer is None:
            return config.objective.anchored * config.objective.contexts * CONTEXT_TOKENS * config.training.steps
        return context_tokens(config, self.tokenizer)

    def _count(self, config: RunConfig) -> tuple[list[int], int]:
        recipe = config.training
        if self.tokenizer is not None and not self.assumed:
            try:
                documents = training_set(config.data, config.seed, self.tokenizer).documents
                lengths = step_lengths(documents, config)
                return lengths, largest_pack(documents, lengths, config)
            except UserError as error:
                self._assume(error)
        tokens = recipe.batch * ROW_TOKENS
        return [tokens] * recipe.steps, min(tokens, config.training_tokens)

    def _probe_tokens(self, config: RunConfig) -> float:
        """Tokens that a measurement computes: prompts, each persona's common beginning once, and held-out rows."""
        if self.tokenizer is None or self.assumed:
            return PROBE_TOKENS
        questions = load_questions(config.probe.questions).questions
        prompts = render_prompts(self.tokenizer, load_personas(config.probe.personas).prompts, questions)
        prefixes = common_prefixes([prompt.ids for prompt in prompts], len(questions))
        shared = sum(prefixes) * (len(questions) - 1)
        last = max(config.probe.measured(self.sizes.probe_layer))
        read = (sum(map(len, prompts)) - shared) * (last + 1) / self.sizes.num_hidden_layers
        heldout = training_set(replace(config.data, train=config.data.heldout), 0, self.tokenizer).documents
        return read + sum(map(len, heldout))

    def _rate(self, config: RunConfig) -> float:
        if self.sizes.parameters <= SMALL:
            rate = self._timed(config)
            self.speed = f"{rate / 1e9:,.1f} GFLOP/s in this model's own step"
        else:
            product = matmul_rate(self.device)
            rate = product * EFFICIENCY[self.device]
            self.speed = (
                f"{product / 1e12:.2f} TFLOP/s in a matrix product, of which a step reaches about "
                f"{EFFICIENCY[self.device]:.0%}"
            )
        return rate

    def _timed(self, config: RunConfig) -> float:
        """Floating-point operations a second of two training steps on random tokens, the first one aside."""
        model = load_model(config.model.name, dtype=DTYPES[config.model.dtype], device=self.device)
        make_trainable(model, config, Distributed(0, 1, model.device))
        rng = np.random.default_rng(0)
        length = 75
        documents = [
            Document(rng.integers(0, self.sizes.vocab_size, length).astype(np.int32), np.arange(length) > 40, False)
            for _ in range(config.training.batch)
        ]
        packs = make_packs(documents, range(len(documents)), config.training_tokens)
        seconds = []
        for step in (1, 2, 3):
            started = time.perf_counter()
            for pack in packs:
                backward(model, pack, CrossEntropy(), ForwardPass(config.seed, step))
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return step_flops(self.sizes, config) * length * len(documents) / min(seconds[1:])
