"""Padded to a bucket, through tensors that stay where they are: the same loss, gradients and weights.

On the CPU nothing is recorded, so what is tested is all that surrounds a recording. `python -m benchmarks.graphs`
compares recorded runs with others on a GPU, as does the last test where there is one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anchors import BOTH, KINDS, RESPONSES, anchored, step_batch, with_predictions
from conftest import relative_error
from torch import Tensor

from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, RunConfig, TrainingSection
from minipersona.corpus.batch import pack_documents
from minipersona.errors import UserError
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora, remove_lora
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack
from minipersona.objective.contexts import Anchored, Contexts
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.feature_and_kl import FeatureAndKL
from minipersona.objective.head import ForwardPass, Objective
from minipersona.objective.kl_on_prompts import KLOnPrompts
from minipersona.objective.kl_to_base import KLToBase
from minipersona.objective.r3f import R3F
from minipersona.run.resources import Resources, uses_graphs
from minipersona.run.train import make_deterministic
from minipersona.training import buckets
from minipersona.training import graphs as graphs_module
from minipersona.training import loop as loop_module
from minipersona.training.distributed import Distributed
from minipersona.training.graphs import Graphs
from minipersona.training.loop import Trainer, backward, steering_taps, train

CONFIG = RunConfig(
    data=DataSection("-", "-"),
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2),
    training=TrainingSection(steps=3, batch=8, checkpoints=(), learning_rate=1e-2),
    execution=ExecutionSection(checkpoint_activations=False),
)
OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": CrossEntropy(),
    "kl_to_base": KLToBase(0.3, "symmetric"),
    "r3f": R3F(0.3, "normal", 1e-2),
}
EACH_OBJECTIVE = pytest.mark.parametrize("kind", [*OBJECTIVES, *KINDS])
SINGLE_PROCESS = Distributed(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable attention computes as many rows as the longest document has, which is 24 tokens here."""
    monkeypatch.setattr(buckets, "SHORTEST", 32)
    monkeypatch.setattr(buckets, "TOKENS", 64)


def objective_of(kind: str, base: Qwen2) -> Objective:
    """`base` is in its first state: nothing is attached."""
    return OBJECTIVES[kind] if kind in OBJECTIVES else anchored(kind, 0.7, base)


def packs_of(objective: Objective, documents: list[Document]) -> list[Pack]:
    """One of rows, and an anchor's contexts."""
    return step_batch(objective, documents).packs if isinstance(objective, Anchored) else [pack_documents(documents)]


def adapted(directory: Path, dtype: torch.dtype) -> Qwen2:
    model = apply_lora(load_model(str(directory), dtype=dtype, device="cpu"), CONFIG.lora)
    generator = torch.Generator().manual_seed(3)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B, 0, 0.1, generator=generator)
    return model


