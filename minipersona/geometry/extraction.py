"""Persona vectors: the residual stream of every persona at every question, by two methods.

A  at the last token of the rendered prompt, before any response
B  the mean over the tokens of the model's greedy response

A persona's prompts begin alike (its system turn), so that beginning is computed once and the questions continue it.

P = personas, Q = questions, T = tokens of a pack, S = its documents, N = read tokens, D = width
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipersona.chat import ChatTokenizer, Document
from minipersona.config import LARGE_PASS
from minipersona.errors import UserError
from minipersona.files import digest
from minipersona.geometry.vectors import PersonaVectors
from minipersona.model.cache import Cache
from minipersona.model.generation import Completion, Request, generate
from minipersona.model.network import Qwen2, Tap
from minipersona.model.pack import Pack, make_pack, split

RESPONSE_TOKENS = 256  # the longest response of Method B
METHODS = ("A", "B")

Progress = Callable[[int, int], None]


def check_layers(model: Qwen2, layers: Sequence[int]) -> list[int]:
    """The layers, if the model has them all; blocks are counted from 0."""
    blocks = model.config.num_hidden_layers
    for layer in layers:
        if not 0 <= layer < blocks:
            raise UserError(f"layer {layer}: this model has blocks 0 to {blocks - 1}; choose one of them")
    return list(layers)


@torch.no_grad()
def extract(
    model: Qwen2,
    tokenizer: ChatTokenizer,
    personas: Mapping[str, str],
    questions: Sequence[str],
    layers: Sequence[int],
    method: str = "A",
    *,
    pack_tokens: int = LARGE_PASS,
    progress: Progress | None = None,
    prompts: Sequence[Document] | None = None,
) -> PersonaVectors:
    """The residuals behind persona vectors (Chen et al. 2025 in the predecessor study's form), (P, Q, D) fp32 a layer.

    The vectors themselves are their means over questions: `PersonaVectors.mean(layer)`, (P, D).

    personas     name -> system prompt
    layers       layer L is the stream leaving decoder block L, blocks counted from 0 (hidden_states[L + 1])
    method       "A": system persona, user question, generation prompt; its last token; no response.
                 "B": the mean over the tokens of a greedy response of at most 256 tokens, without the stop token; where
                 it stops at once, the prompt's last token stands for it. Response lengths come with the vectors,
                 since a mean over few tokens is noisier and lies elsewhere
    pack_tokens  most tokens of one forward pass
    progress     called with (prompts done, prompts in all); Method B counts a prompt twice: answered, read
    prompts      what `render_prompts` gives for them; rendered here where it is not given

    UserError for a layer that the model lacks, or another method.
    """
    layers = check_layers(model, layers)
    if method not in METHODS:
        raise UserError(f"method {method!r} is not available; use A or B")
    prompts = prompts or render_prompts(tokenizer, personas, questions)
    check_vocabulary(model, tokenizer)
    ids = [prompt.ids for prompt in prompts]
    check_positions(model, ids, RESPONSE_TOKENS if method == "B" else 0)
    read = [slice(len(prompt) - 1, len(prompt)) for prompt in ids]
    counts = None
    if method == "B":
        responses = _respond(model, tokenizer, ids, progress)
        counts = torch.tensor([len(response) for response in responses], dtype=torch.int32)
        read = [slice(len(p), len(p) + len(r)) if len(r) else s for p, r, s in zip(ids, responses, read, strict=True)]
        ids = [np.concatenate([p, r]) for p, r in zip(ids, responses, strict=True)]
        progress = _second_half(progress)
    samples = residuals(model, ids, read, len(questions), layers, pack_tokens, progress)  # (P * Q, D) a layer
    shape = (len(personas), len(questions), model.config.hidden_size)
    return PersonaVectors(
        samples={layer: rows.view(shape) for layer, rows in samples.items()},
        personas=list(personas),
        response_tokens=None if counts is None else counts.view(shape[:2]),
        metadata={
            "method": method,
            **{
                key: value
                for key, name in (("model", "name"), ("revision", "revision"), ("adapter", "adapter"))
                if (value := model.source.get(name))
            },
            "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
            "tokenizer_digest": tokenizer.digest,
            "prompt_digest": digest([d.ids.tolist() for d in prompts]),
            "system_prompts": json.dumps(list(personas.values()), ensure_ascii=False),
            "questions": json.dumps(list(questions), ensure_ascii=False),
        },
    )


def render_prompts(tokenizer: ChatTokenizer, personas: Mapping[str, str], questions: Sequence[str]) -> list[Document]:
    """The P * Q prompts, personas outermost."""
    return tokenizer.encode_prompts(
        [
            [{"role": "system", "content": prompt}, {"role": "user", "content": question}]
            for prompt in personas.values()
            for question in questions
        ]
    )


def check_vocabulary(model: Qwen2, tokenizer: ChatTokenizer) -> None:
    """UserError where the tokenizer knows ids that the model has no embedding for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}; "
            "name the model's own tokenizer"
        )


