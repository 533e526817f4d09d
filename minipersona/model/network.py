"""Qwen2.5 written out: embedding, decoder blocks, final norm, head.

T = tokens in the pack, S = documents, D = model width, F = feed-forward width, V = vocabulary,
H/K = query/key heads, d = channels of a head. Module and parameter names are Hugging Face's.

Weights may be stored in one precision and used in another: every product casts its weights to the precision of the
stream ("cast at use"), so that frozen weights can be bf16 and trained ones fp32 masters. Norms, rotations and
softmax are computed in fp32 or better.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipersona.model.attention import Scope, Spans, WithinDocuments
from minipersona.model.config import ModelConfig
from minipersona.model.joined import Joined, prepare
from minipersona.model.linear import Linear
from minipersona.model.pack import Pack, make_pack

Tap = Callable[[Tensor], Tensor]
"""(T, D) -> (T, D), applied to the residual stream that leaves a block."""

EMBEDDING = -1  # the tap index of the embeddings; blocks are counted from 0


class Embedding(nn.Module):
    """A row of channels for each token. torch's own would bring its compiler along, to fill weights that are loaded."""

    def __init__(self, vocabulary: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, channels))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T,) -> (T, D), in the weights' precision."""
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w (Zhang & Sennrich 2019)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D), in x's precision, computed in fp32 or better."""
        wide = _at_least_fp32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, d) of position * theta^(-2i/d), the d/2 frequencies laid out twice (Su et al. 2021)."""
    channel = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    frequencies = 1.0 / theta ** (channel / head_dim)  # (d/2,)
    angles = positions.to(dtype)[:, None] * frequencies  # (T, d/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]  # (T, 1, d)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (T, heads, d); channel i is paired with channel i + d/2, as Hugging Face stores them."""
    wide = _at_least_fp32(x)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with biased q, k, v and an unbiased output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, width, bias=True)
        self.k_proj = Linear(width, kv_width, bias=True)
        self.v_proj = Linear(width, kv_width, bias=True)
        self.o_proj = Linear(width, width, bias=False)
        self.qkv = Joined(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, scope: Scope, dropout_keys: Tensor | None) -> Tensor:
        """x (T, D) -> (T, D)."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x, dropout_keys))  # (T, H or K, d)
        mixed = scope.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (T, H, d)
        return self.o_proj(mixed.flatten(-2), dropout_keys)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up = Joined(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x (T, D) -> (T, D)."""
        gate, up = self.gate_up(x, dropout_keys)  # (T, F) each
        return self.down_proj(F.silu(gate) * up, dropout_keys)


