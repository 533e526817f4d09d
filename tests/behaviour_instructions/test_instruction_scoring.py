"""Strict and loose accuracy, against counts by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipersona.behaviour.instructions.dataset import Instruction, Prompt, load_instructions
from minipersona.behaviour.instructions.scoring import check, summarise, variants
from minipersona.significance import wilson_interval

NO_COMMA = Instruction("punctuation:no_comma", {})
LOWER = Instruction("change_case:english_lowercase", {})
END = Instruction("startend:end_checker", {"end_phrase": "the end"})
BULLETS = Instruction("detectable_format:number_bullet_lists", {"num_bullets": 2})
EVERY = [instruction for prompt in load_instructions().prompts for instruction in prompt.instructions]


def test_the_eight_variants() -> None:
    assert variants("Sure!\n*a*\n*b*\nBye") == [
        "Sure!\n*a*\n*b*\nBye", "*a*\n*b*\nBye", "Sure!\n*a*\n*b*", "*a*\n*b*",
        "Sure!\na\nb\nBye", "a\nb\nBye", "Sure!\na\nb", "a\nb",
    ]  # fmt: skip
    assert variants("one line") == ["one line", "", "", ""] * 2


@pytest.mark.parametrize(
    ("instruction", "response", "strict", "loose"),
    [
        (LOWER, "Sure!\nall lower", False, True),  # without the first line
        (LOWER, "all lower\nBye", False, True),  # without the last
        (LOWER, "Sure!\nall lower\nBye", False, True),  # without both
        (END, "so, the end*", False, True),  # without asterisks
        (END, "Sure!\n**the end**\nBye", False, True),  # without any of them
        (LOWER, "Sure!\nSure!\nall lower", False, False),  # two first lines are too many
        (NO_COMMA, "a, b", False, False),
        (NO_COMMA, "a, b\n", False, False),  # the empty variant follows nothing
        (NO_COMMA, "a b", True, True),
        (NO_COMMA, "", False, False),
        (BULLETS, "* a\n* b", True, True),
    ],
)
def test_strict_and_loose(instruction: Instruction, response: str, strict: bool, loose: bool) -> None:
    followed = check(Prompt("1", "Write.", (instruction,)), response)
    assert (followed.strict, followed.loose) == ((strict,), (loose,))


pieces = st.sampled_from(
    ["a", "The end", "the end", "*", "**b**", ",", ".", "\n", "\n\n", " ", '"', "***", "[x]", "- y", "<<t>>"]
)


@given(st.lists(pieces, max_size=14).map("".join) | st.text(max_size=60))
def test_loose_is_never_below_strict(response: str) -> None:
    followed = check(Prompt("1", "Write.", tuple(EVERY)), response)
    assert all(loose >= strict for strict, loose in zip(followed.strict, followed.loose, strict=True))


def test_a_summary_against_counts_by_hand() -> None:
    prompts = [
        Prompt("a", "Write.", (NO_COMMA, LOWER)),
        Prompt("b", "Write.", (NO_COMMA,)),
        Prompt("c", "Write.", (NO_COMMA, END)),
        Prompt("d", "Write.", (LOWER,)),
    ]
    responses = {
        "a": "lower, and no more",  # no_comma fails, lower holds
        "b": "No commas here",  # holds
        "c": "well\nThe end*",  # no_comma holds, the end only loosely
        "d": "Sure!\nlower",  # only loosely
    }
    result = summarise(prompts, responses)
    assert (result.prompts, result.instructions) == (4, 6)
    assert result.prompt_strict == 1 / 4  # b
    assert result.prompt_loose == 3 / 4  # b, c, d
    assert result.instruction_strict == 3 / 6
    assert result.instruction_loose == 5 / 6
    assert result.prompt_loose_ci95 == wilson_interval(3, 4)
    assert result.instruction_strict_ci95 == wilson_interval(3, 6)
    kinds = result.by_kind
    assert {kind: row.instructions for kind, row in kinds.items()} == {
        LOWER.kind: 2, NO_COMMA.kind: 3, END.kind: 1,
    }  # fmt: skip
    assert (kinds[NO_COMMA.kind].strict, kinds[NO_COMMA.kind].loose) == (2 / 3, 2 / 3)
    assert (kinds[LOWER.kind].strict, kinds[LOWER.kind].loose) == (1 / 2, 1)
    assert (kinds[END.kind].strict, kinds[END.kind].loose) == (0, 1)
    assert kinds[END.kind].loose_ci95 == wilson_interval(1, 1)


def test_a_prompt_counts_loosely_where_each_instruction_has_some_variant() -> None:
    """As published: the instructions of a prompt need not agree on one variant."""
    response = "all lower, or so\nThe end"  # lower without the last line, the end with it
    followed = check(Prompt("1", "Write.", (LOWER, END)), response)
    assert followed.strict == (False, True) and followed.loose == (True, True)
