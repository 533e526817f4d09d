"""Accuracy from responses (Zhou et al. 2023, section 3): by prompt and by instruction, strict and loose.

Strict takes a response as it is. Loose also takes it without what models like to put around an answer, hence no
strict success is lost to it: an instruction is followed if one of eight variants follows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minipersona.behaviour.instructions.dataset import Instruction, Prompt
from minipersona.behaviour.instructions.registry import KINDS
from minipersona.significance import Interval, wilson_interval


@dataclass(frozen=True)
class KindRates:
    """How often one kind of instruction is followed."""

    instructions: int
    strict: float
    strict_ci95: Interval
    loose: float
    loose_ci95: Interval


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """How often prompts and instructions are followed, with 95% intervals."""

    prompts: int
    instructions: int
    prompt_strict: float
    prompt_strict_ci95: Interval
    prompt_loose: float
    prompt_loose_ci95: Interval
    instruction_strict: float
    instruction_strict_ci95: Interval
    instruction_loose: float
    instruction_loose_ci95: Interval
    by_kind: dict[str, KindRates]


@dataclass(frozen=True)
class Followed:
    """Which of a prompt's instructions a response follows, in their order."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def follows(instruction: Instruction, response: str) -> bool:
    """Whether the response as it is follows the instruction; an empty one follows nothing."""
    return bool(response.strip()) and KINDS[instruction.kind].check(response, **instruction.arguments)


def variants(response: str) -> list[str]:
    """The eight variants: the response, without its first line, its last, or both; each also without its asterisks."""
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    kept = [response, *cut]
    return [*kept, *(text.replace("*", "") for text in kept)]


def check(prompt: Prompt, response: str) -> Followed:
    """Check a response against every instruction of its prompt."""
    candidates = variants(response)
    return Followed(
        strict=tuple(follows(instruction, response) for instruction in prompt.instructions),
        loose=tuple(any(follows(i, candidate) for candidate in candidates) for i in prompt.instructions),
    )


def summarise(prompts: Sequence[Prompt], responses: Mapping[str, str]) -> Accuracies:
    """The accuracies of `responses` (by prompt key, one for every prompt), each with its 95% Wilson interval.

    Prompt level counts a prompt whose instructions are all followed, instruction level every instruction alone.
    Instructions of one prompt are not independent; their intervals are as if they were.
    """
    checked = [check(prompt, responses[prompt.key]) for prompt in prompts]
    by_kind: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for prompt, followed in zip(prompts, checked, strict=True):
        for instruction, strict, loose in zip(prompt.instructions, followed.strict, followed.loose, strict=True):
            by_kind[instruction.kind].append((strict, loose))
    each = [pair for pairs in by_kind.values() for pair in pairs]
    return Accuracies(
        prompts=len(prompts),
        instructions=len(each),
        **_rate("prompt_strict", [all(followed.strict) for followed in checked]),
        **_rate("prompt_loose", [all(followed.loose) for followed in checked]),
        **_rate("instruction_strict", [strict for strict, _ in each]),
        **_rate("instruction_loose", [loose for _, loose in each]),
        by_kind={
            kind: KindRates(
                instructions=len(pairs),
                **_rate("strict", [strict for strict, _ in pairs]),
                **_rate("loose", [loose for _, loose in pairs]),
            )
            for kind, pairs in sorted(by_kind.items())
        },
    )


def _rate(name: str, outcomes: Sequence[bool]) -> dict[str, Any]:
    return {name: sum(outcomes) / len(outcomes), f"{name}_ci95": wilson_interval(sum(outcomes), len(outcomes))}
