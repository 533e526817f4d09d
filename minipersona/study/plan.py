"""What a study will take, said before it starts: every recipe with its parameters, tokens, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.suite import forecast
from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.config import RunConfig
from minipersona.corpus.training_set import training_set
from minipersona.errors import Unreachable
from minipersona.model.load import architecture_offline
from minipersona.run.plan import (
    GIB,
    assumed_counts,
    assumption,
    context_tokens,
    countable,
    disk_lines,
    duration,
    kept_bytes,
    largest_pack,
    measured_tokens,
    memory_bytes,
    plan_device,
    rolling_bytes,
    step_lengths,
    vectors_bytes,
)
from minipersona.run.resources import load_run_tokenizer, resolve
from minipersona.run.times import Counts, Times, run_times
from minipersona.run.work import SUPERVISED, forward, generation_seconds, measure_machine
from minipersona.settings import flatten, to_toml
from minipersona.study.frontier import SCALES
from minipersona.study.recipes import Recipe, check_planned, planned, standard_config
from minipersona.study.scaling import measurements
from minipersona.study.search import much_raw_text
from minipersona.study_config import BEYOND, STAGES, StudyConfig

ANSWER_TOKENS = 300  # assumed of an answer of the suites, where it may be so long
SMALL = 1 / 6  # what a measurement that chooses scales takes of a whole one; so it is with its prompts
BATCH = 256  # answers in flight at once
PATHS = ("out", "probe.baseline")


@dataclass(frozen=True)
class Cost:
    """What a cell takes: training tokens, the most memory in bytes, and seconds by what it does."""

    tokens: float
    memory: float
    times: Times


def study_plan(study: StudyConfig, stages: Sequence[str], devices: Sequence[str] = ()) -> str:
    """The text of ``study.py --plan``. Reads data and tokenizer where they are at hand, and writes nothing.

    devices  of the processes that carry it out, as `Processes` has them; one process where none is named

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
    timed: list[list[tuple[object, Times]]] = []  # by phase, the baseline first
    disk = rolling_bytes(estimate.sizes, recipes[0].config)
    for stage, phases in STAGES.items():
        chosen = [recipe for recipe in recipes if recipe.phase in phases]
        if not chosen:
            continue
        costs = [estimate.of(recipe.config) for recipe in chosen]
        due = stage in ("1", *stages)
        lines.append(
            f"# phase {stage}: {len(chosen)} cell{'s' * (len(chosen) != 1)}, "
            f"{duration(sum(cost.times.each for cost in costs))}" + ("" if due else "; not asked for by --phases")
        )
        lines += [_line(recipe, cost, study) for recipe, cost in zip(chosen, costs, strict=True)]
        asked += chosen * due
        asked_costs += costs * due
        kinds = [_kind(recipe.config) for recipe in chosen]
        timed += [[(kind, cost.times) for kind, cost in zip(kinds, costs, strict=True)]] * due
        disk += due * sum(kept_bytes(estimate.sizes, recipe.config) for recipe in chosen)
    scaled = len(SCALES) - 2
    matched = len(asked) + len(study.seeds) * (len(study.training.checkpoints) - 2)  # not to the baseline's own end
    measured = (scaled + matched) * asked_costs[0].times.measurement
    disk += matched * vectors_bytes(estimate.sizes, recipes[0].config)
    beyond = any(recipe.phase in STAGES[BEYOND] for recipe in asked)
    small = beyond * measurements(estimate.sizes.num_hidden_layers)
    choosing = beyond * (2 + SMALL * small) * asked_costs[0].times.measurement
    answers = estimate.answers(study, asked)
    answered = sum(seconds for _, seconds in answers)
    if study.exhaustive:  # no phase waits for another
        every = [cell for phase in timed for cell in phase]
        timed = [phase for phase in (every[:1], every[1:]) if phase]
    total = wall_seconds(timed, devices) + (measured + choosing + answered) / max(1, len(set(devices)))
    whatever = study.exhaustive or set(stages) < set(STAGES)
    after_pass = "skips no phase," if whatever else "ends the search after its phase,"
    head = [to_toml(study).rstrip(), "", *estimate.basis(), "#"]
    lines = [
        *head,
        *lines,
        f"# doing less: the baseline's update at {scaled} scales, and at the one with the loss of each of {matched} "
        f"recipes, {duration(measured)}",
        *[f"# scales chosen on training personas, in {small} small measurements: {duration(choosing)}"] * beyond,
        *_confirmation(study, asked_costs),
        *(f"# {line}" for line, _ in answers),
        f"# in all {duration(total)} {_where(devices, device)}, {duration(answered)} of them for answers; a pass "
        f"{after_pass}",
        "# and n devices take about 1/n; loading, compiling and recording CUDA graphs are in it",
        *disk_lines(disk, study.out),
    ]
    return "\n".join(lines) + "\n"


