"""The local judge: the untouched base model reads the answers. It costs nothing and needs no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipersona.behaviour.judge import Case, Score, prompts_digest
from minipersona.behaviour.numbers import Path, number_tree, score_numbers
from minipersona.behaviour.weights import weights_digest
from minipersona.chat import ChatTokenizer
from minipersona.config import LARGE_PASS
from minipersona.model.cache import Cache
from minipersona.model.lora import adapter_disabled
from minipersona.model.network import Qwen2
from minipersona.model.pack import make_pack, split

CASES_AT_A_TIME = 64  # whose keys and values are kept; also the most scores that a kill can cost


class LocalJudge:
    """`model` without its adapters. Of a model whose weights were all trained, give its base instead."""

    def __init__(self, model: Qwen2, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.numbers = number_tree(tokenizer)
        with adapter_disabled(model):
            weights = weights_digest(model)
        self._identity = {
            "kind": "local",
            "model": model.source.get("name"),
            "revision": model.source.get("revision"),
            "weights": weights,
            "tokenizer": tokenizer.digest,
            "prompts": prompts_digest(),
        }

    @property
    def identity(self) -> dict[str, str | None]:
        """The base model by its name, and by a digest of its weights."""
        return self._identity

    def score(self, cases: Sequence[Case], done: Callable[[int, Score], None]) -> None:
        """One pass over the prompts of some cases at a time, and short ones for the digits that follow."""
        for first in range(0, len(cases), CASES_AT_A_TIME):
            batch = cases[first : first + CASES_AT_A_TIME]
            prompts = [self.tokenizer.encode_prompt([{"role": "user", "content": c.prompt}]).ids for c in batch]
            with adapter_disabled(self.model):
                scores = score_numbers(Continuations(self.model, prompts), len(prompts), self.numbers)
            for index, score in enumerate(scores, first):
                done(index, score)


class Continuations:
    """The logits of the token that follows a prompt and some tokens more. Each prompt is computed once, and first."""

    def __init__(self, model: Qwen2, prompts: Sequence[np.ndarray]) -> None:
        self.model, self.prompts = model, prompts
        self.lengths = [len(prompt) for prompt in prompts]
        self.cache = Cache(model, len(prompts), max(self.lengths))

    @torch.no_grad()
    def __call__(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        """(S, V) fp32 for S paths at a time, in their order; either none or all of them go on from their prompt."""
        for group in self._groups(paths):
            chosen = [paths[i] for i in group]
            slots = torch.tensor([path.prompt for path in chosen], device=self.model.device)
            kept = [self.lengths[path.prompt] for path in chosen]
            if paths[0].ids:
                pack = make_pack([np.array(path.ids) for path in chosen], first_positions=kept).to(self.model.device)
                prefixes = torch.tensor(kept, device=self.model.device)
                scopes: Any = self.cache.continuing(pack, slots, prefixes, max(kept))
            else:
                pack = make_pack([self.prompts[path.prompt] for path in chosen]).to(self.model.device)
                scopes = self.cache.filling(pack, slots)
            yield self.model.lm_head(self.model(pack, scopes=scopes)[pack.last]).float()

    def _groups(self, paths: Sequence[Path]) -> list[list[int]]:
        if self.model.device.type == "cpu":  # a prompt by itself: its score is the same to the bit in any company
            return [list(group) for _, group in groupby(range(len(paths)), key=lambda i: paths[i].prompt)]
        return split([self.lengths[path.prompt] + len(path.ids) for path in paths], LARGE_PASS)
