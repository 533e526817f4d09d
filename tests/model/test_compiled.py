"""What the compiler is handed: one graph for all blocks and pack sizes, and no number as a tensor.

The graphs are caught before they become code, so this needs neither a GPU nor a C++ compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minipersona.config import LoraConfig
from minipersona.model import joined
from minipersona.model.adapter import low_one_by_one, low_together
from minipersona.model.config import ModelConfig
from minipersona.model.dropout import token_keys
from minipersona.model.lora import apply_lora, remove_lora
from minipersona.model.network import EMBEDDING, Qwen2
from minipersona.model.pack import Pack, make_pack

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")

SIZES = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False,
)  # fmt: skip


class Alone:
    """A scope in which a token sees itself alone: the portable attention cannot be traced in one piece."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + (k + v).repeat_interleave(2, dim=1)


def learning_model() -> Qwen2:
    model = Qwen2(SIZES)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return apply_lora(model, LoraConfig(rank=2, alpha=4.0, dropout=0.1))


def gradients(model: Qwen2, packs: list[Pack], checkpointed: bool, supervised_alone: bool = False) -> list[Tensor]:
    learned = [p for p in model.parameters() if p.requires_grad]
    for pack in packs:
        keys = token_keys(0, 1, pack)
        rows = pack.supervised if supervised_alone else None
        states = model(
            pack, dropout_keys=keys, checkpoint_activations=checkpointed, scopes=[Alone()] * 3, last_rows=rows
        )
        states = states if supervised_alone else states[pack.supervised]
        states.square().sum().backward()
    found = [p.grad for p in learned]
    model.zero_grad()
    return found  # type: ignore[return-value]


class Caught:
    """The forward graphs that were compiled."""

    def __init__(self, model: Qwen2) -> None:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        self.graphs: list[Any] = []
        torch._dynamo.reset()
        backend = aot_autograd(
            fw_compiler=self._catch, bw_compiler=self._pass, partition_fn=min_cut_rematerialization_partition
        )
        for block in model.model.layers:
            block.compile(dynamic=True, backend=backend)

    def _catch(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return self._pass(graph, inputs)

    def _pass(self, graph: Any, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)

    def between(self) -> list[Tensor]:
        """What goes into the graphs and comes out, and so has to exist as tensors."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        ends = [node for node in nodes if node.op == "placeholder"]
        ends += [node for out in nodes if out.op == "output" for node in out.args[0] if hasattr(node, "meta")]
        return [node.meta["val"] for node in ends if isinstance(node.meta.get("val"), torch.Tensor)]


PACKS = [
    make_pack([np.arange(n) for n in lengths], [np.arange(n) > 1 for n in lengths])
    for lengths in ((5, 9), (5,), (9, 2, 4))  # no size is a width of the model
]


@pytest.mark.parametrize("supervised_alone", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("low", [low_one_by_one, low_together], ids=["as on a CPU", "as on CUDA"])
def test_one_graph_for_all_blocks_and_sizes(
    supervised_alone: bool, checkpointed: bool, low: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients(learning_model(), PACKS, checkpointed)
    monkeypatch.setattr(joined, "low_one_by_one", low)
    model = learning_model()
    model.compile_blocks()
    caught = Caught(model)
    ours = gradients(model, PACKS, checkpointed, supervised_alone)
    assert len(caught.graphs) == 1 + supervised_alone  # the last block leaves rows out
    assert all(tensor.ndim for tensor in caught.between())
    if not checkpointed:  # where a pass keeps nothing but what goes into a block
        assert not any(tensor.dtype == torch.bool for tensor in caught.between())  # dropout's masks
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_pass_in_which_nothing_learns_keeps_nothing() -> None:
    model = remove_lora(learning_model()).requires_grad_(False)
    model.compile_blocks()
    Caught(model)
    embedded: list[Tensor] = []
    states = model(PACKS[0], taps={EMBEDDING: lambda h: embedded.append(h) or h}, scopes=[Alone()] * 3)
    assert not states.requires_grad
    model = learning_model()
    model.compile_blocks()
    Caught(model)
    assert model(PACKS[0], taps={EMBEDDING: lambda h: embedded.append(h) or h}, scopes=[Alone()] * 3).requires_grad
    assert not any(h.requires_grad for h in embedded)  # a caller's tensor is left as it is


def test_control_the_first_block_would_be_a_graph_of_its_own() -> None:
    model = learning_model()
    model.compile_blocks()
    model.compiled = False
    caught = Caught(model)
    gradients(model, PACKS, False)
    assert len(caught.graphs) == 2


def test_control_numbers_would_be_tensors_and_masks_be_kept() -> None:
    from torch._functorch import config as functorch

    model = learning_model()
    model.compile_blocks()
    with torch._dynamo.config.patch(specialize_float=False), functorch.patch(ban_recompute_used_far_apart=True):
        caught = Caught(model)
        gradients(model, PACKS, False)
    assert any(tensor.ndim == 0 for tensor in caught.between())
    assert any(tensor.dtype == torch.bool for tensor in caught.between())