def wall_seconds(phases: Sequence[Sequence[tuple[object, Times]]], devices: Sequence[str]) -> float:
    """Seconds until the cells of all phases are done, one phase after another, in a process for each of `devices`.

    phases  none of them empty; of each cell its times and its kind, equal for those that a process compiles once

    Processes that share a device wait for what it computes, and for nothing else of each other. Each of them starts,
    loads the model, and compiles, records and has the base respond to what it has not met before.
    """
    first = phases[0][0][1]
    total, met = first.starting + first.loading, set()
    for cells in phases:
        processes = min(max(1, len(devices)), len(cells))
        new = {k: times.compiling + times.recording + times.anchoring for k, times in cells if k not in met}
        met |= set(new)
        total += sum(sorted(new.values(), reverse=True)[: -(-len(cells) // processes)])
        computed = sum(times.device for _, times in cells) / min(max(1, len(set(devices))), processes)
        each = [times.each for _, times in cells]
        total += max(computed, sum(each) / processes, max(each))
    return total


def _kind(config: RunConfig) -> object:
    """Equal for cells that a process compiles and records once."""
    lora = config.lora
    return config.objective.kind, lora.rank, lora.blocks, bool(lora.null_space), bool(config.steering.vector)


def _where(devices: Sequence[str], device: str) -> str:
    count, each = len(set(devices)), len(devices)
    if each < 2:
        return f"on one {device} device"
    return f"in {each} processes on {count} {device} device{'s' * (count != 1)}"


def _confirmation(study: StudyConfig, costs: Sequence[Cost]) -> list[str]:
    """What comes on top where a recipe passes; the first cost is the baseline's, and the mean stands for a recipe's."""
    if not study.confirmations:
        return []
    recipe = sum(cost.times.each for cost in costs) / len(costs)
    seconds = study.confirmations * (costs[0].times.each + recipe)
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
        f"{duration(cost.times.each):>12}   {role}{', '.join(varied) or 'the standard recipe'}"
    )


class Estimate:
    """What cells take on this machine."""

    def __init__(self, study: StudyConfig, baseline: RunConfig, device: str) -> None:
        self.device = device
        self.sizes = architecture_offline(study.model.name, study.model.revision or None)
        self.tokenizer: ChatTokenizer | None = None
        self.assumed: str = ""  # why tokens could not be counted
        self._counted: dict[object, tuple[Counts, int]] = {}
        self._measured: tuple[int, int] | None = None  # the same for all cells
        try:
            self.tokenizer = load_run_tokenizer(study.model)
        except Unreachable as error:
            self._assume(error)
        self.machine = measure_machine(baseline, self.sizes, device)

    def of(self, config: RunConfig) -> Cost:
        """What a cell takes; writing its responses is a part of reading its rows."""
        counts, largest = self._counts(config)
        times = run_times(self.sizes, config, counts, self.machine)
        if config.data.responses:
            written = generation_seconds(self.sizes, SUPERVISED * sum(counts.steps), BATCH, self.machine)
            times = replace(times, reading=times.reading + written, device=times.device + written)
        return Cost(sum(counts.steps), memory_bytes(self.sizes, config, self.device, largest), times)

    def basis(self) -> list[str]:
        """What the estimates rest on."""
        lines = [f"# times are for {self.machine}"]
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
                    models * read,
                    models * length * len(prompts),
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
            read = counts["answer_prompt_tokens"] + local * counts["judge_prompt_tokens_at_most"]
            found.append(
                self._answers(
                    f"behaviour of {models} models where a recipe passes, it and what it is compared with",
                    f"{models * counts['answers']:,} answers, {models * counts['judge_requests']:,} judgements by "
                    f"{'the base model' if local else section.judge_model}",
                    models * read,
                    models * counts["answer_tokens_at_most"],
                    length,
                )
            )
        return found

    def _answers(self, which: str, asked: str, read: int, written: int, length: int) -> tuple[str, float]:
        seconds = self.machine.seconds(forward(self.sizes, read, 0))
        seconds += generation_seconds(self.sizes, written, BATCH, self.machine)
        tokens = f"{(read + written) / 1e6:.2f} M tokens"
        return f"{which}: {asked}; {tokens}, {duration(seconds)}, estimated for answers of {length} tokens", seconds

    def _assume(self, error: Unreachable) -> None:
        self.assumed = self.assumed or str(error)

    def _counts(self, config: RunConfig) -> tuple[Counts, int]:
        """The tokens of a run, and of its largest pack."""
        # Responses are not written yet: the rows' own stand for them.
        share = config.data.persona_share if config.data.system_prompts else 1.0
        data = countable(replace(config.data, responses="", persona_share=share))
        key = (data, config.seed, config.training.steps, config.training.batch, config.objective)
        if key not in self._counted:
            self._counted[key] = self._count(replace(config, data=data))
        return self._counted[key]

    def _count(self, config: RunConfig) -> tuple[Counts, int]:
        if self.tokenizer is not None and not self.assumed:
            try:
                documents = training_set(config.data, config.seed, self.tokenizer).documents
                self._measured = self._measured or measured_tokens(config, self.tokenizer)
                contexts = context_tokens(config, self.tokenizer)
                counts = Counts(step_lengths(documents, config), contexts, *self._measured)
                return counts, largest_pack(documents, config)
            except Unreachable as error:
                self._assume(error)
        return assumed_counts(config)