class Block(nn.Module):
    """One decoder block: attention and MLP, each reading a norm of the stream and adding to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        scope: Scope,
        dropout_keys: Tensor | None,
        recompute: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        """h (T, D) -> (T, D). With `recompute`, the backward pass computes anew what lies between, from h alone.

        rows  (N,) of the stream: only they leave the block, (N, D), and the MLP, which mixes no tokens, sees no others
        """
        inputs = (h, cos, sin, scope, dropout_keys, rows)
        if recompute and torch.is_grad_enabled():
            # Nothing here draws random numbers, so there is no RNG state to put back. Checkpointing inside of what is
            # compiled lets the compiler leave out what the backward pass does not read: the last product, above all.
            return checkpoint(self._compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._compute(*inputs)

    def _compute(
        self, h: Tensor, cos: Tensor, sin: Tensor, scope: Scope, dropout_keys: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, scope, dropout_keys)
        if rows is not None:
            h, dropout_keys = h[rows], None if dropout_keys is None else dropout_keys[rows]
        return h + self.mlp(self.post_attention_layernorm(h), dropout_keys)


class Decoder(nn.Module):
    """What Hugging Face calls `model`: everything below the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen2(nn.Module):
    """A Qwen2.5 causal language model over packs.

    `compute_dtype` is the precision of the stream; `source` says where the weights came from.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.compiled = False
        self.early_exit: int | None = None  # the only block after which a pass may end early, where weights are sharded
        self.source: dict[str, str | None] = {}
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.lm_head.weight.device

    def tie_head(self) -> None:
        """Make the head the embedding itself, one parameter, where the architecture says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def compile_blocks(self) -> None:
        """Compile the block once for all pack sizes and all blocks, and once more where the last leaves rows out."""
        from torch._functorch import config as functorch  # late: they bring the compiler along
        from torch._inductor import config as inductor

        # A study sees adapters of several ranks, several scopes, and passes with gradients and without; past 8 variants
        # torch would stop compiling.
        torch._dynamo.config.recompile_limit = 64
        # Numbers such as a norm's epsilon, or an objective's weight, are constants. As inputs they would be tensors on
        # the CPU, for whose sake a C++ compiler is called: half a minute and more.
        torch._dynamo.config.specialize_float = True
        # A fusion that pays from 4,096 tokens on: packs on both sides of that would be compiled twice.
        inductor.triton.mix_order_reduction = False
        # Dropout's masks follow from a word a token; by default they would be kept for the backward pass as bytes.
        functorch.ban_recompute_used_far_apart = False
        functorch.ban_recompute_long_fusible_chains = False
        self.compiled = True
        for block in self.model.layers:
            block.compile(dynamic=True)

    def prepare(self) -> None:
        """Lay out what is computed together, or give its memory back where that cannot be: before every pass."""
        blocks = [block for block in self.model.layers if isinstance(block, Block)]
        prepare([each for block in blocks for each in (block.self_attn.qkv, block.mlp.gate_up)], self.compute_dtype)

    def forward(
        self,
        pack: Pack,
        *,
        taps: Mapping[int, Tap] | None = None,
        stop_after: int | None = None,
        dropout_keys: Tensor | None = None,
        checkpoint_activations: bool = False,
        scopes: Sequence[Scope] | None = None,
        last_rows: Tensor | None = None,
        prepared: bool = False,
    ) -> Tensor:
        """Hidden states (T, D) after the final norm; attention never crosses a document's boundary.

        taps           layer -> function of the stream leaving that block; -1 is the embedding. They act outside of
                       the checkpointed region, so recomputation neither repeats nor loses them.
        stop_after     return the stream (T, D) that leaves this block, not normed, and skip what follows
        dropout_keys   (T,) int32 of `token_keys`: adapters drop their inputs; None turns dropout off
        scopes         what the tokens see, a scope a block; by default themselves and what precedes them in the pack
        last_rows      (N,) rows of the stream: they alone leave the last block that is computed, so that its tap and
                       the caller get (N, D)
        prepared       nothing about the weights has changed since an earlier pass: skip what would look
        """
        taps = taps or {}
        blocks = [block for block in self.model.layers if isinstance(block, Block)]
        if not prepared:
            self.prepare()
        wide = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        h = self.model.embed_tokens(pack.ids).to(self.compute_dtype)  # (T, D)
        if EMBEDDING in taps:
            h = taps[EMBEDDING](h)
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in blocks[0].parameters())
        if self.compiled and learns and not h.requires_grad:
            h = h.detach().requires_grad_()  # a first block through which nothing flows back would be compiled apart
        cos, sin = rotary_angles(pack.positions, self.config.head_dim, self.config.rope_theta, wide)
        within = WithinDocuments(Spans(pack.boundaries, pack.longest))
        assert self.early_exit is None or stop_after in (self.early_exit, None), "weights would stay gathered"
        last = len(blocks) - 1 if stop_after is None else stop_after
        for index, block in enumerate(blocks[: last + 1]):
            scope = within if scopes is None else scopes[index]
            rows = last_rows if index == last else None
            # Compiling the last block's form as well pays only where it learns.
            eager = self.compiled and rows is not None and not torch.is_grad_enabled()
            with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
                h = block(h, cos, sin, scope, dropout_keys, checkpoint_activations, rows)
            if index in taps:
                h = taps[index](h)
        return h if stop_after is not None else self.model.norm(h)

    def logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V) in fp32 (or fp64), plain causal over each row. For audits and tests."""
        pack = make_pack(list(ids.cpu().numpy())).to(self.device)
        logits = self.lm_head(self(pack))  # (B * T, V)
        return _at_least_fp32(logits).unflatten(0, tuple(ids.shape))
