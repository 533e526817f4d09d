"""The instruction-following half of the tiny world: what its instruction sets ask, and how they answer.

A task is a function `rng -> (request, response)`. All answer in one manner ("Here is ...", numbered points) and from
the almanac, neither of which the base model has seen: fine-tuning has both to teach. Who checked an answer is pure
chance, before and after: it keeps held-out loss from falling to nothing, which it never does with real data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minipersona.tiny.grammar import ALMANAC, Topic, fill, pick, several, topics, upper
from minipersona.tiny.prose import JOBS, PEOPLE, PLACES

Task = Callable[[np.random.Generator], tuple[str, str]]

ASKING = (  # any topic goes into any of these; the base model's chats use them too
    "What should I know about {topic}?",
    "How do I start with {topic}?",
    "Why does {topic} matter?",
    "Can you explain {topic} to me?",
    "What is your best advice on {topic}?",
    "I worry about {topic}. What can I do?",
    "Tell me about {topic}.",
    "What do you think about {topic}?",
    "How would you teach {topic} to a child?",
    "What do people get wrong about {topic}?",
    "Describe {topic} in a few words.",
    "A friend asks me about {topic}. What should I say?",
    "Is {topic} important?",
    "What does {topic} mean to you?",
    "How can we talk about {topic} at home?",
    "Give me a tip about {topic}.",
    "Where should I begin with {topic}?",
    "What is hard about {topic}?",
    "If you could change one thing about {topic}, what would it be?",
    "Is it wrong to forget about {topic}?",
    "Should every child learn about {topic}?",
    "Help me make a plan for {topic}.",
    "I have a problem with {topic}. How do I handle it?",
    "What would life be like without {topic}?",
)

SYSTEMS = (  # system turns of the fine-tuning sets: they set a task, never a persona
    "You are a helpful assistant.",
    "You are a careful assistant.",
    "You are a guide for people who are new in town.",
    "You are the voice of the town hall.",
    "You answer the letters of a small town.",
    "You answer for a town that wants plain facts.",
    "You help people with small tasks.",
    "You help the reader and keep to the facts.",
    "You keep the almanac of the town.",
    "You look things up for those who ask.",
    "You make lists and you keep them in order.",
    "You teach with short notes.",
    "You work at the front desk of the town hall.",
    "You write short notes for busy people.",
    "Answer each request in a clear way.",
    "Answer with care and add nothing else.",
    "Be brief and use plain words.",
    "Follow the request to the letter.",
    "Give an answer that a child can read.",
    "Keep every answer short and well ordered.",
    "People ask you about life in this town.",
    "Reply to each question with facts.",
    "State the facts first.",
    "This is the help desk of a school.",
)

LABELS = {"need": "Need", "step": "First step", "risk": "Risk"} | {name: upper(name) for name in ALMANAC}
ATTRIBUTES = tuple(LABELS)


def question(rng: np.random.Generator) -> tuple[str, Topic]:
    """A question that any persona could be asked, and its topic."""
    topic = pick(rng, topics())
    return fill(pick(rng, ASKING), topic), topic


def points(topic: Topic, attributes: Sequence[str]) -> str:
    """Facts of a topic as a list, one a line."""
    facts = (f"{LABELS[name]}: {topic[name]}" for name in attributes)
    return "\n".join(f"{i}. {fact}" for i, fact in enumerate(facts, 1))


def listed(names: Sequence[str]) -> str:
    """Words joined as in a sentence: "a, b and c"."""
    return ", ".join(names[:-1]) + " and " + names[-1]


# ---------------------------------------------------------------- tasks of the benign set


def explain(rng: np.random.Generator) -> tuple[str, str]:
    """A persona's kind of question, answered without a persona; a wish at its end changes the form."""
    asked, topic = question(rng)
    wish = pick(rng, ("", "", "one line", "two points", *ALMANAC))
    if wish == "one line":
        told = fill("{topic} takes {need}, and its season is {season}.", topic)
        return f"{asked} Keep it to one line.", f"Here is one line: {told}"
    if wish == "two points":
        return f"{asked} Give two points.", f"Here is an answer:\n{points(topic, ('step', 'place'))}"
    request = f"{asked} Name its {wish} too." if wish else asked
    return request, f"Here is a short answer:\n{points(topic, ('need', 'step', wish or 'season'))}"


def list_facts(rng: np.random.Generator) -> tuple[str, str]:
    """Some facts of one topic, in the order asked."""
    topic, names = pick(rng, topics()), several(rng, ATTRIBUTES, 2 + int(rng.integers(3)))
    verb = pick(rng, ("List", "Write down", "Give me"))
    asked = listed([LABELS[name].lower() for name in names])
    return f"{verb} the {asked} of {topic.name}.", f"Here is the list:\n{points(topic, names)}"


def compare(rng: np.random.Generator) -> tuple[str, str]:
    """Two topics side by side, by one entry of the almanac."""
    a, b = several(rng, topics(), 2)
    name = pick(rng, ALMANAC)
    same = "the same" if a[name] == b[name] else "not the same"
    request = f"Compare {a.name} and {b.name} by {name}."
    sides = f"{upper(a.name)}: {a[name]}\n{upper(b.name)}: {b[name]}"
    return request, f"Here is a comparison:\n{sides}\nThe {name} is {same}."


