"""torch.compile, and every setting of the compiler that is changed.

torch reads its settings while it compiles, at the first call of each variant of a function. So they are set while a
compiled function is called, and have their earlier values once it returns: other code in the process is compiled as
torch's defaults say. Compiled code is not guarded on settings, so that nothing is compiled again because of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from minipersona.model.network import Qwen2

P = ParamSpec("P")
R = TypeVar("R")

DYNAMO: dict[str, Any] = {
    # A study sees adapters of several ranks, several scopes, and passes with gradients and without; past 8 variants
    # torch would stop compiling.
    "recompile_limit": 64,
    # Numbers such as a norm's epsilon, or an objective's weight, are constants. As inputs they would be tensors on the
    # CPU, for which a C++ compiler is called: half a minute and more.
    "specialize_float": True,
}
FUNCTORCH: dict[str, Any] = {
    # Dropout's masks follow from one word a token; by default they would be kept for the backward pass as bytes.
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
}
INDUCTOR: dict[str, Any] = {
    # A fusion that pays from 4,096 tokens on: packs on both sides of that would be compiled twice.
    "triton.mix_order_reduction": False,
    # After a minute without work, torch would end the processes that compile kernels, and fork new ones for the next
    # kernel from a process that has threads. A lock that one of these holds then stays locked in the new process, and
    # who waits for the kernel waits forever.
    "quiesce_async_compile_pool": False,
}


def compile_function(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled once for tensors of all sizes."""
    return _under_settings(_compile(function))


def compile_blocks(model: Qwen2) -> None:
    """Compile the model's blocks in place: as one variant for all of them and all sizes of packs, and one more where
    the last block leaves rows out. A deep copy of the model is not compiled.
    """
    # `module(...)` calls `_compiled_call_impl` where there is one; `nn.Module.compile` sets it too.
    for block in model.blocks:
        block._compiled_call_impl = _block_call(block)
    model._compiled_call_impl = _under_settings(model._call_impl)  # set once a pass instead of once a block


@contextlib.contextmanager
def without_compiler(model: Qwen2) -> Iterator[None]:
    """A model that is compiled is called as it is written. For one that is not, the compiler is not imported."""
    with torch.compiler.set_stance("force_eager") if model._compiled_call_impl else contextlib.nullcontext():
        yield


def _compile(function: Callable[P, R]) -> Callable[P, R]:
    # Inductor's settings go in as options: it may compile a backward pass later, when this call has returned.
    return torch.compile(function, dynamic=True, options=dict(INDUCTOR))


def _under_settings(function: Callable[P, R]) -> Callable[P, R]:
    from torch._dynamo import config as dynamo  # late: importing the compiler takes more than a second
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    # Inductor's for the processes that it starts when it is first called, before it reads the options.
    return dynamo.patch(**DYNAMO)(functorch.patch(**FUNCTORCH)(inductor.patch(INDUCTOR)(function)))


def _block_call(block: nn.Module) -> Callable[..., Tensor]:
    compiled = _compile(block._call_impl)

    def call(h: Tensor, *inputs: Any, rows: Tensor | None = None, **settings: Any) -> Tensor:
        if torch.is_grad_enabled():
            if not h.requires_grad and any(parameter.requires_grad for parameter in block.parameters()):
                # The first block's input needs no gradient. Unless it says that it does, it makes another variant.
                h = h.detach().requires_grad_()
        elif rows is not None:
            # The variant that leaves rows out is worth its compilation in training alone.
            with torch.compiler.set_stance("force_eager"):
                return compiled(h, *inputs, rows=rows, **settings)
        return compiled(h, *inputs, rows=rows, **settings)

    return call
