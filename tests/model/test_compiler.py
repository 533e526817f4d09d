"""What the compiler is given: one graph for all blocks and pack sizes, no number as a tensor, and settings that are
gone afterwards.

The graphs are caught before they become code, so this needs neither a GPU nor a C++ compiler.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minipersona.config import LoraConfig
from minipersona.model.acceleration import fused_linear
from minipersona.model.acceleration.compiler import (
    DYNAMO,
    FUNCTORCH,
    INDUCTOR,
    compile_blocks,
    compile_function,
    without_compiler,
)
from minipersona.model.acceleration.fused_linear import to_rank_at_once, to_rank_one_by_one
from minipersona.model.config import ModelConfig
from minipersona.model.dropout import token_keys
from minipersona.model.lora import apply_lora, remove_lora
from minipersona.model.network import EMBEDDING, Qwen2
from minipersona.model.pack import Pack, make_pack

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")

SIZES = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False,
    head_dim=8,
)  # fmt: skip


class Alone:
    """A scope in which a token sees itself alone: the portable attention cannot be traced in one piece."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + (k + v).repeat_interleave(2, dim=1)


def learning_model(*targets: str) -> Qwen2:
    """With adapters everywhere, or on these projections alone: what is traced grows with them."""
    model = Qwen2(SIZES)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.1)
    return apply_lora(model, replace(config, targets=targets) if targets else config)


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
    """The forward graphs that torch.compile makes from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        self.graphs: list[Any] = []
        torch._dynamo.reset()
        backend = aot_autograd(
            fw_compiler=self._catch, bw_compiler=self._pass, partition_fn=min_cut_rematerialization_partition
        )
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

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


# With rows left out, the blocks before the last one are the graph of a pass that leaves none out. So of the latter the
# tests of every day have one, which shows that the last block then shares that graph. Of the former they have two, in
# which each form of the product and each way of keeping occurs.
EVERY_DAY = [(True, False, to_rank_one_by_one), (True, True, to_rank_at_once), (False, False, to_rank_at_once)]
VARIANTS = [
    pytest.param(
        alone, checkpointed, to_rank, id=f"{'supervised' if alone else 'all'}-{checkpointed}-{name}",
        marks=[] if (alone, checkpointed, to_rank) in EVERY_DAY else [pytest.mark.slow],
    )
    for alone in (False, True)
    for checkpointed in (False, True)
    for name, to_rank in (("as on a CPU", to_rank_one_by_one), ("as on CUDA", to_rank_at_once))
]  # fmt: skip


@pytest.mark.parametrize("supervised_alone, checkpointed, to_rank", VARIANTS)
def test_one_graph_for_all_blocks_and_sizes(
    supervised_alone: bool, checkpointed: bool, to_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients(learning_model(), PACKS, checkpointed)
    monkeypatch.setattr(fused_linear, "to_rank_one_by_one", to_rank)
    model = learning_model()
    caught = Caught(monkeypatch)
    compile_blocks(model)
    ours = gradients(model, PACKS, checkpointed, supervised_alone)
    assert len(caught.graphs) == 1 + supervised_alone  # the last block leaves rows out
    assert all(tensor.ndim for tensor in caught.between())
    if not checkpointed:  # where a pass keeps nothing but what goes into a block
        assert not any(tensor.dtype == torch.bool for tensor in caught.between())  # dropout's masks
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_pass_in_which_nothing_learns_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Caught(monkeypatch)
    model = remove_lora(learning_model("q_proj")).requires_grad_(False)
    compile_blocks(model)
    embedded: list[Tensor] = []
    states = model(PACKS[0], taps={EMBEDDING: lambda h: embedded.append(h) or h}, scopes=[Alone()] * 3)
    assert not states.requires_grad
    model = learning_model("q_proj")
    compile_blocks(model)
    assert model(PACKS[0], taps={EMBEDDING: lambda h: embedded.append(h) or h}, scopes=[Alone()] * 3).requires_grad
    assert not any(h.requires_grad for h in embedded)  # a caller's tensor is left as it is


def test_leaving_rows_out_is_not_compiled_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    caught = Caught(monkeypatch)
    model = learning_model("q_proj")
    compile_blocks(model)
    rows = PACKS[0].supervised
    with torch.no_grad():
        ours = model(PACKS[0], scopes=[Alone()] * 3, last_rows=rows)
        assert len(caught.graphs) == 1  # the other blocks'
        assert torch.allclose(
            ours, learning_model("q_proj")(PACKS[0], scopes=[Alone()] * 3)[rows], rtol=1e-4, atol=1e-6
        )
    model(PACKS[0], scopes=[Alone()] * 3, last_rows=rows)
    assert len(caught.graphs) == 3  # the control: where something learns it is


def test_without_the_compiler_a_model_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    caught = Caught(monkeypatch)
    model = learning_model("q_proj")
    compile_blocks(model)
    with without_compiler(model):
        model(PACKS[0], scopes=[Alone()] * 3)
    assert not caught.graphs
    model(PACKS[0], scopes=[Alone()] * 3)
    assert caught.graphs  # the control


def test_control_the_first_block_would_be_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learning_model("q_proj")
    caught = Caught(monkeypatch)
    compile_blocks(model)
    for block in model.blocks:
        block._compiled_call_impl = torch.compile(block._call_impl, dynamic=True)
    gradients(model, PACKS, False)
    assert len(caught.graphs) == 2


def test_control_numbers_would_be_tensors_and_masks_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DYNAMO, "specialize_float", False)
    monkeypatch.setitem(FUNCTORCH, "ban_recompute_used_far_apart", True)
    caught = Caught(monkeypatch)
    model = learning_model()
    compile_blocks(model)
    gradients(model, PACKS, False)
    assert any(tensor.ndim == 0 for tensor in caught.between())
    assert any(tensor.dtype == torch.bool for tensor in caught.between())


def test_a_copy_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    caught = Caught(monkeypatch)
    model = learning_model("q_proj")
    compile_blocks(model)
    copied = copy.deepcopy(model)
    copied(PACKS[0], scopes=[Alone()] * 3)
    assert not caught.graphs
    model(PACKS[0], scopes=[Alone()] * 3)
    assert caught.graphs  # the control


def found_settings() -> dict[str, Any]:
    """Every setting that `compiler.py` changes, as it is now."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    inductor_now = inductor.get_config_copy()
    return {
        **{key: getattr(dynamo, key) for key in DYNAMO},
        **{key: getattr(functorch, key) for key in FUNCTORCH},
        **{key: inductor_now[key] for key in INDUCTOR},
    }


