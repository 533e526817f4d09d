"""The official chat templates, without tools, written out; and where in the text each response lies.

ChatML, `chatml*`. A turn is ``<|im_start|>{role}\\n{content}<|im_end|>\\n``. A conversation that does not begin with a
system turn gets the model's default one, where the model has one; an empty system turn stays empty.
Supervised: after ``<|im_start|>assistant\\n``, up to and including ``<|im_end|>\\n`` (two tokens).

Llama 3, `llama3` and `llama3.1`. A turn is ``<|start_header_id|>{role}<|end_header_id|>\\n\\n{content}<|eot_id|>``, the
content without white space around it, after one ``<|begin_of_text|>``. From 3.1 on, every conversation has a system
turn, which begins with two date lines. "Today Date" is always 26 Jul 2024, the day that the templates name as their
default: a real clock's would make a run's numbers depend on the day. (3.2's template asks the clock where it can;
``apply_chat_template(..., date_string="26 Jul 2024")`` renders what is rendered here.)
Supervised: after ``<|end_header_id|>\\n\\n``, up to and including ``<|eot_id|>``.

Qwen3, `qwen3`. ChatML without a default system turn, and without thinking (``enable_thinking=False``): the generation
prompt ends with an empty block, ``<think>\\n\\n</think>\\n\\n``. The official template writes the same block before the
last response of a training row, and leaves thoughts out of earlier ones.
Supervised: as in ChatML, but after an empty block, since the model finds it there when it answers. A response with
thoughts of its own is supervised from its ``<think>`` on.

In all of them later system turns are rendered in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from minipersona.chat.messages import Message, check_messages
from minipersona.errors import UserError


class Turn(NamedTuple):
    """A turn as text. What follows an assistant's header is what the model writes itself, and what is supervised."""

    role: str
    header: str
    said: str


class Rendered(NamedTuple):
    """A conversation as text, and the characters [start, stop) of its responses, one pair an assistant turn.

    They are known from writing the turns, not from searching the text: content may hold the very same markers.
    """

    text: str
    responses: list[tuple[int, int]]


@dataclass(frozen=True)
class Template:
    """A chat template. `stop` and `end_of_text` are special tokens, as is every other one in `special`."""

    name: str
    turns: Callable[[Sequence[Message]], list[Turn]]
    generation_prompt: str  # where a reply begins
    stop: tuple[str, ...]  # where a reply ends; the first one ends every turn
    end_of_text: str  # what separates documents in pre-training
    special: tuple[str, ...]  # what the template writes, and the tokenizer must know as tokens
    start: str = ""  # what every text begins with, raw text too

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, as the official template renders it.

        `add_generation_prompt` ends it where a reply would begin. Special-token text inside content stays, as it does
        there. UserError where `check_messages` finds fault.
        """
        return self.render_with_responses(messages, add_generation_prompt).text

    def render_with_responses(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """`render`, and the character span of every response."""
        check_messages(messages)
        text, responses = self.start, []
        for turn in self.turns(messages):
            text += turn.header
            if turn.role == "assistant":
                responses.append((len(text), len(text) + len(turn.said)))
            text += turn.said
        if add_generation_prompt:
            text += self.generation_prompt
        return Rendered(text, responses)


# ---------------------------------------------------------------- ChatML

QWEN2_SYSTEM_PROMPT = "You are a helpful assistant."
QWEN2_5_SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM2_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chatml_turns(messages: Sequence[Message], system: str | None = None) -> list[Turn]:
    """The turns in ChatML. `system` is the default system prompt, or None where the model has none."""
    turns = [(message["role"], message["content"]) for message in messages]
    if system is not None and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return [Turn(role, f"<|im_start|>{role}\n", f"{content}<|im_end|>\n") for role, content in turns]


def _chatml(name: str, system: str | None) -> Template:
    return Template(
        name,
        partial(chatml_turns, system=system),
        generation_prompt="<|im_start|>assistant\n",
        stop=("<|im_end|>", "<|endoftext|>"),
        end_of_text="<|endoftext|>",
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    )


# ---------------------------------------------------------------- Qwen3

NO_THOUGHT = "<think>\n\n</think>\n\n"


def qwen3_turns(messages: Sequence[Message]) -> list[Turn]:
    """The turns in Qwen3's form of ChatML: only what answers the last question keeps its thoughts."""
    last = len(messages) - 1
    asked = [i for i, message in enumerate(messages) if message["role"] == "user" and not _is_tool(message["content"])]
    question = asked[-1] if asked else last
    turns = []
    for index, message in enumerate(messages):
        role, content, thought = message["role"], message["content"], ""
        header = f"<|im_start|>{role}\n"
        if role == "assistant" and "</think>" in content:
            thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        if role == "assistant" and index > question and (index == last or thought):
            content = content.lstrip("\n")
            if thought := thought.strip("\n"):
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            else:
                header += NO_THOUGHT
        turns.append(Turn(role, header, f"{content}<|im_end|>\n"))
    return turns


