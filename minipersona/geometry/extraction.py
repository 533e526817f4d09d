"""Method A: the residual stream at the last token of the rendered prompt, for every persona and question.

P = personas, Q = questions, T = tokens of a pack, S = its documents, D = width
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from minipersona.chat import ChatTokenizer, Document
from minipersona.corpus.packing import pack_documents, split
from minipersona.errors import UserError
from minipersona.files import digest
from minipersona.geometry.vectors import PersonaVectors
from minipersona.model.network import Qwen2, Tap

PACK_TOKENS = 16_384


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
    pack_tokens: int = PACK_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> PersonaVectors:
    """Persona vectors (Chen et al. 2025 in the predecessor study's form): samples (P, Q, D) fp32 a layer.

    personas     name -> system prompt
    layers       layer L is the stream leaving decoder block L, blocks counted from 0 (hidden_states[L + 1])
    method       "A": system persona, user question, generation prompt; its last token; no response
    pack_tokens  most tokens of one forward pass
    progress     called with (prompts done, prompts in all) after each pack

    UserError for a layer that the model lacks, or a method other than A.
    """
    layers = check_layers(model, layers)
    if method != "A":
        raise UserError(f"method {method!r} is not available; use A")
    prompts = render_prompts(tokenizer, personas, questions)
    check_vocabulary(model, tokenizer)
    samples = {layer: torch.empty(len(prompts), model.config.hidden_size) for layer in layers}  # (P * Q, D)
    # Like lengths together: the portable attention lays documents out side by side.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done = 0
    for group in split([len(prompts[i]) for i in by_length], pack_tokens):
        chosen = [by_length[k] for k in group]
        pack = pack_documents([prompts[i] for i in chosen]).to(model.device)
        recorded: dict[int, Tensor] = {}
        taps = {layer: _recorder(recorded, layer, pack.last) for layer in layers}
        model(pack, taps=taps, stop_after=max(layers))
        for layer in layers:
            samples[layer][chosen] = recorded[layer].float().cpu()
        done += len(chosen)
        if progress is not None:
            progress(done, len(prompts))
    shape = (len(personas), len(questions), model.config.hidden_size)
    return PersonaVectors(
        samples={layer: rows.view(shape) for layer, rows in samples.items()},
        personas=list(personas),
        metadata={
            "method": method,
            "model": str(model.source.get("name")),
            "revision": str(model.source.get("revision")),
            "adapter": str(model.source.get("adapter")),
            "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
            "tokenizer_digest": tokenizer.digest,
            "prompt_digest": digest([d.ids.tolist() for d in prompts]),
            "system_prompts": json.dumps(list(personas.values()), ensure_ascii=False),
            "questions": json.dumps(list(questions), ensure_ascii=False),
        },
    )


def render_prompts(tokenizer: ChatTokenizer, personas: Mapping[str, str], questions: Sequence[str]) -> list[Document]:
    """The P * Q prompts, personas outermost."""
    return [
        tokenizer.encode_prompt([{"role": "system", "content": prompt}, {"role": "user", "content": question}])
        for prompt in personas.values()
        for question in questions
    ]


def check_vocabulary(model: Qwen2, tokenizer: ChatTokenizer) -> None:
    """UserError where the tokenizer knows ids that the model has no embedding for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}; "
            "name the model's own tokenizer"
        )


def _recorder(recorded: dict[int, Tensor], layer: int, last: Tensor) -> Tap:
    def record(h: Tensor) -> Tensor:
        recorded[layer] = h[last]  # (S, D)
        return h

    return record
