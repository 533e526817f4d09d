"""transformers + peft on the steps that ours takes: as they are usually driven, and as an expert sets them up.

    naive      padded micro-batches, masked scaled_dot_product_attention, transformers' own loss, nothing compiled
    strongest  packs without padding, torch's flash attention within documents, Liger's fused linear cross-entropy,
               compiled blocks, each recomputed as a whole where activations are checkpointed, fused AdamW

Both have the same weights, documents and supervised tokens as ours, one normalisation a step, fp32 adapters of the
registered recipe under bf16 autocast, and the same schedule, clipping and decay. Adapters start from other random
values of A and drop out other channels. At the first step neither matters to the loss, because B is 0.

T = tokens of a pack, H/K = query/key heads, d = channels of a head
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipersona.chat import Document
from minipersona.config import LoraConfig, TrainingSection
from minipersona.corpus.batch import RowOrder, make_packs
from minipersona.model.attention import Spans, attention
from minipersona.model.pack import IGNORE, make_pack, send
from minipersona.training.optimizer import learning_rate

NAMES = {
    "strongest": "transformers + peft: packed, flash attention, Liger's loss, compiled",
    "naive": "transformers + peft: padded",
}
NEEDED = {"strongest": ("transformers", "peft", "liger_kernel"), "naive": ("transformers", "peft")}
PACKED = "packed"  # what transformers calls the attention that is registered here
RECIPE, SEED = TrainingSection(), 42
Inputs = dict[str, Any]  # of one forward pass


def missing(peer: str) -> list[str]:
    """The packages that a peer needs and that are not installed."""
    return [name for name in NEEDED[peer] if importlib.util.find_spec(name) is None]


@dataclass
class Peer:
    """A model with its adapters, and how it goes through documents."""

    model: Any
    passes: Callable[[Sequence[Document]], list[Inputs]]  # of a step's documents
    fused: bool  # AdamW as one kernel
    control: Callable[[Sequence[Document]], list[Inputs]] | None = None  # passes in which documents see each other

    @property
    def learned(self) -> list[nn.Parameter]:
        """The adapters' matrices."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def losses(self, passes: Sequence[Inputs], supervised: int) -> Iterator[Tensor]:
        """The loss of each pass; together they are the mean over so many supervised tokens."""
        device = self.learned[0].device
        count = send(torch.tensor(supervised), device)
        for inputs in passes:
            inputs = {name: send(x, device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = self.model(**inputs, num_items_in_batch=count, use_cache=False).loss
            yield loss

    def gradients(self, documents: Sequence[Document]) -> Tensor:
        """Add the gradients of a step's documents to the adapters'; the loss, ()."""
        supervised = sum(int(document.supervised.sum()) for document in documents)
        total = torch.zeros((), device=self.learned[0].device)
        for loss in self.losses(self.passes(documents), supervised):
            loss.backward()
            total += loss.detach()
        return total


def drive(peer: Peer, documents: Sequence[Document], steps: range, untimed: int, deadline: float) -> dict[str, Any]:
    """Train for `steps`, of which the first `untimed` are not timed; fewer once the clock passes `deadline`.

    deadline  by time.monotonic()
    """
    order = RowOrder(len(documents), RECIPE.batch, SEED)
    optimizer = torch.optim.AdamW(
        peer.learned, betas=(RECIPE.beta1, RECIPE.beta2), eps=RECIPE.epsilon, weight_decay=RECIPE.weight_decay,
        fused=peer.fused or None,  # None: torch's default, a few kernels for all tensors
    )  # fmt: skip
    losses, tokens, begun, first_step = [], 0, time.monotonic(), 0.0
    for step in steps:
        if step == steps[untimed]:
            torch.cuda.synchronize()
            started, tokens = time.monotonic(), 0
        rows = [documents[row] for row in order.step(step)]
        losses.append(peer.gradients(rows))
        nn.utils.clip_grad_norm_(peer.learned, RECIPE.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, RECIPE.learning_rate, RECIPE.steps, RECIPE.warmup)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(map(len, rows))
        if step == steps[0]:
            torch.cuda.synchronize()
            first_step = time.monotonic() - begun
        if step >= steps[untimed] and time.monotonic() > deadline:
            break
    torch.cuda.synchronize()
    return {
        "tokens_per_second": tokens / (time.monotonic() - started),
        "first_step": first_step,
        "losses": torch.stack(losses).tolist(),
    }


def document_losses(
    peer: Peer, documents: Sequence[Document], passes: Callable[[Sequence[Document]], list[Inputs]]
) -> Tensor:
    """The mean loss of each document's supervised tokens, from passes over all documents: (S,) on the CPU."""
    found = []
    for one in documents:
        alone = [
            each if each is one else replace(each, supervised=np.zeros_like(each.supervised)) for each in documents
        ]
        found.append(sum(float(loss.detach()) for loss in peer.losses(passes(alone), int(one.supervised.sum()))))
    return torch.tensor(found)


@contextlib.contextmanager
def naive(model: Any, checkpointing: bool, micro: int) -> Iterator[Peer]:
    """`model` with adapters for the time of the context, in padded micro-batches of so many documents."""
    adapted = adapters(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()

    def passes(documents: Sequence[Document]) -> list[Inputs]:
        return [padded(documents[start : start + micro]) for start in range(0, len(documents), micro)]

    try:
        yield Peer(adapted.train(), passes, fused=False)
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        adapted.unload()


@contextlib.contextmanager
def strongest(model: Any, checkpointing: bool, pack_tokens: int) -> Iterator[Peer]:
    """`model` with adapters for the time of the context, in packs of at most so many tokens.

    On a CPU, where Liger's kernels do not run, transformers' own loss takes the place of its.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, within_documents)
    before, blocks = model.config._attn_implementation, list(model.model.layers)
    adapted = adapters(model)

    def passes(documents: Sequence[Document], apart: bool = True) -> list[Inputs]:
        return [packed(group, apart) for group in grouped(documents, pack_tokens)]

    try:
        model.set_attn_implementation(PACKED)
        if model.device.type == "cuda":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance  # transformers' own Trainer calls it

            # The loss alone: the compiler fuses the rest, which separate kernels would break into parts.
            _apply_liger_kernel_to_instance(model=model, rope=False, rms_norm=False, swiglu=False)
        torch.compiler.reset()  # what was compiled for other models would be guarded against at every call
        for index, block in enumerate(blocks):
            block.compile(dynamic=True)
            model.model.layers[index] = Checkpointed(block) if checkpointing else block
        with torch._dynamo.config.patch(recompile_limit=64):
            yield Peer(adapted.train(), passes, fused=True, control=partial(passes, apart=False))
    finally:
        for index, block in enumerate(blocks):
            block._compiled_call_impl = None
            model.model.layers[index] = block
        vars(model).pop("forward", None)  # Liger's; the class's own is back
        model.set_attn_implementation(before)
        adapted.unload()
        torch.compiler.reset()


class Checkpointed(nn.Module):
    """A compiled block that is recomputed in the backward pass. Compiled together, torch 2.11 cannot part the two."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """What the block gives."""
        return checkpoint(self.block, *inputs, use_reentrant=False, **settings)


def adapters(model: Any) -> Any:
    """peft's model around `model`: the registered adapters, in fp32."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    recipe = LoraConfig()
    config = PeftConfig(
        r=recipe.rank, lora_alpha=int(recipe.alpha), lora_dropout=recipe.dropout, target_modules=list(recipe.targets)
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return adapted


def within_documents(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, cu_seq_lens_q: Tensor, max_length_q: int, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers asks for it: query (1, H, T, d); key, value (1, K, T, d) -> (1, T, H, d)."""
    spans = Spans(cu_seq_lens_q, max_length_q)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention(q, k, v, spans, spans)[None], None


def grouped(documents: Sequence[Document], pack_tokens: int) -> list[list[Document]]:
    """The documents of each pack, as ours has them."""
    packs = make_packs(documents, range(len(documents)), pack_tokens)
    return [[documents[row] for row in pack.documents.tolist()] for pack in packs]


def packed(documents: Sequence[Document], apart: bool = True) -> Inputs:
    """The arguments of a pass over documents laid end to end; not `apart`, they are one document."""
    pack = make_pack([document.ids for document in documents], [document.supervised for document in documents])
    labels = torch.cat([torch.tensor([IGNORE]), pack.targets[:-1]])  # transformers shifts them back
    boundaries, longest, positions = pack.boundaries, pack.longest, pack.positions
    if not apart:
        boundaries, longest, positions = boundaries[[0, -1]], pack.tokens, torch.arange(pack.tokens)
    return {
        "input_ids": pack.ids[None],
        "position_ids": positions[None],
        "labels": labels[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def padded(documents: Sequence[Document]) -> Inputs:
    """The arguments of a pass over documents as rows, each as long as the longest."""
    ids = torch.zeros(len(documents), max(map(len, documents)), dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, document in enumerate(documents):
        tokens = torch.from_numpy(document.ids.astype("int64"))
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(document.supervised), tokens, IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