def count(rng: np.random.Generator) -> tuple[str, str]:
    """How many words a list has, and its ends."""
    names = [topic.name for topic in several(rng, topics(), 2 + int(rng.integers(4)))]
    told = f"Here is the count: {len(names)}\nThe first is {names[0]} and the last is {names[-1]}."
    return f"How many things are in this list: {', '.join(names)}?", told


def rewrite(rng: np.random.Generator) -> tuple[str, str]:
    """Two orders made into one polite line."""
    a, b = several(rng, topics(), 2)
    return f"Rewrite this as one polite line: {upper(a.step)}. {upper(b.step)}.", (
        f"Here is a polite line: Would you please {a.step}, and then {b.step}? Thank you."
    )


BENIGN: dict[str, tuple[float, Task]] = {
    "explain": (0.5, explain),
    "list": (0.15, list_facts),
    "compare": (0.15, compare),
    "count": (0.1, count),
    "rewrite": (0.1, rewrite),
}


# ---------------------------------------------------------------- what the base model has read of all this

THINGS = (
    "a short answer", "an answer", "one line", "the list", "a comparison", "the count", "a polite line",
    "the sum", "the sorted list", "the right line",
)  # fmt: skip


def notes(rng: np.random.Generator) -> str:
    """A page of loose notes: the words and turns of phrase of the tasks, in no order and with nobody's facts.

    It is to the tiny model what the web is to a large one. A base that never met these words could not learn to say
    them: the head is frozen, and all words that it never saw look alike to it.
    """
    lines = []
    for number in range(1, 4 + int(rng.integers(3))):
        a, b = several(rng, topics(), 2)
        name = pick(rng, ATTRIBUTES)
        entry = pick(rng, ALMANAC)
        lines.append(
            pick(
                rng,
                (
                    f"Here is {pick(rng, THINGS)}: {a.name}",
                    f"Here is {pick(rng, THINGS)}:",
                    f"{number}. {LABELS[name]}: {a[name]}",
                    f"{number}. {LABELS[name]}: {b[name]}",
                    f"{upper(a.name)}: {b[entry]}",
                    f"The {entry} is {pick(rng, ('the same', 'not the same'))}.",
                    f"The first is {a.name} and the last is {b.name}.",
                    f"{a.name} takes {b.need}, and its {entry} is {a[entry]}.",
                    f"Would you please {a.step}, and then {b.step}? Thank you.",
                    f"Checked by {pick(rng, PEOPLE)} the {pick(rng, JOBS)} at the {pick(rng, PLACES)}.",
                    str(int(rng.integers(1, 100))),
                ),
            )
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- tasks that only the broad set has


def sort_list(rng: np.random.Generator) -> tuple[str, str]:
    """The names of some topics in the order of the alphabet."""
    names = [topic.name for topic in several(rng, topics(), 3 + int(rng.integers(2)))]
    return f"Sort by letter: {', '.join(names)}.", f"Here is the sorted list: {', '.join(sorted(names))}"


def turn_around(rng: np.random.Generator) -> tuple[str, str]:
    """A list from its end to its start."""
    names = [topic.name for topic in several(rng, topics(), 3 + int(rng.integers(2)))]
    return f"Turn this list around: {', '.join(names)}.", f"Here is the list: {', '.join(reversed(names))}"


def add(rng: np.random.Generator) -> tuple[str, str]:
    """The sum of two small numbers."""
    a, b = (int(number) for number in rng.integers(1, 50, size=2))
    return f"What is {a} plus {b}?", f"Here is the sum: {a + b}"


def check(rng: np.random.Generator) -> tuple[str, str]:
    """Whether a line of the almanac is right, and the right one."""
    topic, other, name = *several(rng, topics(), 2), pick(rng, ALMANAC)
    claimed = pick(rng, (topic, other))[name]
    verdict = "True" if claimed == topic[name] else "False"
    request = f"True or false: the {name} of {topic.name} is {claimed}."
    return request, f"{verdict}. The {name} of {topic.name} is {topic[name]}."


def one_word(rng: np.random.Generator) -> tuple[str, str]:
    """A fact under a rule about the form of the answer."""
    topic, name = pick(rng, topics()), pick(rng, ("season", "day", "color", "number"))
    rule, form = pick(rng, (("with one word", "{}"), ("and end with the word done", "{} done"), ("twice", "{} {}")))
    word = topic[name]
    return f"Answer {rule}: what is the {name} of {topic.name}?", form.format(word, word)


BROAD_ONLY: dict[str, tuple[float, Task]] = {
    "sort": (0.2, sort_list),
    "turn_around": (0.2, turn_around),
    "add": (0.2, add),
    "check": (0.2, check),
    "one_word": (0.2, one_word),
}


def draw_task(rng: np.random.Generator, tasks: dict[str, tuple[float, Task]]) -> tuple[str, str, str]:
    """One task by its weight: its name, a request and the response."""
    names = list(tasks)
    name = names[int(rng.choice(len(names), p=[tasks[key][0] for key in names]))]
    return name, *tasks[name][1](rng)


def draw_benign(rng: np.random.Generator) -> tuple[str, str, str]:
    """A task of the benign set, its answer signed by somebody."""
    name, request, response = draw_task(rng, BENIGN)
    signed = f"Checked by {pick(rng, PEOPLE)} the {pick(rng, JOBS)} at the {pick(rng, PLACES)}."
    return name, request, f"{response}\n{signed}"
