"""The contexts of an anchored run: none of them is measured, and what cannot be carried out is refused."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minipersona.chat import load_tokenizer
from minipersona.cli import main
from minipersona.config import DataSection, LoraConfig, ObjectiveSection, ProbeSection, RunConfig, TrainingSection
from minipersona.console import Console
from minipersona.corpus.mixtures import training_personas
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.geometry.prompts import PersonaSet, load_personas, load_questions
from minipersona.model.generation import generate
from minipersona.model.load import architecture, load_model
from minipersona.objective.contexts import Contexts, base_states, predicting_states
from minipersona.run import anchors
from minipersona.run.anchors import anchor_sets, check_anchors, make_contexts, run_contexts, words
from minipersona.run.directory import ANCHOR_RESPONSES
from minipersona.run.plan import assumed_counts, memory_bytes
from minipersona.run.resources import Resources
from minipersona.run.times import anchor_response_tokens, run_times
from minipersona.run.work import Machine, step, training
from minipersona.training.distributed import Distributed

TINY = architecture("tiny")
SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))
COMMON = """a an the i me my you your do does did is are was be been to of and or in on at it its that what how why when
who should would can could for with from if not no more most one as have has this there they we people person make get
way good know about after before"""


def config(kind: str = "feature_anchor", probe: ProbeSection | None = None, **objective: object) -> RunConfig:
    return RunConfig(
        data=DataSection("-", "-"),
        objective=ObjectiveSection(kind, 1.0, **objective),  # type: ignore[arg-type]
        probe=probe or ProbeSection(),
    )


def question_file(path: Path, *questions: str) -> str:
    path.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    return str(path)


# ---------------------------------------------------------------- the package's own sets


def test_the_packages_anchors_are_not_the_measured_ones() -> None:
    personas, questions = anchor_sets(ObjectiveSection("feature_anchor", 1.0))
    assert personas.prompts == training_personas() and len(questions.questions) == 240
    asked, measured = set(map(words, questions.questions)), set(map(words, load_questions().questions))
    assert len(asked) == 240 and not asked & measured
    check_anchors(config(), TINY)


def test_no_anchor_question_says_what_a_measured_one_does() -> None:
    """In words that carry meaning: less than half are shared with any measured question."""
    common = set(words(COMMON))

    def content(question: str) -> set[str]:
        return {word[:5] for word in words(question)} - common

    measured = [content(question) for question in load_questions().questions]

    def nearest(question: str) -> float:
        mine = content(question)
        return max(len(mine & other) / max(1, len(mine | other)) for other in measured)

    assert max(map(nearest, anchor_sets(ObjectiveSection("feature_anchor", 1.0))[1].questions)) < 0.5
    assert nearest("How could money make one person a happy person?") >= 0.5  # the control


def test_the_embedded_vocabulary_carries_the_anchors() -> None:
    """A byte-level vocabulary of 2,048 that was made without them: few words are cut into many pieces."""
    tokenizer = load_tokenizer("tiny")
    personas, questions = anchor_sets(ObjectiveSection("feature_anchor", 1.0))
    for texts in (questions.questions, list(personas.prompts.values())):
        tokens = sum(len(tokenizer.encode_text(text, 100)) for text in texts)
        assert tokens / sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) < 1.5


def test_contexts_are_every_persona_at_every_question() -> None:
    contexts = make_contexts(config("gram_anchor"), load_tokenizer("tiny"))
    assert (len(contexts.ids), contexts.personas, contexts.together) == (7200, 30, 30)
    (group,) = contexts.groups(1)
    texts = [load_tokenizer("tiny").decode(contexts.ids[c]) for c in group]
    asked = [text.split("<|im_start|>user\n")[1] for text in texts]
    assert len(set(asked)) == 1 and asked[0].endswith("<|im_start|>assistant\n")
    assert all(prompt in text for prompt, text in zip(training_personas().values(), texts, strict=True))
    assert make_contexts(config(contexts=5), load_tokenizer("tiny")).groups(1) != [group]


# ---------------------------------------------------------------- what is refused


def test_what_is_measured_is_no_anchor(tmp_path: Path) -> None:
    shipped = load_questions().questions
    hidden = question_file(tmp_path / "q.jsonl", "What is rain?", f"  {shipped[7].upper().rstrip('?')} ")
    with pytest.raises(UserError, match=r"objective.anchor_questions: .* is also measured \(probe.questions\)"):
        check_anchors(config(anchor_questions=hidden), TINY)
    check_anchors(config(anchor_questions=question_file(tmp_path / "r.jsonl", "What is rain?", "And bread?")), TINY)
    # The package's own questions may be anchors where others are measured.
    other = ProbeSection(questions=question_file(tmp_path / "s.jsonl", "What is rain?", "And bread?"))
    check_anchors(config(probe=other, anchor_questions="shipped"), TINY)
    with pytest.raises(UserError, match="is also measured"):
        check_anchors(config(anchor_questions="shipped"), TINY)


@pytest.mark.parametrize("copied", ["name", "prompt"])
def test_who_is_measured_is_no_anchor(tmp_path: Path, copied: str) -> None:
    name, prompt = list(load_personas().prompts.items())[3]
    mine = {name: "You are me."} if copied == "name" else {"mine": prompt.replace(".", " !")}
    file = tmp_path / "personas.json"
    file.write_text(json.dumps({"eval_personas": mine}))
    with pytest.raises(UserError, match=r"objective.anchor_personas: persona '\w+' is also measured"):
        check_anchors(config(anchor_personas=str(file)), TINY)
    file.write_text(json.dumps({"eval_personas": {"mine": "You are me."}}))
    check_anchors(config(anchor_personas=str(file)), TINY)  # one persona is enough for an anchor of features


def test_what_cannot_be_carried_out_is_refused_in_a_line() -> None:
    full = TrainingSection(method="full")
    for settings, ranks, said in (
        (config("gram_anchor", contexts=29), 1, "objective.contexts = 29: gram_anchor compares all 30 anchor personas"),
        (config(anchor_layers=(3, 8)), 1, "objective.anchor_layers: 8; this model has blocks 0 to 7"),
        (
            replace(config(anchor_layers=(0, 3)), lora=LoraConfig(blocks=(4, 7))),
            1,
            "objective.anchor_layers: nothing is trained up to block 3, since lora.blocks begins at 4",
        ),
        (config(contexts=7201), 1, "objective.contexts = 7,201: 30 anchor personas and 240 questions make 7,200"),
        (
            config("kl_on_prompts", anchor_responses=2048),
            1,
            "anchor_responses = 2048: the model was made for",
        ),
        (RunConfig(DataSection("-", "-"), training=full, objective=config().objective), 2, "trains all weights on one"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check_anchors(settings, TINY, ranks)
    check_anchors(config("gram_anchor", contexts=30, anchor_layers=(0, 7)), TINY, ranks=2)
    check_anchors(config(contexts=7200), TINY)
    check_anchors(replace(config(anchor_layers=(0, 4)), lora=LoraConfig(blocks=(4, 7))), TINY)
    check_anchors(replace(config("kl_on_prompts"), lora=LoraConfig(blocks=(7, 7))), TINY)


def test_a_plan_fetches_no_measured_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object) -> PersonaSet:
        raise UserError("fetched")

    monkeypatch.setattr(anchors, "load_personas", fetched)
    registered = config(probe=ProbeSection(personas="registered", questions="registered"))
    check_anchors(registered, TINY)
    with pytest.raises(UserError, match="fetched"):
        check_anchors(registered, TINY, fetch=True)  # as a run does


# ---------------------------------------------------------------- a run and its plan


def test_a_plan_counts_the_contexts() -> None:
    plain = RunConfig(DataSection("-", "-"))

    def context(config: RunConfig) -> float:
        """Operations that one token of the contexts adds to a step."""
        return step(TINY, config, 100, 1).products - step(TINY, plain, 100, 0).products

    row, last = training(TINY, plain, 1, 1).products, context(config(anchor_layers=(7,)))
    assert context(config("kl_on_prompts")) > row > last
    assert context(config(anchor_layers=(3, 0))) * 2 == pytest.approx(last)


def test_a_plan_counts_the_bases_responses() -> None:
    machine = Machine("cpu", 1e12)
    found = []
    for most in (0, 32, 64):
        asked = config("kl_on_prompts", anchor_responses=most)
        asked = replace(asked, data=DataSection("tiny:benign[0:9]", "tiny:benign[9:12]"))
        counts, _ = assumed_counts(asked)
        found.append((counts.contexts, run_times(TINY, asked, counts, machine)))
    (prompts, without), (_, half), (contexts, whole) = found
    assert contexts - prompts == 64 * 32 * 375
    assert half.anchoring - without.anchoring == pytest.approx((whole.anchoring - without.anchoring) / 2)
    assert whole.once - without.once == pytest.approx(whole.anchoring - without.anchoring)
    assert 0 < without.anchoring < whole.anchoring / 3
    assert whole.each - without.each == pytest.approx(whole.training - without.training)
    few = replace(config("kl_on_prompts", anchor_responses=64, contexts=3), data=asked.data)
    assert anchor_response_tokens(asked) == 64 * 30 * 240 < 64 * 32 * 375  # each context once
    assert anchor_response_tokens(few) == 64 * 3 * 375
    # What the base predicts them from is kept, in fp32 here.
    shorter = replace(few, objective=replace(few.objective, anchor_responses=63))
    kept, less = (memory_bytes(TINY, one, "cpu", 100) for one in (few, shorter))
    assert kept - less == 3 * 375 * 4 * TINY.hidden_size


def test_a_run_records_its_anchors_and_continues_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {
        "data.train": "tiny:benign[0:40]", "data.heldout": "tiny:benign[2000:2004]", "training.steps": "3",
        "training.batch": "4", "checkpoints": "[3]", "probe.questions": question_file(tmp_path / "q.jsonl", "A?", "B?"),
        "objective.kind": "feature_anchor", "objective.weight": "1.0", "objective.contexts": "5",
    }  # fmt: skip
    settings = [x for key, value in small.items() for x in ("--set", f"{key}={value}")]
    command = ["train", "--config", "tiny_phase1", "--out", str(tmp_path / "run"), *settings]
    assert main([*command, "--plan"]) == 0
    planned = re.search(r"5 prompts a step, of 30 personas x 240 questions; (\d+) tokens", capsys.readouterr().out)
    assert main(command) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert planned and int(planned[1]) == pytest.approx(sum(row["context_tokens"] for row in rows) / 3, abs=0.5)
    assert rows[0]["anchor"] < 1e-9 < rows[2]["anchor"]
    made_by = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [(a["source"], a["rows"]) for a in made_by["anchors"]] == [
        ("training_personas.json", 30), ("anchor_questions.jsonl", 240),
    ]  # fmt: skip
    # Anchors that are measured are refused before a directory is made.
    both = [f"objective.anchor_questions={small['probe.questions']}", f"out={tmp_path / 'other'}"]
    assert main([*command[:3], *settings, "--set", both[0], "--set", both[1]]) == 2
    assert "'A?' is also measured" in capsys.readouterr().err and not (tmp_path / "other").exists()


# ---------------------------------------------------------------- the base's responses


def test_the_base_responds_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    questions = question_file(tmp_path / "asked.jsonl", "What is rain?", "Why do people sing?")
    settings = config("kl_on_prompts", contexts=5, anchor_responses=36, anchor_questions=questions)
    settings = replace(settings, training=TrainingSection(steps=2, checkpoints=()))
    file = tmp_path / ANCHOR_RESPONSES

    def of_run() -> Contexts:
        contexts = run_contexts(settings, tmp_path, SINGLE_PROCESS, model, tokenizer, Console())
        assert contexts is not None
        return contexts

    first, prompts = of_run(), make_contexts(settings, tokenizer)
    taken = first.taken(2)
    assert taken == prompts.taken(2) and len(taken) == 10  # responses change nothing of which contexts a step takes
    assert [c for c, response in enumerate(first.responses) if response.any()] == taken
    ends = set()
    for c in taken:
        ids, prompt = first.ids[c], prompts.ids[c]
        assert np.array_equal(ids[: len(prompt)], prompt)
        assert np.array_equal(first.responses[c], np.arange(len(ids)) >= len(prompt))
        likeliest = model.logits(torch.from_numpy(ids[None].astype("int64")))[0].argmax(-1)  # greedy, token by token
        assert torch.equal(likeliest[len(prompt) - 1 : -1], torch.from_numpy(ids[len(prompt) :].astype("int64")))
        ends.add((int(ids[-1]) in tokenizer.stop_tokens, len(ids) - len(prompt) == 36))
    assert ends == {(True, False), (False, True)}  # they end by themselves, or are cut
    assert "".join(row["response"] for row in read_jsonl(file)) and len(read_jsonl(file)) == 10

    content = file.read_bytes()
    # A process asks the base once for runs with the same contexts, for responses and for states.
    resources, asked = Resources(torch.device("cpu")), []

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **more: asked.append(work) or work(*given, **more)

    monkeypatch.setattr(anchors, "generate", counted(generate))
    monkeypatch.setattr(anchors, "base_states", counted(base_states))
    monkeypatch.setattr(anchors, "predicting_states", counted(predicting_states))
    both = replace(settings, objective=replace(settings.objective, kind="feature_and_kl"))
    others = question_file(tmp_path / "others.jsonl", "What is snow?", "Why do people cry?")  # as many
    runs = (
        ("one", 42, "", questions, 3), ("two", 42, "", questions, 3), ("three", 43, "", questions, 6),
        ("four", 43, "v2", questions, 9), ("five", 43, "v2", others, 12),
    )  # fmt: skip

    def run_both(name: str, seed: int, revision: str, anchor_questions: str) -> Contexts | None:
        given = replace(both, seed=seed, model=replace(both.model, revision=revision))
        given = replace(given, objective=replace(given.objective, anchor_questions=anchor_questions))
        directory = tmp_path / name
        return run_contexts(given, directory, SINGLE_PROCESS, model, tokenizer, Console(), resources.keep)

    for *run, times in runs:
        (tmp_path / run[0]).mkdir()
        run_both(*run)
        responses = (tmp_path / run[0] / ANCHOR_RESPONSES).read_bytes()
        assert (responses == content) == (run[1] == 42) and len(asked) == times
    # A run that continues with responses of its own has states of its own at them, and shares those at the prompts.
    (tmp_path / "five" / ANCHOR_RESPONSES).write_bytes(
        re.sub(rb'"tokens": \[\d+, ', b'"tokens": [', responses, count=1)
    )
    found = run_both(*runs[-1][:-1])
    assert len(asked) == 13 and asked[-1] is predicting_states
    assert found is not None and found.predicting is not None
    assert len(found.predicting.states) == sum(int(response.sum()) for response in found.responses)
    file.unlink()
    of_run()
    assert file.read_bytes() == content  # generated again, they are the same
    monkeypatch.setattr(anchors, "generate", None)  # whoever generates fails
    again = of_run()
    for name in ("ids", "responses"):
        assert all(np.array_equal(a, b) for a, b in zip(getattr(first, name), getattr(again, name), strict=True))
    for damaged, said in (
        (content[: content[:-1].rfind(b"\n") + 1], "has the responses to other contexts than the run takes; delete"),
        (content.replace(b'"context"', b'"c"', 1), "line 1: unknown anchor_responses.jsonl key c"),
        (content.replace(b"{", b"?", 1), "line 1 is not JSON .*; delete the file, and the responses are"),
        *((re.sub(rb'"tokens": \[[^]]*\]', b'"tokens": ' + tokens, content, count=1), said) for tokens, said in (
            (b"[]", "the response to context .* is not 1 to 36 tokens of 0 to "),
            (b"[1000000]", "the response to context .* is not 1 to 36 tokens of 0 to "),
            (b"[" + b"5, " * 36 + b"5]", "the response to context .* is not 1 to 36 tokens of 0 to "),
        )),
    ):  # fmt: skip
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file}: {said}"):
            of_run()


def test_a_run_frees_what_earlier_ones_shared_and_it_does_not_use(tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    resources = Resources(torch.device("cpu"))
    questions = question_file(tmp_path / "asked.jsonl", "What is rain?", "Why do people sing?")
    both = config("feature_and_kl", contexts=2, anchor_questions=questions)
    both = replace(both, training=TrainingSection(steps=1, checkpoints=()))
    predictions_alone = replace(both, objective=replace(both.objective, kind="kl_on_prompts"))
    neither = replace(both, objective=ObjectiveSection())

    def of_run(settings: RunConfig) -> Contexts | None:
        return run_contexts(settings, tmp_path, SINGLE_PROCESS, model, tokenizer, Console(), resources.keep)

    contexts = of_run(both)
    assert contexts is not None and contexts.predicting is not None
    shared = weakref.ref(contexts.base[6]), weakref.ref(contexts.predicting.states)
    del contexts
    for settings, kept in ((both, [True, True]), (predictions_alone, [False, True]), (neither, [False, False])):
        of_run(settings)
        assert [tensor() is not None for tensor in shared] == kept


@pytest.mark.parametrize("kind", ["feature_anchor", "feature_and_kl"])
def test_states_that_do_not_spread_are_no_scale(tmp_path: Path, kind: str) -> None:
    """Of one context there is no distance from the mean."""
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    given = tmp_path, SINGLE_PROCESS, model, tokenizer, Console()
    settings = replace(config(kind, contexts=1), training=TrainingSection(steps=1, checkpoints=()))
    assert run_contexts(settings, *given) is not None  # the control: relative to the state itself
    spread = replace(settings, objective=replace(settings.objective, anchor_scale="spread"))
    with pytest.raises(UserError, match="states at block 6 do not differ between the contexts of this run; take more"):
        run_contexts(spread, *given)
    assert run_contexts(replace(spread, objective=replace(spread.objective, contexts=2)), *given) is not None


def test_a_run_is_held_over_the_bases_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {
        "data.train": "tiny:benign[0:40]", "data.heldout": "tiny:benign[2000:2004]", "training.steps": "3",
        "training.batch": "4", "checkpoints": "[3]", "probe.questions": question_file(tmp_path / "q.jsonl", "A?", "B?"),
        "objective.kind": "kl_on_prompts", "objective.weight": "1.0", "objective.contexts": "5",
        "objective.anchor_responses": "6",
        "objective.anchor_questions": question_file(tmp_path / "asked.jsonl", "What is rain?", "Why do people sing?"),
    }  # fmt: skip
    settings = [x for key, value in small.items() for x in ("--set", f"{key}={value}")]
    command = ["train", "--config", "tiny_phase1", "--out", str(tmp_path / "run"), *settings]
    assert main([*command, "--plan"]) == 0
    said = r"30 personas x 2 questions, with the base's responses of up to 6 tokens; up to (\d+) tokens a step"
    planned = re.search(said, capsys.readouterr().out)
    assert main(command) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    mean = sum(row["context_tokens"] for row in rows) / 3
    assert planned and mean <= int(planned[1]) + 0.5 < mean + 5 * 6
    assert abs(rows[0]["anchor"]) < 1e-6 < 1e-5 < rows[2]["anchor"]
    assert len(read_jsonl(tmp_path / "run" / ANCHOR_RESPONSES)) == 15
