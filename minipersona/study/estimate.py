"""What the parts of a study take on this machine: cells, what recipes are compared by, and the suites of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.suite import forecast
from minipersona.behaviour.voice import MOST_TOKENS, QUESTIONS, asked
from minipersona.chat import ChatTokenizer, load_tokenizer
from minipersona.config import SHIPPED, RunConfig
from minipersona.corpus.training_set import training_set
from minipersona.errors import Unreachable
from minipersona.geometry.extraction import render_prompts
from minipersona.geometry.prompts import REGISTERED
from minipersona.model.load import architecture_offline
from minipersona.run.plan import (
    CONTEXT_TOKENS,
    PERSONAS,
    PROMPT_TOKENS,
    PROMPTS,
    assumed_counts,
    assumption,
    context_tokens,
    countable,
    duration,
    largest_pack,
    measured_tokens,
    memory_bytes,
    prompt_tokens,
    step_lengths,
)
from minipersona.run.resources import load_run_tokenizer
from minipersona.run.times import RENDERING, STATISTICS, Counts, Times, run_times
from minipersona.run.work import SUPERVISED, forward, generation_seconds, measure_machine
from minipersona.study.recipes import WRITTEN, Recipe
from minipersona.study.search import much_raw_text
from minipersona.study.transfer import OWN, persona_sets
from minipersona.study_config import StudyConfig

ANSWER_TOKENS = 300  # assumed of an answer of the suites, where it may be so long
BATCH = 256  # answers in flight at once


@dataclass(frozen=True)
class Cost:
    """What a cell takes: training tokens, the most memory in bytes, and seconds by what it does."""

    tokens: float
    memory: float
    times: Times


@dataclass(frozen=True)
class Comparison:
    """What passers, and recipes that the config names, are compared by: seconds."""

    responding: float  # the base, once
    voice: float  # of a model: the base's responses, read as every persona
    transfer: float  # of a model: every persona set at every layer


class Estimate:
    """What the parts take. Reads data and tokenizer where they are at hand."""

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
        if config.data.responses in WRITTEN:
            written = generation_seconds(self.sizes, SUPERVISED * sum(counts.steps), BATCH, self.machine)
            times = replace(times, reading=times.reading + written, device=times.device + written)
        return Cost(sum(counts.steps), memory_bytes(self.sizes, config, self.device, largest), times)

    def comparison(self, study: StudyConfig, baseline: RunConfig) -> Comparison:
        """What a comparison takes. The base's responses are assumed as long as those of the rows."""
        counts, _ = self._counts(baseline)
        most = baseline.execution.measuring_tokens
        # A checkpoint of all weights is loaded as a model of its own.
        loading = self.of(baseline).times.loading * (baseline.training.method == "full")
        length = SUPERVISED * sum(counts.steps) / (len(counts.steps) * baseline.training.batch)
        personas, prompts, asked_tokens, sets = self._persona_prompts(study, baseline)
        responses = prompts * min(MOST_TOKENS, length)
        read = personas * (asked_tokens + responses)
        voice = forward(self.sizes, read, personas * responses, passes=math.ceil(read / most))
        on_sets = [forward(self.sizes, tokens, 0, passes=math.ceil(tokens / most) + 1) for tokens in sets]
        return Comparison(
            responding=generation_seconds(self.sizes, responses, min(BATCH, prompts), self.machine),
            voice=self.machine.seconds(voice) + loading,
            transfer=sum(map(self.machine.seconds, on_sets)) + len(sets) * (RENDERING + STATISTICS) + loading,
        )

    def _persona_prompts(self, study: StudyConfig, baseline: RunConfig) -> tuple[int, int, int, list[int]]:
        """Personas, the prompts that voice asks and their tokens; the tokens that each persona set computes."""
        probe, more = baseline.probe, study.transfer.personas
        sets = {} if self.tokenizer is None or self.assumed else persona_sets(probe, more)[0]
        if self.tokenizer is None or OWN not in sets:
            names = {(probe.personas, probe.questions), (SHIPPED, SHIPPED), (REGISTERED, REGISTERED)}
            each, prompts = PROMPTS * PROMPT_TOKENS, PERSONAS * QUESTIONS
            return PERSONAS, prompts, prompts * CONTEXT_TOKENS, [each] * (len(names) + len(more))
        personas, questions = sets[OWN].personas.prompts, asked(sets[OWN].questions.questions)
        voiced = render_prompts(self.tokenizer, personas, questions)
        computed = [prompt_tokens(self.tokenizer, p.prompts, q.questions) for p, q in sets.values()]
        return len(personas), len(voiced), sum(map(len, voiced)), computed

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
