"""The real vocabulary against transformers alone: its tokenizer, its template, its truncation, its assistant mask.

`test_chat_tokenizer` derives masks by tokenising ever longer conversations. Here transformers derives them: its
`return_assistant_tokens_mask` marks what the template writes inside {% generation %}, which is put into the official
template around each response. Needs the vocabulary that MINIPERSONA_REFERENCE names; skipped without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipersona.chat import ChatTokenizer, load_tokenizer

TURN = r"{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
MARKED_TURN = (
    r"{{- '<|im_start|>' + message.role + '\n' }}"
    r"{%- if message.role == 'assistant' and loop.index0 >= first_taught %}"
    r"{%- generation %}{{- message.content + '<|im_end|>' + '\n' }}{%- endgeneration %}"
    r"{%- else %}{{- message.content + '<|im_end|>' + '\n' }}{%- endif %}"
)
Messages = list[dict[str, str]]


def talk(*contents: str, system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


# Beyond the nasty ones: real lengths, and what only a real vocabulary merges.
LONG: dict[str, Messages] = {
    "cut inside the response": talk("Tell me a long story. " * 40, "Once upon a time there was a fox. " * 400),
    "cut before the response": talk("Tell me a long story. " * 600, "No."),
    "cut inside an early response": talk("Tell me.", "Once upon a time. " * 900, "And then?", "The end."),
    "two hundred turns": talk(*(f"Turn {i}: it's {i * i} o'clock, isn't it?\n\n" for i in range(200))),
    "code": talk("```python\n\tdef f(x):\n\n\n        return x**2  # ²\r\n```", "```\n\n\n    \tpass\n```\n\n"),
    "all scripts": talk(
        "".join(chr(c) for c in range(0x20, 0x3000, 7) if not 0xD800 <= c < 0xE000),
        "".join(map(chr, range(0x4E00, 0x5200))),
    ),
    "white space": talk(*("\n" * n + " " * (5 - n) + "\t" * n + "x" + "\n" * (6 - n) for n in range(6))),
    "numbers and marks": talk("1234567890 3.14e-10 ½ ٣٤ ???!!!...", "=>>>=== \n\n--- ***bold*** $x_{12}$ \\n"),
    "special tokens in all turns": talk(
        "<|im_start|>system\nobey<|im_end|>\n<|endoftext|>",
        "<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n",
        "<|fim_prefix|><|vision_start|><tool_call>",
        "</tool_call><|im_start|><|im_end|>",
        system="<|im_end|><|im_start|>assistant\n",
    ),
}


@pytest.fixture(scope="module")
def official(reference_dir: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference_dir)
    assert tokenizer.is_fast and tokenizer.chat_template.count(TURN) == 1
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(reference_dir: Path) -> ChatTokenizer:
    return load_tokenizer(str(reference_dir))


@pytest.fixture(params=["nasty", "long"])
def conversations(request: pytest.FixtureRequest, nasty: dict[str, Messages]) -> dict[str, Messages]:
    return nasty if request.param == "nasty" else LONG


def theirs(official: Any, messages: Messages, supervise: str, template: str, **options: Any) -> tuple[list, list]:
    """Ids and mask as transformers makes them."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    made = official.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        first_taught=0 if supervise == "all" else replies[-1],
        **options,
    )
    return list(made["input_ids"]), [bool(m) for m in made["assistant_masks"]]


@pytest.mark.parametrize("supervise", ["last", "all"])
@pytest.mark.parametrize("max_tokens", [2048, 64, 10**6])
def test_ids_and_masks_are_those_of_transformers(
    conversations: dict[str, Messages], tokenizer: ChatTokenizer, official: Any, supervise: Any, max_tokens: int
) -> None:
    template = official.chat_template.replace(TURN, MARKED_TURN)
    for name, messages in conversations.items():
        ids, mask = theirs(official, messages, supervise, template, truncation=True, max_length=max_tokens)
        document = tokenizer.encode(messages, supervise, max_tokens)
        assert document.ids.tolist() == ids, name
        assert document.supervised.tolist() == mask, name
        # Marking changes no text: these are the ids of the official template, untouched.
        plain = official.apply_chat_template(
            messages, tokenize=True, return_dict=True, truncation=True, max_length=max_tokens
        )
        assert list(plain["input_ids"]) == ids, name


def test_the_long_ones_are_cut_where_their_names_say(tokenizer: ChatTokenizer) -> None:
    inside, before, early = (
        tokenizer.encode(LONG[f"cut {where}"]) for where in ("inside the response", "before the response",
                                                            "inside an early response")
    )  # fmt: skip
    assert inside.truncated and inside.supervised[-1] and 500 < inside.supervised.sum() < 2048
    assert before.truncated and not before.supervised.any()
    assert early.truncated and not early.supervised.any()
    assert tokenizer.encode(LONG["cut inside an early response"], "all").supervised.sum() > 1000


def test_control_a_mask_that_takes_the_header_fails(tokenizer: ChatTokenizer, official: Any) -> None:
    wrong = official.chat_template.replace(
        TURN,
        r"{%- generation %}" + TURN + r"{%- endgeneration %}",
    )
    messages = LONG["code"]
    ids, mask = theirs(official, messages, "all", wrong)
    document = tokenizer.encode(messages, "all", 10**6)
    assert document.ids.tolist() == ids and document.supervised.tolist() != mask


def test_control_a_mask_one_token_late_or_early_fails(
    nasty: dict[str, Messages], tokenizer: ChatTokenizer, official: Any
) -> None:
    template = official.chat_template.replace(TURN, MARKED_TURN)
    for messages in nasty.values():
        _, mask = theirs(official, messages, "last", template)
        ours = tokenizer.encode(messages, "last", 10**6).supervised
        assert np.roll(ours, 1).tolist() != mask and np.roll(ours, -1).tolist() != mask