OURS = {**DYNAMO, **FUNCTORCH, **INDUCTOR}


def scaled(x: Tensor, factor: float) -> Tensor:
    return (x * factor).sin()


class Seen:
    """A backend that notes the settings that hold, and the graph's inputs, when it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: bool = False) -> None:
        torch._dynamo.reset()
        self.settings: list[dict[str, Any]] = []
        self.options: list[dict[str, Any]] = []
        self.inputs: list[int] = []
        self.error = error
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=self))

    def __call__(self, graph: Any, inputs: list[Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
        if self.error:
            raise ValueError("a compiler that fails")
        self.settings.append(found_settings())
        self.options.append(options or {})
        self.inputs.append(sum(node.op == "placeholder" for node in graph.graph.nodes))
        return graph.forward  # type: ignore[no-any-return]


@pytest.mark.parametrize("where", ["this thread", "another"])
def test_settings_hold_while_compiling_and_no_longer(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = found_settings()
    assert all(before[key] != value for key, value in OURS.items())  # else this test would show nothing
    seen = Seen(monkeypatch)
    function = compile_function(scaled)
    assert found_settings() == before

    def work() -> None:
        assert torch.equal(function(torch.ones(4), 2.0), scaled(torch.ones(4), 2.0))

    if where == "another":  # the settings of a thread are its own
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert len(seen.settings) == 1 and seen.options == [INDUCTOR]
    assert seen.settings[0] == OURS
    assert found_settings() == before


def test_settings_are_restored_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = found_settings()
    Seen(monkeypatch, error=True)
    with pytest.raises(Exception, match="a compiler that fails"):
        compile_function(scaled)(torch.ones(4), 2.0)
    assert found_settings() == before


def test_what_is_compiled_beside_ours_sees_torchs_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees the other's settings, whichever came first, and neither is compiled again."""
    seen = Seen(monkeypatch)
    before = found_settings()
    ours = compile_function(scaled)

    def other(x: Tensor, factor: float) -> Tensor:
        return (x * factor).cos()

    theirs = torch.compile(other, dynamic=True)
    for size in (4, 5, 6):
        x = torch.ones(size)
        assert torch.equal(ours(x, 2.0), scaled(x, 2.0))
        assert torch.equal(theirs(x, 2.0), other(x, 2.0))
    assert len(seen.settings) == 2
    assert seen.settings[1] == before and seen.options[1] == {}
    assert seen.inputs[1] > seen.inputs[0]  # for them a number is an input; for us it is part of the code


def test_more_variants_than_torch_would_compile_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    function = compile_function(scaled)
    for factor in range(20):
        function(torch.ones(4), float(factor))
    assert len(seen.settings) == 20
    torch._dynamo.reset()
    monkeypatch.setitem(DYNAMO, "recompile_limit", found_settings()["recompile_limit"])
    function = compile_function(scaled)
    for factor in range(20):
        function(torch.ones(4), float(factor))
    assert len(seen.settings) < 40  # the control
