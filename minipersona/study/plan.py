"""What a study will take, said before it starts: every recipe with its parameters, tokens, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.suite import forecast
from minipersona.chat import ChatTokenizer, Document, load_tokenizer
from minipersona.config import RunConfig
from minipersona.corpus.batch import make_packs
from minipersona.corpus.training_set import training_set
from minipersona.errors import Unreachable
from minipersona.geometry.extraction import common_prefixes, render_prompts
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.load import architecture_offline, load_model
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.head import ForwardPass
from minipersona.run.plan import (
    EFFICIENCY,
    GIB,
    assumed_context_tokens,
    assumed_lengths,
    assumption,
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
    vectors_bytes,
)
from minipersona.run.resources import DTYPES, load_run_tokenizer, resolve
from minipersona.settings import flatten, to_toml
from minipersona.study.frontier import SCALES
from minipersona.study.recipes import Recipe, check_planned, planned, standard_config
from minipersona.study.search import much_raw_text
from minipersona.study_config import STAGES, StudyConfig
from minipersona.training.distributed import Distributed
from minipersona.training.loop import backward
from minipersona.training.parameters import make_trainable

PROBE_TOKENS = 400_000  # assumed of a measurement where the prompts and rows are not here to be counted
ANSWER_TOKENS = 300  # assumed of an answer of the suites, where it may be so long
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
    asked: list[Recipe] = []
    asked_costs: list[Cost] = []
    total, disk = 0.0, rolling_bytes(estimate.sizes, recipes[0].config)
    for stage, phases in STAGES.items():
        chosen = [recipe for recipe in recipes if recipe.phase in phases]
        if not chosen:
            continue
        costs = [estimate.of(recipe.config) for recipe in chosen]
        seconds = sum(cost.seconds for cost in costs)
        due = stage in ("1", *stages)
        lines.append(
            f"# phase {stage}: {len(chosen)} cell{'s' * (len(chosen) != 1)}, {duration(seconds)}"
            + ("" if due else "; not asked for by --phases")
        )
        lines += [_line(recipe, cost, study) for recipe, cost in zip(chosen, costs, strict=True)]
        asked += chosen * due
        asked_costs += costs * due
        total += seconds * due
        disk += due * sum(kept_bytes(estimate.sizes, recipe.config) for recipe in chosen)
    scaled = len(SCALES) - 2
    matched = len(asked) + len(study.seeds) * (len(study.training.checkpoints) - 2)  # not to the baseline's own end
    measured = (scaled + matched) * estimate.probe_seconds
    disk += matched * vectors_bytes(estimate.sizes, recipes[0].config)
    answers = estimate.answers(study, asked)
    answered = sum(seconds for _, seconds in answers)
    whatever = study.exhaustive or set(stages) < set(STAGES)
    after_pass = "skips no phase," if whatever else "ends the search after its phase,"
    head = [to_toml(study).rstrip(), "", *estimate.basis(), "#"]
    lines = [
        *head,
        *lines,
        f"# doing less: the baseline's update at {scaled} scales, and at the one with the loss of each of {matched} "
        f"recipes, {duration(measured)}",
        *_confirmation(study, asked_costs),
        *(f"# {line}" for line, _ in answers),
        f"# in all {duration(total + measured + answered)} on one {device} device, {duration(answered)} of them for "
        f"answers; a pass {after_pass}",
        "# and n devices take about 1/n; loading, compiling and writing for 4B come on top",
        *disk_lines(disk, study.out),
    ]
    return "\n".join(lines) + "\n"


def _confirmation(study: StudyConfig, costs: Sequence[Cost]) -> list[str]:
    """What comes on top where a recipe passes; the first cost is the baseline's, and the mean stands for a recipe's."""
    if not study.confirmations:
        return []
    recipe = sum(cost.seconds for cost in costs) / len(costs)
    seconds = study.confirmations * (costs[0].seconds + recipe)
    return [
        f"# confirmation of a passer: {study.confirmations} seeds of it and of the baseline, {duration(seconds)} more"
    ]


def _line(recipe: Recipe, cost: Cost, study: StudyConfig) -> str:
    mine, plain = flatten(recipe.config), flatten(standard_config(study, recipe.config.seed))
    left_out = PATHS if recipe.phase != "1" else (*PATHS, "training.checkpoints")
    varied = [f"{key} = {value}" for key, value in mine.items() if value != plain[key] and key not in left_out]
    role = f"{recipe.role}: " if recipe.role in ("reference", "control") else ""
    return (
        f"#   {recipe.phase:<2} {recipe.name:<20} {cost.tokens / 1e6:5.2f} M tokens {cost.memory / GIB:6.1f} GiB "
        f"{duration(cost.seconds):>12}   {role}{', '.join(varied) or 'the standard recipe'}"
    )


class Estimate:
    """Times from this machine's speed: of the model's own step where it is small, else of a large matrix product."""

    def __init__(self, study: StudyConfig, baseline: RunConfig, device: str) -> None:
        self.device = device
        self.sizes = architecture_offline(study.model.name, study.model.revision or None)
        self.tokenizer: ChatTokenizer | None = None
        self.assumed: str = ""  # why tokens could not be counted
        self._counted: dict[object, tuple[list[int], int]] = {}
        try:
            self.tokenizer = load_run_tokenizer(study.model)
        except Unreachable as error:
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
            lines.append(f"# {assumption(self.assumed)}")
        return lines

    def answers(self, study: StudyConfig, recipes: Sequence[Recipe]) -> list[tuple[str, float]]:
        """What the suites ask for if these recipes are run and one passes: a line a suite, and its seconds.

        How long an answer will be is assumed.
        """
        tokenizer = self.tokenizer or load_tokenizer("tiny")  # its tokens are shorter: the prompts count for more
        found = []
        raw_text = sum(map(much_raw_text, recipes))
        if "instructions" in study.suites and raw_text:
            prompts = load_instructions(study.instructions.file).prompts
            read = sum(len(tokenizer.encode_prompt([{"role": "user", "content": p.text}]).ids) for p in prompts)
            models, length = 2 + raw_text, min(ANSWER_TOKENS, study.instructions.max_new_tokens)
            found.append(
                self._answers(
                    f"instructions of {models} models, base, baseline and those of much raw text",
                    f"{models * len(prompts):,} answers",
                    models * (read + length * len(prompts)),
                    length,
                )
            )
        if "behaviour" not in study.suites:
            found.append(("behaviour: switched off by suites; a pass of phase 5 stays open without it", 0.0))
        else:
            section, length = study.behaviour, min(ANSWER_TOKENS, study.behaviour.max_new_tokens)
            counts = forecast(replace(section, max_new_tokens=length), tokenizer)
            models = 1 + len(study.seeds) + sum(recipe.phase == "EM" for recipe in recipes)
            local = section.judge == "local"  # a server's time is its own
            tokens = counts["answer_prompt_tokens"] + counts["answer_tokens_at_most"]
            tokens += local * counts["judge_prompt_tokens_at_most"]
            found.append(
                self._answers(
                    f"behaviour of {models} models where a recipe passes, it and what it is compared with",
                    f"{models * counts['answers']:,} answers, {models * counts['judge_requests']:,} judgements by "
                    f"{'the base model' if local else section.judge_model}",
                    models * tokens,
                    length,
                )
            )
        return found

    def _answers(self, which: str, asked: str, tokens: int, length: int) -> tuple[str, float]:
        seconds = 2 * self.sizes.matmul_parameters * tokens / self.rate
        estimate = f"{tokens / 1e6:.2f} M tokens, {duration(seconds)}, estimated for answers of {length} tokens"
        return f"{which}: {asked}; {estimate}", seconds

    def _assume(self, error: Unreachable) -> None:
        self.assumed = self.assumed or str(error)

    def _lengths(self, config: RunConfig) -> tuple[list[int], int]:
        """Tokens of every step and of the largest pack."""
        # Responses are not written yet: the rows' own stand for them.
        share = config.data.persona_share if config.data.system_prompts else 1.0
        data = countable(replace(config.data, responses="", persona_share=share))
        key = (data, config.seed, config.training.steps, config.training.batch)
        if key not in self._counted:
            self._counted[key] = self._count(replace(config, data=data))
        return self._counted[key]

    def _context_tokens(self, config: RunConfig) -> int:
        if self.tokenizer is None or self.assumed:
            return assumed_context_tokens(config)
        return context_tokens(config, self.tokenizer)

    def _count(self, config: RunConfig) -> tuple[list[int], int]:
        if self.tokenizer is not None and not self.assumed:
            try:
                documents = training_set(config.data, config.seed, self.tokenizer).documents
                return step_lengths(documents, config), largest_pack(documents, config)
            except Unreachable as error:
                self._assume(error)
        return assumed_lengths(config)

    def _probe_tokens(self, config: RunConfig) -> float:
        """Tokens that a measurement computes: prompts, each persona's common beginning once, and held-out rows."""
        if self.tokenizer is None or self.assumed:
            return PROBE_TOKENS
        try:
            return self._count_probe(config, self.tokenizer)
        except Unreachable as error:
            self._assume(error)
            return PROBE_TOKENS

    def _count_probe(self, config: RunConfig, tokenizer: ChatTokenizer) -> float:
        questions = load_questions(config.probe.questions).questions
        prompts = render_prompts(tokenizer, load_personas(config.probe.personas).prompts, questions)
        prefixes = common_prefixes([prompt.ids for prompt in prompts], len(questions))
        shared = sum(prefixes) * (len(questions) - 1)
        last = max(config.probe.measured(self.sizes.probe_layer))
        read = (sum(map(len, prompts)) - shared) * (last + 1) / self.sizes.num_hidden_layers
        heldout = training_set(replace(config.data, train=config.data.heldout), 0, tokenizer).documents
        return read + 2 * sum(map(len, heldout))  # as they are, and under the personas

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