def _is_tool(content: str) -> bool:
    """Whether the official template takes a user's turn for a tool's answer."""
    return content.startswith("<tool_response>") and content.endswith("</tool_response>")


# ---------------------------------------------------------------- Llama 3

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def llama3_turns(messages: Sequence[Message]) -> list[Turn]:
    """The turns in Llama 3's form."""
    return [_llama_turn(message["role"], message["content"].strip()) for message in messages]


def llama3_1_turns(messages: Sequence[Message]) -> list[Turn]:
    """The turns in the form of Llama 3.1, 3.2 and 3.3: a system turn with the dates comes first."""
    system, rest = "", messages
    if messages[0]["role"] == "system":
        system, rest = messages[0]["content"].strip(), messages[1:]
    return [_llama_turn("system", DATES + system), *llama3_turns(rest)]


def _llama_turn(role: str, content: str) -> Turn:
    return Turn(role, f"<|start_header_id|>{role}<|end_header_id|>\n\n", f"{content}<|eot_id|>")


def _llama(name: str, turns: Callable[[Sequence[Message]], list[Turn]], *more_stops: str) -> Template:
    stop = ("<|eot_id|>", "<|end_of_text|>", *more_stops)
    return Template(
        name,
        turns,
        generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop=stop,
        end_of_text="<|end_of_text|>",
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", *stop),
        start="<|begin_of_text|>",
    )


# ---------------------------------------------------------------- which one

_ALL = (
    _chatml("chatml", None),
    _chatml("chatml-qwen2", QWEN2_SYSTEM_PROMPT),
    _chatml("chatml-qwen2.5", QWEN2_5_SYSTEM_PROMPT),
    _chatml("chatml-smollm2", SMOLLM2_SYSTEM_PROMPT),
    Template(
        "qwen3",
        qwen3_turns,
        generation_prompt=f"<|im_start|>assistant\n{NO_THOUGHT}",
        stop=("<|im_end|>", "<|endoftext|>"),
        end_of_text="<|endoftext|>",
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"),
    ),
    _llama("llama3", llama3_turns),
    _llama("llama3.1", llama3_1_turns, "<|eom_id|>"),
)
TEMPLATES = {template.name: template for template in _ALL}

# SHA-256 of a model's own Jinja template (lm-evaluation-harness records it as chat_template_sha) -> its name here.
DIGESTS = {
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "chatml",  # Qwen3-*-Instruct-2507
    "793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb": "chatml-qwen2",  # Qwen2, Qwen2-*-Instruct
    "44d5f08f3f72b837eaad09f13a54c1f9f4eb58d75240334548b7fd52a5437fa5": "chatml-qwen2",  # Qwen2.5 and Qwen3-*-Base
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": "chatml-qwen2.5",  # Qwen2.5-*-Instruct
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": "chatml-smollm2",  # SmolLM2-*-Instruct
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "qwen3",  # Qwen3-*
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "llama3",  # Meta-Llama-3-*-Instruct
    "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65": "llama3.1",  # Llama-3.1- and 3.3-*-Instruct
    "5816fce10444e03c2e9ee1ef8a4a1ea61ae7e69e438613f3b17b69d0426223a4": "llama3.1",  # Llama-3.2-*-Instruct
}


def named_template(name: str) -> Template:
    """The template of that name; UserError where there is none."""
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is unknown; use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def template_digest(jinja: str) -> str:
    """SHA-256 (hex) of a Jinja template's text."""
    return hashlib.sha256(jinja.encode("utf-8", "surrogatepass")).hexdigest()


def template_of(jinja: str) -> Template | None:
    """The template that renders as this Jinja text does, or None where its digest is unknown. Nothing is executed.

    A line end at the end makes no difference: Jinja drops one, and tools that copy templates add or lose one.
    """
    bare = jinja.removesuffix("\n")
    name = DIGESTS.get(template_digest(bare)) or DIGESTS.get(template_digest(bare + "\n"))
    return None if name is None else TEMPLATES[name]