def check_positions(model: Qwen2, prompts: Sequence[np.ndarray], new: int) -> None:
    """UserError where a prompt and so many new tokens are more than the model has positions for."""
    longest, most = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + new > most:
        raise UserError(
            f"a persona's prompt with a question has {longest:,} tokens{f' and is to get {new} more' if new else ''}; "
            f"the model was made for {most:,}: shorten the longest of them"
        )


# ---------------------------------------------------------------- the forward passes


def common_prefixes(ids: Sequence[np.ndarray], group: int) -> list[int]:
    """How many first tokens every `group` consecutive prompts share; at least a token of each prompt is left over."""
    return [_common_prefix(ids[start : start + group]) for start in range(0, len(ids), group)]


def _common_prefix(group: Sequence[np.ndarray]) -> int:
    most = min(len(prompt) for prompt in group) - 1
    differs = np.zeros(most, dtype=bool)
    for prompt in group[1:]:
        differs |= prompt[:most] != group[0][:most]
    return int(differs.argmax()) if differs.any() else most


def residuals(
    model: Qwen2,
    ids: Sequence[np.ndarray],
    read: Sequence[slice],
    questions: int,
    layers: Sequence[int],
    pack_tokens: int,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """For each of the P * Q documents the mean residual over its last tokens, `read`: (P * Q, D) fp32 a layer.

    The documents of a persona follow each other, `questions` each.
    """
    assert all(s.stop == len(x) for x, s in zip(ids, read, strict=True)), "what is read ends with the document"
    # A prefix ends before the first token that is read.
    prefix = common_prefixes([x[: s.start + 1] for x, s in zip(ids, read, strict=True)], questions)
    longest, blocks = max(prefix), max(layers) + 1
    cache = Cache(model, len(prefix), max(longest, 1), blocks)
    begun = [(persona, ids[persona * questions][:length]) for persona, length in enumerate(prefix) if length]
    for group in split([len(tokens) for _, tokens in begun], pack_tokens):
        pack = make_pack([begun[i][1] for i in group]).to(model.device)
        slots = torch.tensor([begun[i][0] for i in group], device=model.device)
        model(pack, stop_after=max(layers), scopes=cache.filling(pack, slots))

    samples = {layer: torch.empty(len(ids), model.config.hidden_size) for layer in layers}
    rest = [tokens[prefix[i // questions] :] for i, tokens in enumerate(ids)]
    # Like lengths together: the portable attention lays documents out side by side.
    by_length = sorted(range(len(rest)), key=lambda i: len(rest[i]))
    done = 0
    for group in split([len(rest[i]) for i in by_length], pack_tokens):
        chosen = [by_length[k] for k in group]
        personas = [i // questions for i in chosen]
        pack = make_pack([rest[i] for i in chosen], first_positions=[prefix[p] for p in personas]).to(model.device)
        slots, kept = torch.tensor([personas, [prefix[p] for p in personas]], device=model.device)
        tails = Tails(pack, [read[i].stop - read[i].start for i in chosen])
        recorded: dict[int, Tensor] = {}
        taps = {layer: _recorder(recorded, layer, tails, last=layer == max(layers)) for layer in layers}
        scopes = cache.continuing(pack, slots, kept, longest)
        model(pack, taps=taps, stop_after=max(layers), scopes=scopes, last_rows=tails.rows)
        for layer in layers:
            samples[layer][chosen] = recorded[layer].cpu()
        done += len(chosen)
        if progress is not None:
            progress(done, len(ids))
    return samples


class Tails:
    """The last tokens of each document of a pack: those that are read."""

    def __init__(self, pack: Pack, counts: Sequence[int]) -> None:
        count = torch.tensor(counts, device=pack.boundaries.device)  # (S,)
        edges = F.pad(count.cumsum(0), (1, 0))  # (S+1,)
        self._count = count
        self._document = torch.repeat_interleave(torch.arange(len(counts), device=count.device), count)  # (N,)
        before_end = edges[1:][self._document] - torch.arange(
            len(self._document), device=count.device
        )  # (N,) to the end
        self.rows = pack.boundaries[1:].long()[self._document] - before_end  # (N,) of the stream

    def mean(self, h: Tensor) -> Tensor:
        """h (N, D) at `rows` -> the mean over each document's, (S, D) fp32."""
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        total = wide.new_zeros(len(self._count), h.shape[1]).index_add_(0, self._document, wide)
        return (total / self._count[:, None]).float()


def _recorder(recorded: dict[int, Tensor], layer: int, tails: Tails, last: bool) -> Tap:
    def record(h: Tensor) -> Tensor:
        recorded[layer] = tails.mean(h if last else h[tails.rows])  # (S, D)
        return h

    return record


# ---------------------------------------------------------------- Method B's responses


def _respond(
    model: Qwen2, tokenizer: ChatTokenizer, prompts: Sequence[np.ndarray], progress: Progress | None
) -> list[np.ndarray]:
    """The greedy response to every prompt, without its stop token."""
    total, done = 2 * len(prompts), 0

    def count(index: int, completion: Completion) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    completions = generate(
        model,
        [Request(prompt, RESPONSE_TOKENS) for prompt in prompts],
        stop=tokenizer.stop_tokens,
        on_done=count,
    )
    return [completion.ids for completion in completions]


def _second_half(progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda done, total: progress(total + done, 2 * total)