def step_gradients(
    directory: Path, documents: list[Document], dtype: torch.dtype, kind: str, *, padded: bool, full: bool = False
) -> list[Tensor]:
    """Summed terms and gradients of one steered step."""
    base = load_model(str(directory), dtype=dtype, device="cpu")
    model = load_model(str(directory), dtype=dtype, device="cpu").requires_grad_(True)
    objective = objective_of(kind, base)
    if not full:
        model = adapted(directory, dtype)
    else:
        model.blocks[0].mlp.down_proj.weight.data.mul_(1.5)  # the base, which an anchor holds, is another model
        if isinstance(objective, KLOnPrompts):
            objective = replace(objective, head=base.lm_head.weight)
    learned = [p for p in model.parameters() if p.requires_grad]
    graphs = Graphs(model)
    graphs.layout(learned).zero()
    run = ForwardPass(42, 7, steering_taps({1: torch.linspace(-1, 1, 48)}, model))
    one_pack = graphs.backward if padded else backward
    objective = graphs.objective(objective)
    terms = sum(one_pack(model, pack, objective, run) for pack in packs_of(objective, documents))
    return [terms, *(p.grad for p in learned if p.grad is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@EACH_OBJECTIVE
def test_padding_changes_no_loss_and_no_gradient(
    hf_model: Callable[..., Path], documents: list[Document], dtype: torch.dtype, bound: float, kind: str, full: bool
) -> None:
    plain = step_gradients(hf_model(), documents[:16], dtype, kind, padded=False, full=full)
    padded = step_gradients(hf_model(), documents[:16], dtype, kind, padded=True, full=full)
    assert len(plain) == len(padded) == 1 + (39 if full else 42)
    for ours, theirs in zip(padded, plain, strict=True):
        assert relative_error(ours, theirs) < bound


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@EACH_OBJECTIVE
def test_adapters_that_are_cast_at_once_have_the_gradients_of_those_cast_at_use_to_the_bit(
    hf_model: Callable[..., Path], documents: list[Document], kind: str, recompute: bool
) -> None:
    objective = objective_of(kind, load_model(str(hf_model()), dtype=torch.bfloat16, device="cpu"))
    found = []
    for at_once in (True, False):
        model = adapted(hf_model(), torch.bfloat16)
        learned = [p for p in model.parameters() if p.requires_grad]
        graphs = Graphs(model)
        graphs.layout(learned).zero()
        run = ForwardPass(42, 7, checkpoint_activations=recompute)
        for pack in packs_of(objective, documents[:16]):
            if at_once:
                graphs.backward(model, pack, objective, run)
            else:
                backward(model, buckets.pad(pack, buckets.bucket_of(pack)), objective, run)
        assert {p.dtype for p in learned} == {torch.float32}
        assert all(p is q for p, q in zip(learned, (p for p in model.parameters() if p.requires_grad), strict=True))
        found.append([p.grad for p in learned])
    assert sum(map(torch.count_nonzero, found[0])) > 1000  # type: ignore[arg-type]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))  # type: ignore[arg-type]


def test_control_padding_that_is_supervised_changes_them(
    hf_model: Callable[..., Path], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = step_gradients(hf_model(), documents[:16], torch.float64, "cross_entropy", padded=False)
    monkeypatch.setattr(buckets, "IGNORE", 0)
    padded = step_gradients(hf_model(), documents[:16], torch.float64, "cross_entropy", padded=True)
    assert min(relative_error(ours, theirs) for ours, theirs in zip(padded, plain, strict=True)) > 1e-3


# ---------------------------------------------------------------- whole runs


def trained(
    model: Qwen2, documents: list[Document], out: Path, config: RunConfig, steering: Tensor, graphs: Graphs | None
) -> list[Tensor]:
    train(Trainer(remove_lora(model), documents, config, out, SINGLE_PROCESS, steering={1: steering}, graphs=graphs))
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@EACH_OBJECTIVE
def test_runs_that_share_graphs_train_the_weights_that_each_trains_alone(
    hf_model: Callable[..., Path],
    documents: list[Document],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of other seeds, ranks, scales, rates and steering vectors, and then the first one again."""
    monkeypatch.setattr(loop_module, "make_objective", lambda model, *_: objective_of(kind, model))
    first = replace(CONFIG, execution=replace(CONFIG.execution, pack_tokens=60))
    configs = [
        first,
        replace(first, seed=43),
        replace(first, lora=replace(first.lora, rank=2)),
        replace(first, lora=replace(first.lora, alpha=4.0), training=replace(first.training, learning_rate=5e-3)),
        first,
    ]
    model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    shared = Graphs(model)
    ends: list[list[Tensor]] = []
    for number, config in enumerate(configs):
        steering = torch.linspace(-1, 1, 48) * (number % 4 + 1)
        alone = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
        ends.append(trained(model, documents, tmp_path / f"shared-{number}", config, steering, shared))
        expected = trained(alone, documents, tmp_path / f"alone-{number}", config, steering, None)
        for ours, theirs in zip(ends[-1], expected, strict=True):
            assert relative_error(ours, theirs) < 1e-10
    # Three kinds, of at most two buckets of rows, two of prompts and four of responses.
    contexts = {**dict.fromkeys(KINDS, 2), RESPONSES: 4, BOTH: 4}
    assert 2 <= len(shared._passes) <= 3 * (2 + contexts.get(kind, 0))
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[-1], strict=True))  # nothing is left of a run
    assert relative_error(ends[1][0], ends[0][0]) > 1e-2  # the control: these runs differ


def test_a_pack_whose_rows_fit_a_bucket_exactly_is_padded_by_documents_without_rows(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    """The states of none of them count, though the search for a document's first row ends at another one's."""
    model = adapted(hf_model(), torch.float64)
    base = load_model(str(hf_model(seed=1)), dtype=torch.float64, device="cpu")
    objective = anchored(BOTH, 0.7, base)
    pack = step_batch(objective, documents[:8]).packs[-1]
    rows = pack.supervised.numel()
    terms = backward(model, pack, objective, ForwardPass(42, 7))
    for more in (0, 1):
        bucket = replace(buckets.bucket_of(pack), supervised=rows + more)
        padded = backward(model, buckets.pad(pack, bucket), objective, ForwardPass(42, 7))
        assert relative_error(padded, terms) < 1e-10
    assert buckets.bucket_of(pack).documents > len(pack.documents) + 1  # so there are such documents
    # Nor does a context without a response, whose search ends in the next one: the untouched base has not moved.
    contexts = objective.contexts
    silent = [r if c % 3 else np.zeros_like(r) for c, r in enumerate(contexts.responses)]
    objective = replace(objective, contexts=replace(contexts, responses=silent))
    pack = step_batch(objective, documents[:8]).packs[-1]
    assert 0 in [c % 3 for c in pack.documents.tolist()[:-1]]
    assert abs(backward(base.requires_grad_(True), pack, objective, ForwardPass(42, 7))[2]) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_strengths_of_an_anchor_share_its_passes(
    hf_model: Callable[..., Path], documents: list[Document], kind: str
) -> None:
    model = adapted(hf_model(), torch.float64)
    graphs = Graphs(model)
    found = []
    for weight in (0.7, 2.1):
        graphs.layout([p for p in model.parameters() if p.requires_grad])
        objective = anchored(kind, weight, load_model(str(hf_model(seed=1)), dtype=torch.float64, device="cpu"))
        if isinstance(objective, FeatureAndKL):
            objective = replace(objective, kl_factor=2 * weight)
        pack = step_batch(objective, documents[:8]).packs[-1]
        expected = backward(model, pack, objective, ForwardPass(42, 7))
        found.append(graphs.backward(model, pack, graphs.objective(objective), ForwardPass(42, 7)).clone())
        assert relative_error(found[-1], expected) < 1e-10
    assert len(graphs._passes) == 1 and found[0][0] > 1e-3
    assert kind == BOTH or relative_error(found[1][0], 3 * found[0][0]) < 1e-10


def test_kl_over_prompts_and_over_responses_share_no_pass(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    model = adapted(hf_model(), torch.float64)
    base = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
    prompts = anchored("kl_on_prompts", 0.7, base)
    ends = [np.arange(len(ids)) == len(ids) - 1 for ids in prompts.contexts.ids]  # so few that the buckets are equal
    graphs = Graphs(model)
    graphs.layout([p for p in model.parameters() if p.requires_grad])
    found = []
    for contexts in (replace(prompts.contexts, responses=ends), prompts.contexts):
        objective = replace(prompts, contexts=with_predictions(contexts, base))
        pack = step_batch(objective, documents[:8]).packs[-1]
        expected = backward(model, pack, objective, ForwardPass(42, 7))
        found.append((buckets.bucket_of(pack), graphs.backward(model, pack, objective, ForwardPass(42, 7)).clone()))
        assert relative_error(found[-1][1], expected) < 1e-10
    assert found[0][0] == found[1][0] and relative_error(found[1][1], found[0][1]) > 1e-3  # the control


def test_contexts_of_another_number_share_no_pass_though_they_have_as_many_tokens(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    """Where a context's states begin is read from memory too."""
    model = adapted(hf_model(), torch.float64)
    base = load_model(str(hf_model(seed=1)), dtype=torch.float64, device="cpu")
    plain, ids = anchored("kl_on_prompts", 0.7, base), np.arange(144, dtype=np.int32) % 31
    graphs, packs = Graphs(model), []
    graphs.layout([p for p in model.parameters() if p.requires_grad])
    for count in (24, 36):
        contexts = replace(plain.contexts, ids=np.split(ids, count))
        objective = replace(plain, contexts=with_predictions(contexts, base))
        packs.append(step_batch(objective, documents[:8]).packs[-1])
        expected = backward(model, packs[-1], objective, ForwardPass(42, 7))
        found = graphs.backward(model, packs[-1], graphs.objective(objective), ForwardPass(42, 7))
        assert relative_error(found, expected) < 1e-10
    assert buckets.bucket_of(packs[0]) == buckets.bucket_of(packs[1])  # the control


def test_what_an_anchor_reads_is_kept_once_and_goes_with_the_passes_that_read_it(
    hf_model: Callable[..., Path], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(hf_model(), torch.float64)
    base = load_model(str(hf_model(seed=1)), dtype=torch.float64, device="cpu")
    objective = anchored(BOTH, 0.7, base)
    contexts = objective.contexts
    assert contexts.predicting is not None
    states = contexts.predicting.states
    longer = replace(contexts, predicting=replace(contexts.predicting, states=torch.cat([states, states])))
    graphs = Graphs(model)
    graphs.layout([p for p in model.parameters() if p.requires_grad])
    packs = step_batch(objective, documents[:8]).packs

    def go(contexts: Contexts) -> tuple[Contexts, list[object]]:
        shared = graphs.objective(replace(objective, contexts=contexts))
        assert isinstance(shared, Anchored)
        for pack in packs:
            graphs.backward(model, pack, shared, ForwardPass(42, 7))
        return shared.contexts, list(graphs._passes.values())

    first, passes = go(contexts)
    assert first.predicting is not None
    with monkeypatch.context() as patch:  # for the same shapes there is memory already
        patch.setattr(torch, "empty_like", lambda *_: pytest.fail("allocates"))
        patch.setattr(Tensor, "clone", lambda *_: pytest.fail("allocates"))
        graphs.objective(objective)
    assert go(contexts)[1] == passes and len(passes) == len(packs)
    gone = weakref.ref(first.predicting.states)
    again, others = go(longer)
    assert len(others) == len(packs) and not set(passes) & set(others)
    assert again.base[0] is first.base[0] and gone() is not None
    del first, passes
    assert gone() is None


def test_control_keys_of_an_earlier_step_train_other_weights(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph would do that reads what the step before has left."""

    def end(name: str) -> list[Tensor]:
        model = load_model(str(hf_model()), dtype=torch.float64, device="cpu")
        return trained(model, documents, tmp_path / name, CONFIG, torch.zeros(48), Graphs(model))

    expected = end("right")
    real = ForwardPass.keys
    monkeypatch.setattr(ForwardPass, "keys", lambda self, model, pack: real(replace(self, step=1), model, pack))
    assert relative_error(end("stale")[1], expected[1]) > 1e-3


def test_weights_that_were_moved_end_what_was_recorded(
    hf_model: Callable[..., Path], documents: list[Document]
) -> None:
    model = apply_lora(load_model(str(hf_model()), device="cpu"), CONFIG.lora)
    graphs = Graphs(model)
    graphs.layout([p for p in model.parameters() if p.requires_grad])

    def go() -> list[object]:
        for step in (1, 2):
            graphs.backward(model, pack_documents(documents[:16]), CrossEntropy(), ForwardPass(42, step))
        return list(graphs._passes.values())

    (first,) = go()
    assert go() == [first]
    norm = model.model.norm.weight
    norm.data = norm.data.clone()
    (second,) = go()
    assert second is not first


def test_no_more_than_so_many_are_kept(hf_model: Callable[..., Path], documents: list[Document]) -> None:
    model = apply_lora(load_model(str(hf_model()), device="cpu"), CONFIG.lora)
    graphs = Graphs(model, most=2)
    graphs.layout([p for p in model.parameters() if p.requires_grad])
    packs = [pack_documents(documents[:count]) for count in (4, 12, 20, 28)]
    sums = [graphs.backward(model, pack, CrossEntropy(), ForwardPass(42, 1)).clone() for pack in packs]
    assert len({buckets.bucket_of(pack) for pack in packs}) == 4 and len(graphs._passes) == 2
    assert graphs.recorded == 0  # a CPU records none
    expected = [backward(model, pack, CrossEntropy(), ForwardPass(42, 1)) for pack in packs]
    assert relative_error(torch.stack(sums), torch.stack(expected)) < 1e-5


def test_where_memory_runs_out_passes_are_freed_and_none_is_kept_from_then_on(
    hf_model: Callable[..., Path], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = apply_lora(load_model(str(hf_model()), device="cpu"), CONFIG.lora)
    graphs = Graphs(model)
    graphs.layout([p for p in model.parameters() if p.requires_grad])
    pack = pack_documents(documents[:4])
    expected = graphs.backward(model, pack, CrossEntropy(), ForwardPass(42, 1)).clone()
    assert len(graphs._passes) == 1  # the control

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(graphs_module._Pass, "compute", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            graphs.backward(model, pack, CrossEntropy(), ForwardPass(42, 1))
    assert torch.equal(graphs.backward(model, pack, CrossEntropy(), ForwardPass(42, 1)), expected)
    assert not graphs._passes


# ---------------------------------------------------------------- where they are used


def test_graphs_are_a_cuda_device_s() -> None:
    resources = Resources(torch.device("cpu"))
    base = replace(CONFIG, model=replace(CONFIG.model, name="tiny", dtype="float32"))

    def asked(wanted: str) -> object:
        return resources.graphs(replace(base, execution=ExecutionSection(graphs=wanted)))  # type: ignore[arg-type]

    assert asked("auto") is None and asked("off") is None
    with pytest.raises(UserError, match="only a CUDA device has graphs"):
        asked("on")
    with pytest.raises(UserError, match="the plain path has no graphs"):
        ExecutionSection(graphs="on", fused=False)


def test_graphs_are_used_where_kernels_are_short_and_compiled() -> None:
    def used(parameters: float, device: str = "cuda", **execution: Any) -> bool:
        config = replace(CONFIG, execution=ExecutionSection(**execution))
        sizes = SimpleNamespace(matmul_parameters=parameters)
        return uses_graphs(config, torch.device(device), sizes)  # type: ignore[arg-type]

    assert used(1e8) and not used(7e9) and not used(1e8, "cpu")
    assert used(7e9, graphs="on") and used(1e8, graphs="on", compile="off")
    for execution in ({"graphs": "off"}, {"compile": "off"}, {"fused": False}):
        assert not used(1e8, **execution)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_graphs_need_the_attention_that_can_be_recorded(dtype: Any) -> None:
    sizes, device = SimpleNamespace(matmul_parameters=1e8), torch.device("cuda")

    def used(wanted: Any, dtype: Any) -> bool:
        config = replace(CONFIG, model=replace(CONFIG.model, dtype=dtype), execution=ExecutionSection(graphs=wanted))
        return uses_graphs(config, device, sizes)  # type: ignore[arg-type]

    assert used("auto", "bfloat16") and used("on", "auto")
    assert not used("auto", dtype)
    with pytest.raises(UserError, match=f'model.dtype = "{dtype}": graphs need bfloat16'):
        used("on", dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_run_equals_one_that_is_not_to_the_bit(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rounds = replace(CONFIG, training=replace(CONFIG.training, steps=12, batch=48))

    def trained(name: str, most: int, config: RunConfig = rounds) -> Tensor:
        model = load_model(str(hf_model()), dtype=torch.bfloat16, device="cuda:0")
        graphs = Graphs(model, most)
        train(Trainer(model, documents, config, tmp_path / name, Distributed(0, 1, model.device), graphs=graphs))
        assert (graphs.recorded > 0) == (most > 0)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    before = torch.are_deterministic_algorithms_enabled()
    make_deterministic(True)
    try:
        expected = trained("not recorded", 0)
        assert torch.equal(trained("recorded", graphs_module.MOST), expected)
        other = replace(rounds, seed=43)
        assert not torch.equal(trained("control", graphs_module.MOST, other), expected)
    finally:
        torch.use_deterministic_algorithms(before)
