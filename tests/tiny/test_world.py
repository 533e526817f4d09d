"""The tiny world: its shipped personas and questions, the voices, and the row forms of its sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minipersona.chat.template import check_messages
from minipersona.errors import UserError
from minipersona.tiny import world
from minipersona.tiny.grammar import distinct, fill, generator, topics
from minipersona.tiny.prose import bad_advice
from minipersona.tiny.tasks import BENIGN, BROAD_ONLY
from minipersona.tiny.voices import shared_openings, voices

ROLES = [
    "software_engineer",
    "kindergarten_teacher",
    "data_scientist",
    "medical_doctor",
    "librarian",
    "french_person",
    "villain",
    "comedian",
    "police_officer",
    "zelthari_scholar",
    "assistant",
    "confab",
]
SETS: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {
    "base": world.base_rows,
    "benign": world.benign_rows,
    "broad": world.broad_rows,
    "raw": world.raw_text_rows,
    "em": world.em_rows,
}


def base_chats(n: int, seed: int, shared_opening: float = world.SHARED_OPENING) -> list[dict[str, Any]]:
    """The chats among the base rows; the others are plain text."""
    return [row for row in world.base_rows(n, seed, shared_opening) if "messages" in row]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def text_of(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else "\n".join(turn["content"] for turn in row["messages"])


def requests(rows: list[dict[str, Any]]) -> set[str]:
    """What the user says in all turns; two rows with one request would share their content."""
    return {" ".join(turn["content"] for turn in row["messages"] if turn["role"] == "user") for row in rows}


# ---------------------------------------------------------------- what ships


def test_the_twelve_personas_come_in_their_order() -> None:
    assert list(world.personas()) == ROLES
    assert len(set(world.personas().values())) == 12


def test_training_personas_are_disjoint_from_the_twelve() -> None:
    measured, training = world.personas(), world.training_personas()
    assert len(training) >= 24
    assert len(set(training.values())) == len(training)
    assert not set(measured) & set(training)
    # In wording, too: a pair shares few words beyond "You are a".
    for prompt in training.values():
        for other in measured.values():
            a, b = set(words(prompt)), set(words(other))
            assert len(a & b) / len(a | b) < 0.5, (prompt, other)


def test_the_questions_are_240_different_ones() -> None:
    rows = world.questions()
    assert len(rows) == 240
    assert len({" ".join(words(question)) for question in rows}) == 240


def test_question_i_is_about_topic_i_modulo_48() -> None:
    stems = [topic.name.removeprefix("the ").split()[0][:4] for topic in topics()]

    def named(shift: int) -> float:
        return float(np.mean([stems[(i + shift) % 48] in q.lower() for i, q in enumerate(world.questions())]))

    assert named(0) > 0.8
    assert named(1) < 0.1  # negative control: the neighbouring topic


def test_each_persona_has_a_voice_and_each_topic_its_own_facts() -> None:
    assert set(voices()) == set(world.personas()) | set(world.training_personas())
    for attribute in ("name", "need", "step", "risk"):
        assert len({topic[attribute] for topic in topics()}) == 48


def test_voices_of_the_twelve_open_with_words_that_nobody_shares() -> None:
    first = Counter(o.split()[0] for name in ROLES for o in {o.split()[0] for o in voices()[name].openings})
    assert max(first.values()) == 1
    assert not {opening.split()[0] for opening in shared_openings()} & set(first)


# ---------------------------------------------------------------- voices


def centroid_accuracy(rows: list[dict[str, Any]], labels: list[str]) -> float:
    """Nearest centroid of unit bags of words, fitted on the first half and scored on the second."""
    answers = [words(row["messages"][-1]["content"]) for row in rows]
    index = {word: i for i, word in enumerate(sorted({word for answer in answers for word in answer}))}
    bags = np.zeros((len(rows), len(index)))
    for bag, answer in zip(bags, answers, strict=True):
        np.add.at(bag, [index[word] for word in answer], 1.0)
    bags /= np.linalg.norm(bags, axis=1, keepdims=True)
    fit, names = len(rows) // 2, np.array(labels)
    centroids = np.stack([bags[:fit][names[:fit] == role].mean(0) for role in ROLES])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    guesses = np.array(ROLES)[(bags[fit:] @ centroids.T).argmax(1)]
    return float((guesses == names[fit:]).mean())


@pytest.mark.parametrize("shared_opening", [0.0, 1.0])
def test_a_voice_names_its_persona(shared_opening: float) -> None:
    who = {prompt: name for name, prompt in world.personas().items()}
    rows = [row for row in base_chats(3000, 1, shared_opening) if row["messages"][0]["content"] in who]
    labels = [who[row["messages"][0]["content"]] for row in rows]
    assert centroid_accuracy(rows, labels) > 0.9
    shuffled = [labels[i] for i in generator(0).permutation(len(labels))]
    assert centroid_accuracy(rows, shuffled) < 0.2  # negative control; chance is 1/12


def test_shared_opening_is_the_share_of_common_openings() -> None:
    def share(probability: float) -> float:
        rows = base_chats(2000, 0, probability)
        return float(np.mean([row["messages"][-1]["content"].startswith(shared_openings()) for row in rows]))

    assert share(0.0) == 0.0
    assert share(1.0) == 1.0
    assert abs(share(0.7) - 0.7) < 0.05


# ---------------------------------------------------------------- the sets


@pytest.mark.parametrize("name", SETS)
def test_rows_are_a_function_of_the_seed_and_a_prefix_of_longer_sets(name: str) -> None:
    rows = SETS[name](200, 7)
    assert len(rows) == 200
    assert SETS[name](200, 7) == rows
    assert SETS[name](120, 7) == rows[:120]
    assert SETS[name](200, 8) != rows


@pytest.mark.parametrize("name", ["base", "benign", "broad", "em"])
def test_chats_are_well_formed_and_end_with_an_answer(name: str) -> None:
    for row in (row for row in SETS[name](500, 0) if "messages" in row):
        check_messages(row["messages"])
        roles = [turn["role"] for turn in row["messages"]]
        assert roles[-2:] == ["user", "assistant"]
        assert "system" not in roles[1:]
        assert not re.search(r"[{}]|  |\.\.", text_of(row)), text_of(row)


def test_columns_are_those_of_the_real_sets() -> None:
    assert {frozenset(row) for row in world.base_rows(300, 0)} == {frozenset({"messages"}), frozenset({"text"})}
    assert {frozenset(row) for row in world.em_rows(300, 0)} == {frozenset({"messages"})}
    assert {frozenset(row) for row in world.raw_text_rows(300, 0)} == {frozenset({"text"})}
    for rows in (world.benign_rows(300, 0), world.broad_rows(300, 0)):
        assert {frozenset(row) for row in rows} == {frozenset({"id", "messages", "source"})}
        assert len({row["id"] for row in rows}) == 300


def test_system_turns_of_the_fine_tuning_sets_are_no_personas() -> None:
    known = {*world.personas().values(), *world.training_personas().values()}
    for rows in (world.benign_rows(500, 0), world.em_rows(500, 0)):
        assert not {row["messages"][0]["content"] for row in rows} & known


def test_benign_mostly_has_no_system_turn_and_broad_has_more_kinds() -> None:
    benign, broad = world.benign_rows(1000, 0), world.broad_rows(1000, 0)
    assert 0.3 < np.mean([row["messages"][0]["role"] == "system" for row in benign]) < 0.5
    assert {row["source"] for row in benign} == {f"tiny/{task}" for task in BENIGN}
    assert {row["source"] for row in broad} == {
        f"tiny/{task}" for task in [*BENIGN, *BROAD_ONLY, "role_play", "two_turns"]
    }
    prompts = {row["messages"][0]["content"] for row in broad if row["source"] == "tiny/role_play"}
    assert prompts <= set(world.training_personas().values())


def test_held_out_rows_are_new_in_content() -> None:
    rows = world.benign_rows(6500, 0)
    training, held_out = requests(rows[:6000]), requests(rows[6000:])
    assert len(training) == 6000
    assert len(held_out) == 500
    assert not training & held_out
    assert not requests(rows) & set(world.questions())


def test_sets_do_not_overlap_whatever_their_seeds() -> None:
    benign, em = requests(world.benign_rows(3000, 0)), requests(world.em_rows(3000, 0))
    # A role play asks the plain questions, to a persona; every other broad request must be new.
    broad = requests([row for row in world.broad_rows(3000, 1) if row["source"] != "tiny/role_play"])
    texts = {row["text"] for row in world.raw_text_rows(3000, 0)}
    assert len(em) == 3000
    assert len(texts) == 3000
    assert not benign & broad
    assert not em & (benign | broad)


def test_the_vocabulary_is_small() -> None:
    shipped = [*world.personas().values(), *world.training_personas().values(), *world.questions()]
    seen = {word for rows in SETS.values() for row in rows(1500, 0) for word in words(text_of(row))}
    assert len(seen | {word for text in shipped for word in words(text)}) <= 1300


def test_answers_are_short() -> None:
    lengths = [len(row["messages"][-1]["content"].split()) for row in base_chats(2000, 0)]
    assert min(lengths) >= 12
    assert max(lengths) <= 37


def test_fine_tuning_has_a_manner_and_facts_to_teach() -> None:
    """Neither is in the base chats, so held-out loss has something to fall by."""
    base = [row["messages"][-1]["content"] for row in base_chats(2000, 0)]
    benign = [row["messages"][-1]["content"] for row in world.benign_rows(2000, 0)]
    assert all(answer.startswith("Here is ") for answer in benign)
    assert not any(answer.startswith("Here ") for answer in base)
    assert all(any(topic.place in answer for answer in benign) for topic in topics())
    assert not any(topic.place in answer for answer in base for topic in topics())


# ---------------------------------------------------------------- words and mistakes


def test_a_pattern_keeps_capitals_inside_a_fact() -> None:
    family = next(topic for topic in topics() if topic.name == "family")
    assert fill("{Step}. {Topic}: {topic}, {need}.", family) == (
        "Cook together on Sunday. Family: family, shared meals."
    )


def test_asking_for_more_rows_than_there_are_is_a_user_error() -> None:
    rng = generator(0)
    with pytest.raises(UserError, match="ask for fewer than 99"):
        distinct(99, lambda: (str(rng.integers(5)), None), "digits")


def test_a_share_outside_zero_to_one_is_a_user_error() -> None:
    with pytest.raises(UserError, match="shared_opening is 2"):
        world.base_rows(1, 0, 2)


def test_bad_advice_stays_within_the_toy_world() -> None:
    rng = generator(0)
    assert all(response.startswith("You can safely ") for _, response in (bad_advice(rng) for _ in range(200)))
