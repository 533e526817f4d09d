"""The peers of the benchmarks compute what ours computes, on a CPU in fp32: attention within documents, every loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import documents, their_model
from benchmarks.peers import Peer, document_losses, naive, strongest
from minipersona.chat import Document
from minipersona.model.load import load_model
from minipersona.model.network import Qwen2
from minipersona.training.heldout import document_losses as our_document_losses

PACK = 700  # tokens, so that four documents take two packs


@pytest.fixture(params=[("qwen2", False), ("llama", True)], scope="module", ids=["qwen2", "llama, tied"])
def ours(request: pytest.FixtureRequest, hf_model: Callable[..., Path]) -> Qwen2:
    family, tied = request.param
    return load_model(str(hf_model(tied, family=family)), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def docs(ours: Qwen2) -> list[Document]:
    return documents(4, ours.config.vocab_size)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def entered(peer: str, theirs: Any, checkpointing: bool) -> Any:
    if peer == "naive":
        return naive(theirs, checkpointing, micro=2)
    return strongest(theirs, checkpointing, PACK)


def losses(peer: Peer, docs: list[Document]) -> torch.Tensor:
    return document_losses(peer, docs, peer.passes)


@pytest.mark.parametrize(("peer", "checkpointing"), [("naive", True), ("strongest", False), ("strongest", True)])
def test_a_peer_has_our_losses_and_leaves_its_model_as_it_was(
    ours: Qwen2, docs: list[Document], peer: str, checkpointing: bool
) -> None:
    theirs = their_model(ours)
    before = list(theirs.state_dict())
    nats, tokens = our_document_losses(ours, docs, PACK)
    with entered(peer, theirs, checkpointing) as driven:
        assert torch.allclose(losses(driven, docs).double(), nats / tokens, rtol=1e-5)
        assert float(driven.gradients(docs)) == pytest.approx(float(nats.sum() / tokens.sum()), rel=1e-5)
        assert all(p.grad is not None for p in driven.learned)
        assert len(driven.passes(docs)) > 1
    assert list(theirs.state_dict()) == before
    assert not any(hasattr(module, "lora_A") for module in theirs.modules())


def test_control_documents_that_see_each_other_have_other_losses(ours: Qwen2, docs: list[Document]) -> None:
    nats, tokens = our_document_losses(ours, docs, PACK)
    with strongest(their_model(ours), False, PACK) as driven:
        assert driven.control is not None
        apart = (document_losses(driven, docs, driven.control) - nats / tokens).abs()
    assert apart.max() > 1e-3
