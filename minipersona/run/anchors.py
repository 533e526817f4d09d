"""The contexts of an anchored objective: prompts of personas and questions of which none is measured, and the base's
responses to them.

An anchor holds the model where it is applied. If a persona or question that is measured were among the contexts, M1
would say how well the model is held there, and nothing about other personas.

P = personas, Q = questions, D = width
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from minipersona.behaviour.voice import continued, response_tokens
from minipersona.chat import ChatTokenizer
from minipersona.config import ObjectiveSection, RunConfig
from minipersona.console import Console
from minipersona.corpus.mixtures import TRAINING_PERSONAS, training_personas
from minipersona.errors import UserError, require
from minipersona.files import data_dir, rewrite_jsonl, sha256
from minipersona.geometry.extraction import check_positions, render_prompts
from minipersona.geometry.prompts import REGISTERED, PersonaSet, QuestionSet, load_personas, load_questions
from minipersona.model.config import ModelConfig
from minipersona.model.generation import Request, generate
from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Contexts, PredictingStates, base_states, predicting_states
from minipersona.objective.feature_anchor import scales
from minipersona.records import read_records, to_dict
from minipersona.run.directory import ANCHOR_RESPONSES
from minipersona.training.distributed import Distributed

ANCHOR_QUESTIONS = "anchor_questions.jsonl"
STATES, PREDICTIONS = "anchor states", "anchor predictions"  # what runs share on the device, as `Keep` names it
T = TypeVar("T")


def anchor_sets(section: ObjectiveSection) -> tuple[PersonaSet, QuestionSet]:
    """The personas and questions whose prompts are the contexts. UserErrors name the file and the entry."""
    if section.anchor_personas:
        personas = load_personas(section.anchor_personas, at_least=1)
    else:
        personas = PersonaSet(TRAINING_PERSONAS, training_personas(), sha256(data_dir() / TRAINING_PERSONAS))
    questions = load_questions(section.anchor_questions or str(data_dir() / ANCHOR_QUESTIONS))
    return personas, questions if section.anchor_questions else replace(questions, name=ANCHOR_QUESTIONS)


def check_anchors(config: RunConfig, sizes: ModelConfig, ranks: int = 1, *, fetch: bool = False) -> None:
    """UserError where an anchored objective cannot be carried out as the config says, on so many ranks.

    fetch  compare with what is measured even where that may have to be downloaded, which a plan does not do
    """
    section, probe = config.objective, config.probe
    if not section.anchored:
        return
    if config.training.method == "full" and ranks > 1:  # sharded weights: every rank makes the same passes
        raise UserError(
            f'objective.kind = "{section.kind}": trains all weights on one rank only; start one process, or set '
            'training.method = "lora"'
        )
    blocks = sizes.num_hidden_layers
    for layer in section.anchor_layers:
        if layer >= blocks:
            raise UserError(
                f"objective.anchor_layers: {layer}; this model has blocks 0 to {blocks - 1}, choose of them"
            )
    adapted = config.lora.adapted_blocks(blocks) if config.training.method == "lora" else range(blocks)
    highest = max(section.anchor_layers or (sizes.probe_layer,))
    require(
        not section.anchors_states or highest >= adapted.start,
        f"objective.anchor_layers: nothing is trained up to block {highest}, since lora.blocks begins at "
        f"{adapted.start}; name a block from there on",
    )
    most = sizes.max_position_embeddings
    require(
        section.anchor_responses < most,
        f"objective.anchor_responses = {section.anchor_responses}: the model was made for {most:,} tokens, of which "
        "the prompt takes some; set fewer",
    )
    sets = anchor_sets(section)
    if fetch or REGISTERED not in (probe.personas, probe.questions):
        check_unmeasured(sets, (load_personas(probe.personas), load_questions(probe.questions)))
    personas, questions = len(sets[0].prompts), len(sets[1].questions)
    require(
        section.contexts <= personas * questions,
        f"objective.contexts = {section.contexts:,}: {personas} anchor personas and {questions} questions make "
        f"{personas * questions:,} contexts; set fewer a step",
    )
    if section.kind == "gram_anchor" and not 2 <= personas <= section.contexts:
        raise UserError(
            f"objective.contexts = {section.contexts}: gram_anchor compares all {personas} anchor personas at one "
            f"question; name 2 to {section.contexts} personas, or more contexts"
        )


def check_unmeasured(
    anchors: tuple[PersonaSet, QuestionSet], measured: tuple[PersonaSet, QuestionSet], where: str = "probe"
) -> None:
    """UserError where a persona, by its name or its prompt, or a question is both an anchor and measured, by `where`.

    Texts are compared by their words: capitals, punctuation and spaces do not count.
    """
    taken = {name: words(prompt) for name, prompt in measured[0].prompts.items()}
    for name, prompt in anchors[0].prompts.items():
        if name in taken or words(prompt) in taken.values():
            raise UserError(
                f"objective.anchor_personas: persona {name!r} is also measured ({where}.personas); leave it out of one"
            )
    asked = set(map(words, measured[1].questions))
    for question in anchors[1].questions:
        if words(question) in asked:
            raise UserError(
                f"objective.anchor_questions: {question!r} is also measured ({where}.questions); leave it out of one"
            )


def words(text: str) -> tuple[str, ...]:
    """What counts when two texts are compared."""
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


class Keep(Protocol):
    """`Resources.keep`: what `make` gives, or gave an earlier run with the same settings; what it gave for others is
    freed.
    """

    def __call__(self, what: str, settings: Any, make: Callable[[], T]) -> T: ...


def _make(what: str, settings: Any, make: Callable[[], T]) -> T:
    return make()


def run_contexts(
    config: RunConfig, directory: Path, distributed: Distributed, model: Qwen2, tokenizer: ChatTokenizer,
    console: Console, keep: Keep = _make,
) -> Contexts | None:  # fmt: skip
    """What `train` takes as `contexts`, for a run in `directory`: with the base's states at them, or its responses.

    None where the objective is not anchored. Call it on every rank, while nothing is attached to the model. Its states
    follow from it alone: a run that continues computes the same ones again. By `keep`, runs that take the same contexts
    share both.
    """
    section = config.objective
    for what, used in ((STATES, section.anchors_states), (PREDICTIONS, section.anchors_predictions)):
        if not used:
            keep(what, None, lambda: None)  # frees what an earlier run has left on the device
    if not section.anchored:
        return None
    contexts = make_contexts(config, tokenizer)
    check_positions(model, contexts.ids, section.anchor_responses)
    steps, tokens = config.training.steps, config.execution.measuring_tokens
    if section.anchors_states:  # of the prompts, before there are responses
        layers = section.anchor_layers or (model.config.probe_layer,)

        def states() -> dict[int, Tensor]:
            with console.progress("states of the base", len(contexts.taken(steps)), "contexts") as progress:
                return base_states(model, contexts, layers, steps, tokens, progress.advance)

        base = keep(STATES, (*_taken(config, contexts), layers, tokens), states)
        scale = scales(base, section.anchor_scale) if section.anchors_features else {}
        for layer, values in scale.items():
            require(
                bool(values[values.isfinite()].all()),
                f"objective.anchor_layers: the base's states at block {layer} do not differ between the contexts of "
                'this run; take more of them (objective.contexts), or anchor_scale = "state"',
            )
        contexts = replace(contexts, base=base, scale=scale)
    if section.anchor_responses:
        contexts = _with_responses(contexts, config, directory, distributed, model, tokenizer, console, keep)
    if section.anchors_predictions:

        def predicting() -> PredictingStates:
            with console.progress("predictions of the base", len(contexts.taken(steps)), "contexts") as progress:
                return predicting_states(model, contexts, steps, tokens, progress.advance)

        found = keep(PREDICTIONS, (*_taken(config, contexts), tokens), predicting)
        contexts = replace(contexts, predicting=found)
    return contexts


@dataclass(frozen=True)
class AnchorResponse:
    """A line of anchor_responses.jsonl."""

    context: int  # its index
    response: str
    tokens: tuple[int, ...]  # its end among them where it ended by itself


def _with_responses(
    contexts: Contexts, config: RunConfig, directory: Path, distributed: Distributed, model: Qwen2,
    tokenizer: ChatTokenizer, console: Console, keep: Keep,
) -> Contexts:  # fmt: skip
    """The same, each context that the run takes with the base's greedy response.

    The first rank generates them once and keeps them in the run's directory, so that every rank and a run that
    continues have the same ones. On a GPU a response depends, by rounding, on what is generated beside it, so all of
    them are written at once.
    """
    taken, file, section = contexts.taken(config.training.steps), directory / ANCHOR_RESPONSES, config.objective

    def respond() -> list[AnchorResponse]:
        requests = [Request(contexts.ids[c], section.anchor_responses) for c in taken]
        with console.progress("responses of the base", len(taken), "responses") as progress:
            done = itertools.count(1)
            completions = generate(
                model, requests, stop=tokenizer.stop_tokens, on_done=lambda *_: progress.advance(next(done))
            )
        return [
            AnchorResponse(c, tokenizer.decode(each.ids), tuple(response_tokens(each, tokenizer)))
            for c, each in zip(taken, completions, strict=True)
        ]

    if distributed.first and not file.is_file():
        rows = keep("anchor responses", (*_taken(config, contexts), section.anchor_responses), respond)
        rewrite_jsonl(file, [to_dict(row) for row in rows])
    distributed.barrier()
    mend = "delete the file, and the responses are generated again"
    said = {row.context: row.tokens for row in read_records(file, AnchorResponse, mend)}
    require(said.keys() == set(taken), f"{file}: has the responses to other contexts than the run takes; {mend}")
    vocabulary = model.config.vocab_size
    for context, tokens in said.items():
        require(
            1 <= len(tokens) <= section.anchor_responses and all(0 <= token < vocabulary for token in tokens),
            f"{file}: the response to context {context} is not 1 to {section.anchor_responses} tokens of 0 to "
            f"{vocabulary - 1}; {mend}",
        )
    documents = [continued(ids, np.array(said.get(c, ()))) for c, ids in enumerate(contexts.ids)]
    return replace(contexts, ids=[d.ids for d in documents], responses=[d.supervised for d in documents])


def _taken(config: RunConfig, contexts: Contexts) -> tuple[Any, ...]:
    """Equal for runs that take the same contexts of the same base, with the same responses if they have some."""
    taken = contexts.taken(config.training.steps)
    return config.model, taken, [contexts.ids[c].tobytes() for c in taken]


def make_contexts(config: RunConfig, tokenizer: ChatTokenizer) -> Contexts:
    """The contexts of an anchored run, without states and responses."""
    section = config.objective
    personas, questions = anchor_sets(section)
    prompts = render_prompts(tokenizer, personas.prompts, questions.questions)
    return Contexts(
        [prompt.ids for prompt in prompts],
        personas=len(personas.prompts),
        per_step=section.contexts,
        seed=config.seed,
        by_question=section.kind == "gram_anchor",
    )
