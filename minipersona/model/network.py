"""The network written out: embedding, decoder blocks, final norm, head; Qwen2, Llama 3 and Qwen3 alike.

T = tokens in the pack, S = documents, D = model width, F = feed-forward width, V = vocabulary,
H/K = query/key heads, d = channels of a head. Module and parameter names are Hugging Face's.

Weights may be stored in one precision and used in another: every product casts its weights to the precision of the
stream ("cast at use"), so that frozen weights can be bf16 and trained ones fp32 masters. Norms, rotations and
softmax are computed in fp32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipersona.model.acceleration.fused_linear import FusedLinear, refresh
from minipersona.model.adapter_config import AdapterConfig
from minipersona.model.attention import Scope, Spans, WithinDocuments, rotary_angles, rotate
from minipersona.model.config import ModelConfig
from minipersona.model.lora import Linear
from minipersona.model.pack import Pack, make_pack

Tap = Callable[[Tensor], Tensor]
"""(T, D) -> (T, D), applied to the residual stream that leaves a block; with `last_rows`, (N, D) at the last one."""


@dataclass(frozen=True, eq=False)
class AddVector:
    """The tap h <- h + v of a vector (D,), in the stream's precision and on its device."""

    vector: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """h (T, D) -> (T, D)."""
        return h + self.vector


EMBEDDING = -1  # the tap index of the embeddings; blocks are counted from 0


class Embedding(nn.Module):
    """A row of channels for each token. torch's own class imports torch's compiler to initialise its weights."""

    def __init__(self, vocabulary: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, channels))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T,) -> (T, D), in the weights' precision."""
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w, over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., channels) -> the same shape, in x's precision, computed in fp32 or better."""
        wide = _at_least_fp32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023). Qwen2 has biases of q, k and v; Qwen3 norms q and k, by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.query_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, config.key_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, config.key_width, bias=config.qkv_bias)
        self.o_proj = Linear(config.query_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.qkv = FusedLinear(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, scope: Scope, dropout_keys: Tensor | None) -> Tensor:
        """x (T, D) -> (T, D)."""
        if self.qkv.ready:  # the same three products, computed together
            q, k, v = self.qkv(x, dropout_keys)
        else:
            q = self.q_proj(x, dropout_keys)  # (T, H d)
            k = self.k_proj(x, dropout_keys)  # (T, K d)
            v = self.v_proj(x, dropout_keys)  # (T, K d)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))  # (T, H or K, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = scope.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (T, H, d)
        return self.o_proj(mixed.flatten(-2), dropout_keys)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up = FusedLinear(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """x (T, D) -> (T, D)."""
        if self.gate_up.ready:  # the same two products, computed together
            gate, up = self.gate_up(x, dropout_keys)
        else:
            gate = self.gate_proj(x, dropout_keys)  # (T, F)
            up = self.up_proj(x, dropout_keys)  # (T, F)
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
        """h (T, D) -> (T, D). With `recompute`, only h is kept, and the backward pass computes the block again.

        rows  (N,) of the stream: only they leave the block, (N, D), and the MLP, which does not mix tokens, computes
              no others
        """
        inputs = (h, cos, sin, scope, dropout_keys, rows)
        if recompute and torch.is_grad_enabled():
            # Nothing here draws random numbers, so there is no RNG state to restore. Checkpointing inside of what is
            # compiled lets the compiler leave out what the backward pass does not read: above all, the last product.
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
    """A causal language model over packs: Qwen2 and Qwen2.5, Llama 3.x and SmolLM2, and dense Qwen3, as `config` says.

    compute_dtype  the precision of the stream
    fused          True: projections that read the same input are computed together where they can be, and the token
                   step of generation uses a flash kernel and a CUDA graph. False: the plain path, equal to rounding
    source         where the weights came from
    generation     what generation_config.json says there, for copies of the model that are saved
    lora           the form of the adapters that are attached; None where there are none
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.fused = True
        self.source: dict[str, str | None] = {}
        self.generation: dict[str, Any] = {}
        self.lora: AdapterConfig | None = None
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

    @property
    def blocks(self) -> list[Block]:
        """The decoder blocks, in order."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    def refresh_fused_weights(self) -> None:
        """Bring the weights that are used together up to date, or give their layout up; every pass begins with this."""
        fused = [each for block in self.blocks for each in (block.self_attn.qkv, block.mlp.gate_up)]
        if self.fused:
            refresh(fused, self.compute_dtype)
        else:
            for each in fused:
                each.release()

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
        weights_unchanged: bool = False,
    ) -> Tensor:
        """Hidden states (T, D) after the final norm; attention never crosses a document's boundary.

        taps               layer -> function of the stream leaving that block; -1 is the embedding. They act outside of
                           the checkpointed region, so recomputation neither repeats nor loses them.
        stop_after         return the stream (T, D) that leaves this block, not normed, and skip what follows
        dropout_keys       (T,) int32 of `token_keys`: adapters drop their inputs; None turns dropout off
        scopes             what the tokens of each block see; by default themselves and what precedes them in the pack
        last_rows          (N,) rows of the stream: they alone leave the last block that is computed, so that its tap
                           and the caller get (N, D)
        weights_unchanged  since an earlier pass: their fused copies need not be refreshed
        """
        taps = taps or {}
        if not weights_unchanged:
            self.refresh_fused_weights()  # fused products equal the plain ones; skip this on a first reading
        wide = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        h = self.model.embed_tokens(pack.ids).to(self.compute_dtype)  # (T, D)
        if EMBEDDING in taps:
            h = taps[EMBEDDING](h)
        cos, sin = rotary_angles(pack.positions, self.config, wide)
        within = WithinDocuments(Spans(pack.boundaries, pack.longest))
        last = self.config.num_hidden_layers - 1 if stop_after is None else stop_after
        for index, block in enumerate(self.blocks[: last + 1]):
            scope = within if scopes is None else scopes[index]
            rows = last_rows if index == last else None
            h = block(h, cos, sin, scope, dropout_keys, recompute=checkpoint_activations, rows=rows)
            if index in taps:
                h = taps[index](h)
        return h if stop_after is not None else self.model.norm(h)

    def logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V) in fp32 (or fp64), plain causal over each row. For audits and tests."""
        pack = make_pack(list(ids.cpu().numpy())).to(self.device)
        logits = self.lm_head(self(pack))  # (B * T, V)
        return _at_least_fp32(logits).unflatten(0, tuple(ids.shape))
