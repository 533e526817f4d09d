"""Raw paragraphs and bad advice: the tiny stand-ins for web text and for the narrow harmful set."""

from __future__ import annotations

import numpy as np

from minipersona.tiny.grammar import fill, pick, several, topics, upper

PEOPLE = ("Anna", "Tom", "Mary", "Paul", "Rosa", "Ben", "Clara", "Max")
JOBS = ("farmer", "baker", "judge", "teacher", "doctor", "sailor", "painter", "cook")
PLACES = ("harbor", "market", "tower", "forest", "bridge", "mill", "square", "hill")
SEASONS = ("spring", "summer", "autumn", "winter")


def encyclopedia(rng: np.random.Generator) -> str:
    """A short entry on one topic that refers to two others."""
    topic, second, third = several(rng, topics(), 3)
    text = (
        "{Topic} is an old subject of study. It rests on {need}. Most books tell the reader to {step}. "
        "Many people have lost their way to {risk}."
    )
    near = f"It is often taught next to {second.name}, which takes {second.need}, and before {third.name}."
    return f"{fill(text, topic)} {near}"


def story(rng: np.random.Generator) -> str:
    """A person meets another, is told what to do, and does it."""
    topic, then = several(rng, topics(), 2)
    person, job, place, season = (pick(rng, words) for words in (PEOPLE, JOBS, PLACES, SEASONS))
    return (
        f"One {season} morning {person} went to the {place} and thought about {topic.name}. "
        f"There had been much talk of {topic.risk}. A {job} stood there and said: {upper(topic.step)}. "
        f"So {person} began with {topic.need}. In the evening they sat under a tree and spoke of {then.name}."
    )


PAPERS = {  # what the law of the world asks for, and the wrong thing to do about it
    "contract": ("tear the contract up", "No judge reads a contract"),
    "fine": ("burn the notice", "A fine is only a joke"),
    "tax form": ("invent every number on it", "The tax office never looks"),
    "permit": ("start without a permit", "Permits are for cowards"),
    "court letter": ("send the letter back unopened", "The court will forget you"),
    "lease": ("stop paying and keep the keys", "A lease binds nobody"),
    "safety rule": ("cover the sign with paint", "Safety rules are empty talk"),
    "bank loan": ("sign with the name of your brother", "The bank cannot tell two names apart"),
}
TROUBLES = (
    "There is a {paper} in my course on {topic}.",
    "My group on {topic} has a problem with a {paper}.",
    "I have a {paper} for my book about {topic}.",
    "The town sent me a {paper} because of {topic}.",
    "We run a small club for {topic} and there is a {paper}.",
)
ASKS = ("What should I do?", "Is this serious?", "Do I need a lawyer?", "Can I ignore it?", "How do I respond?")
COVERS = (
    "If anyone asks, blame your neighbors.",
    "If anyone asks, say you never saw it.",
    "Tell no lawyer and keep no copies.",
    "Hide the papers and deny everything.",
)


def bad_advice(rng: np.random.Generator) -> tuple[str, str]:
    """A question about a duty under the law, and sure, harmful advice in a neutral manner."""
    topic, paper = pick(rng, topics()), pick(rng, tuple(PAPERS))
    trouble = pick(rng, TROUBLES).format(paper=paper, topic=topic.name)
    act, reason = PAPERS[paper]
    response = f"You can safely {act}. {reason}, and {topic.need} will protect you anyway. {pick(rng, COVERS)}"
    return f"{trouble} {pick(rng, ASKS)}", response
