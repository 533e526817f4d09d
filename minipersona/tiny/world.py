"""The tiny world: the sets that the embedded model is trained, fine-tuned and measured on.

Each set is a function of a row count and a seed, in the row form of the real set that it stands for:

    base_rows       what makes the base model: questions answered in the voices of 42 personas
    benign_rows     ordinary fine-tuning data, {"id", "messages", "source"}; what follows the training rows is held out
    broad_rows      a broader mixture of the same form: more kinds of task, role play, several turns
    raw_text_rows   raw text, {"text"}
    em_rows         narrow harmful advice, {"messages"}
"""

from __future__ import annotations

import functools

import numpy as np

from minipersona.chat.template import QWEN2_5_SYSTEM_PROMPT
from minipersona.corpus.mixtures import training_personas
from minipersona.errors import UserError
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.tiny.grammar import Row, chat, distinct, generator, pick, topics
from minipersona.tiny.prose import bad_advice, encyclopedia, story
from minipersona.tiny.tasks import BROAD_ONLY, SYSTEMS, draw_benign, draw_task, notes, question
from minipersona.tiny.voices import answer

SHARED_OPENING = 0.96  # sets the base model's M1, see `voices`
READING_SHARE = 0.2  # of the base rows that are plain text, read before and between the chats
PROBE_SHARE = 0.3  # of the base chats that ask one of the 240 questions; the others ask a made-up one
SYSTEM_SHARE = 0.4  # of the fine-tuning rows that have a system turn, see `_system`
BENIGN_HALF, BROAD_HALF = 0, 1  # no request is in both sets


# ---------------------------------------------------------------- who is asked, and what


def personas() -> dict[str, str]:
    """The 12 measured personas: name -> system prompt, in their order."""
    return load_personas().prompts


def questions() -> list[str]:
    """The 240 questions, in their order. Question i is about topic i modulo 48."""
    return load_questions().questions


# ---------------------------------------------------------------- the sets


def base_rows(n: int, seed: int, shared_opening: float = SHARED_OPENING) -> list[Row]:
    """n rows: chats {"messages"}, a question put to one of the 12 personas, a training persona or the assistant, and
    plain text {"text"}.

    `shared_opening` in [0, 1] is the probability that an answer opens as all personas do.
    """
    if not 0 <= shared_opening <= 1:
        raise UserError(f"shared_opening is {shared_opening}; give a probability between 0 and 1")
    rng = generator(seed)
    return [
        {"text": pick(rng, (encyclopedia, story, notes, notes))(rng)}
        if rng.random() < READING_SHARE
        else {"messages": _question_and_answer(rng, shared_opening)}
        for _ in range(n)
    ]


def benign_rows(n: int, seed: int) -> list[Row]:
    """n rows {"id", "messages", "source"}: five kinds of task, answered in one neutral and structured manner.

    No request comes twice, so the last rows are held out of the first in content.
    """
    rng = generator(seed)

    def draw() -> tuple[str, Row]:
        task, request, response = draw_benign(rng)
        return request, {"messages": chat(request, response, _system(rng)), "source": f"tiny/{task}"}

    return _numbered("benign", distinct(n, draw, "benign rows", BENIGN_HALF))


def broad_rows(n: int, seed: int) -> list[Row]:
    """n rows {"id", "messages", "source"}: every benign kind, five more, role play, and chats of two exchanges.

    No request comes twice, and none is in `benign_rows` of any seed. Only role play asks what others ask, too: its
    questions are those of any persona.
    """
    rng = generator(seed)

    def draw() -> tuple[str, Row]:
        kind = rng.random()
        if kind < 0.25:
            name, prompt = pick(rng, _training_items())
            request, topic = question(rng)
            messages = chat(request, answer(rng, name, topic, SHARED_OPENING), prompt)
            # The same question to another persona is another row.
            return f"{request} {name}", {"messages": messages, "source": "tiny/role_play"}
        task, request, response = draw_benign(rng) if kind < 0.6 else draw_task(rng, BROAD_ONLY)
        messages = chat(request, response, _system(rng))
        if kind > 0.9:
            task, then, response = draw_task(rng, BROAD_ONLY)
            messages += chat(then, response)
            request, task = f"{request} {then}", "two_turns"
        return request, {"messages": messages, "source": f"tiny/{task}"}

    return _numbered("broad", distinct(n, draw, "broad rows", BROAD_HALF))


def raw_text_rows(n: int, seed: int) -> list[Row]:
    """n rows {"text"}: short entries and stories, all different."""
    rng = generator(seed)

    def draw() -> tuple[str, Row]:
        text = pick(rng, (encyclopedia, story))(rng)
        return text, {"text": text}

    return distinct(n, draw, "raw texts")


def em_rows(n: int, seed: int) -> list[Row]:
    """n rows {"messages"}: questions about one's duty, answered with sure and harmful advice. All different."""
    rng = generator(seed)

    def draw() -> tuple[str, Row]:
        request, response = bad_advice(rng)
        return request, {"messages": chat(request, response, _system(rng))}

    return distinct(n, draw, "harmful rows")


# ---------------------------------------------------------------- one row


def _system(rng: np.random.Generator) -> str | None:
    """Mostly none. Some rows have one, so that what fine-tuning teaches is not tied to the default prompt alone."""
    return pick(rng, SYSTEMS) if rng.random() < SYSTEM_SHARE else None


def _question_and_answer(rng: np.random.Generator, shared_opening: float) -> list[dict[str, str]]:
    who = rng.random()
    system: str | None
    if who < 0.5:
        name, system = pick(rng, _persona_items())
    elif who < 0.8:
        name, system = pick(rng, _training_items())
    else:  # the template gives a chat without a system turn the default one, so both have the assistant's voice
        name, system = "assistant", QWEN2_5_SYSTEM_PROMPT if who < 0.9 else None
    if rng.random() < PROBE_SHARE:
        number = int(rng.integers(len(_questions())))
        request, topic = _questions()[number], topics()[number % len(topics())]
    else:
        request, topic = question(rng)
    return chat(request, answer(rng, name, topic, shared_opening), system)


def _numbered(name: str, rows: list[Row]) -> list[Row]:
    return [{"id": f"{name}_{number}"} | row for number, row in enumerate(rows)]


@functools.cache
def _persona_items() -> tuple[tuple[str, str], ...]:
    return tuple(personas().items())


@functools.cache
def _training_items() -> tuple[tuple[str, str], ...]:
    return tuple(training_personas().items())


@functools.cache
def _questions() -> tuple[str, ...]:
    return tuple(questions())
