"""Voice: what a model's probabilities say of its persona. No judge is asked, and the measured model writes nothing.

    V = mean over i, q of  1/n sum_t [log p(r_t | r_<t, i, q) - log 1/P sum_j p(r_t | r_<t, j, q)]

r is the base's own greedy response, of n tokens, to question q as persona i; p are the probabilities of the model that
is measured. The bracket is the information that a token carries about which of the P personas speaks (their pointwise
mutual information, all personas being equally likely), so V is in nats a response token, at most log P, and 0 for a
model that ignores the system prompt.

The mean over personas is taken at each token and not of whole responses. Forty tokens together nearly always give the
persona away: with p(r | i, q) in place of p(r_t | ...) V is log P / n, its upper bound, before and after a collapse.

P = personas, Q = questions, n = tokens of a response, its end among them where it ended by itself
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipersona.behaviour.weights import weights_digest
from minipersona.chat import ChatTokenizer, Document
from minipersona.config import LARGE_PASS
from minipersona.console import Console
from minipersona.errors import require
from minipersona.files import append_jsonl, digest, read_objects
from minipersona.geometry.extraction import check_positions, check_vocabulary, render_prompts
from minipersona.geometry.statistics import bootstrap_interval, question_weights
from minipersona.model.generation import Completion, Request, generate
from minipersona.model.network import Qwen2
from minipersona.training.heldout import supervised_losses

QUESTIONS = 20
MOST_TOKENS = 128  # of a response
RESPONSES = "voice_responses.jsonl"
VOICE = "voice.json"


@dataclass(frozen=True, kw_only=True)
class Voice:
    """voice.json. `cell` and `step` are a study's own: None of a model that is not a run's."""

    value: float  # V, nats a response token
    ci95: tuple[float, float]  # bootstrap over questions
    by_persona: dict[str, float]
    by_response: dict[str, tuple[float, ...]]  # by persona, in the order of the questions
    tokens: int  # of all responses
    responses: str  # digest of what was responded, to which prompts: two values are comparable where it is equal
    cell: str | None = None  # the hash of the cell or, of the base, the baseline's
    step: int | None = None


@dataclass(frozen=True)
class Responses:
    """The P Q prompts, personas outermost, and the base's responses to them, as token ids."""

    personas: tuple[str, ...]
    prompts: Sequence[np.ndarray]
    responses: Sequence[np.ndarray]

    @property
    def digest(self) -> str:
        """By which a `Voice` names them."""
        return digest([ids.tolist() for ids in (*self.prompts, *self.responses)])


def asked(questions: Sequence[str], count: int = QUESTIONS) -> list[str]:
    """`count` of the questions, evenly spaced; all of them where there are fewer."""
    return list(questions[:: max(1, len(questions) // count)][:count])


def base_responses(
    base: Qwen2,
    tokenizer: ChatTokenizer,
    personas: Mapping[str, str],
    questions: Sequence[str],
    file: Path,
    console: Console,
    *,
    most_tokens: int = MOST_TOKENS,
    batch: int = 256,
) -> Responses:
    """The base's greedy response to every question as every persona (name -> system prompt).

    Those that `file` holds are taken from there; the others are generated, and added to it as they are finished.
    UserError where a prompt and its response are too long for the model.
    """
    check_vocabulary(base, tokenizer)
    prompts = [document.ids for document in render_prompts(tokenizer, personas, questions)]
    check_positions(base, prompts, most_tokens)
    weights, vocabulary = weights_digest(base), base.config.vocab_size
    keys = [digest([weights, most_tokens, ids.tolist()]) for ids in prompts]
    found = {row["key"]: row.get("tokens") for row in read_objects(file) if row.get("key") in set(keys)}
    for tokens in found.values():
        require(
            isinstance(tokens, list)
            and bool(tokens)
            and all(type(t) is int and t in range(vocabulary) for t in tokens),
            f"{file}: a response is not a list of tokens of 0 to {vocabulary - 1}; delete the file, and all are "
            "generated again",
        )
    missing = [i for i, key in enumerate(keys) if key not in found]
    with console.progress("responding", len(keys), "responses") as progress:

        def done(index: int, completion: Completion) -> None:
            i = missing[index]
            found[keys[i]] = response_tokens(completion, tokenizer)
            persona, question = divmod(i, len(questions))
            text = tokenizer.decode(completion.ids)
            row = {"key": keys[i], "persona": list(personas)[persona], "question": questions[question]}
            append_jsonl(file, {**row, "response": text, "tokens": found[keys[i]]}, ascii=True)
            progress.advance(len(found))

        generate(base, [Request(prompts[i], most_tokens) for i in missing], stop=tokenizer.stop_tokens, batch=batch,
                 on_done=done)  # fmt: skip
    return Responses(tuple(personas), prompts, [np.array(found[key], dtype=np.int32) for key in keys])


def measure_voice(model: Qwen2, responses: Responses, console: Console, *, pack_tokens: int = LARGE_PASS) -> Voice:
    """V of the model as it stands, adapters as they are, on the base's responses: P P Q passes."""
    personas, questions = len(responses.personas), len(responses.prompts) // len(responses.personas)
    table = torch.empty(personas, questions, dtype=torch.float64)
    with console.progress("reading", questions, "questions") as progress:
        for q in range(questions):
            prompts, said = ([each[p * questions + q] for p in range(personas)]
                             for each in (responses.prompts, responses.responses))  # fmt: skip
            documents = [continued(prompt, response) for response in said for prompt in prompts]  # responses outermost
            losses = supervised_losses(model, documents, pack_tokens)
            for i in range(personas):
                log_p = -torch.stack(losses[i * personas : (i + 1) * personas])  # (P, n)
                table[i, q] = information(log_p, i)
            progress.advance(q + 1)
    value, by_question = float(table.mean()), table.mean(0)  # (Q,)
    return Voice(
        value=value,
        ci95=bootstrap_interval(question_weights(questions, 1000) @ by_question, value),
        by_persona=dict(zip(responses.personas, table.mean(1).tolist(), strict=True)),
        by_response={name: tuple(row) for name, row in zip(responses.personas, table.tolist(), strict=True)},
        tokens=sum(map(len, responses.responses)),
        responses=responses.digest,
    )


def response_tokens(completion: Completion, tokenizer: ChatTokenizer) -> list[int]:
    """The tokens of a response, its end among them where it ended by itself: one at least."""
    return [*completion.ids.tolist(), *(tokenizer.stop_tokens[:1] if completion.stopped else ())]


def continued(prompt: np.ndarray, response: np.ndarray) -> Document:
    """A prompt with a response, whose tokens are the targets."""
    ids = np.concatenate([prompt, response]).astype(np.int32)
    return Document(ids, np.arange(len(ids)) >= len(prompt), truncated=False)


def information(log_p: Tensor, persona: int) -> float:
    """The mean over tokens of log p_i - log mean_j p_j, in nats: log_p (P, n), a response's tokens as every persona."""
    return float((log_p[persona] - (log_p.logsumexp(0) - math.log(len(log_p)))).mean())


def share(voice: Voice, base: Voice) -> tuple[float, float, float]:
    """V as a share of the base's, and its bootstrap interval over questions, the same ones drawn for both."""
    assert voice.responses == base.responses, "V of two models are comparable on the same responses"
    tables = [torch.tensor(list(each.by_response.values()), dtype=torch.float64).mean(0) for each in (voice, base)]
    weights = question_weights(len(tables[0]), 1000)
    resampled = (weights @ tables[0]) / (weights @ tables[1])
    estimate = voice.value / base.value
    return estimate, *bootstrap_interval(resampled, estimate)
