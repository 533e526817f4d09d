"""What a network is made of: its sizes, and the points in which the families differ.

    family               model_type   biases of q, k, v   RMSNorm of q and k   width of a head
    Qwen2, Qwen2.5       qwen2        yes                 no                   hidden_size / heads
    Llama 3.x, SmolLM2   llama        no                  no                   as stated, else hidden_size / heads
    Qwen3 (dense)        qwen3        no                  per head             as stated, else 128

Everything else is common to them: grouped queries, rotary positions, RMSNorm before attention and MLP, a gated MLP with
SiLU, no other biases, a head that may be tied to the embedding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RotaryScaling:
    """The `llama3` scaling of rotary frequencies, under Hugging Face's names; see `attention.frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Family:
    """What `model_type` decides."""

    architecture: str  # the class of transformers
    qkv_bias: bool
    qk_norm: bool


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False),
    "llama": Family("LlamaForCausalLM", qkv_bias=False, qk_norm=False),
    "qwen3": Family("Qwen3ForCausalLM", qkv_bias=False, qk_norm=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a network, under Hugging Face's names.

    eos_token_id  ids at which generation ends; the network does not use them, a saved copy of the model states them
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    head_dim: int
    model_type: str = "qwen2"
    rope_theta: float = 1_000_000.0
    rope_scaling: RotaryScaling | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32_768
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to q, k and v have biases."""
        return FAMILIES[self.model_type].qkv_bias

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normed, head by head, before they are rotated."""
        return FAMILIES[self.model_type].qk_norm

    @property
    def query_width(self) -> int:
        """Channels of all query heads together; those of q_proj's output and of o_proj's input."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all key heads together, and of all value heads; those of k_proj's and v_proj's output."""
        return self.num_key_value_heads * self.head_dim

    @property
    def probe_layer(self) -> int:
        """The layer that is measured unless another is named: block 20 of 28, the same relative depth elsewhere."""
        return round(20 / 28 * self.num_hidden_layers)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that take part in a matrix product for every token (head included, embedding not)."""
        d, f, q, k = self.hidden_size, self.intermediate_size, self.query_width, self.key_width
        return self.num_hidden_layers * (2 * d * q + 2 * d * k + 3 * d * f) + d * self.vocab_size

    @property
    def parameters(self) -> int:
        """All parameters."""
        d = self.hidden_size
        embedding = 0 if self.tie_word_embeddings else d * self.vocab_size
        biases = self.qkv_bias * (self.query_width + 2 * self.key_width)
        norms = 2 * d + self.qk_norm * 2 * self.head_dim
        return self.matmul_parameters + embedding + self.num_hidden_layers * (biases + norms) + d

    def to_json(self) -> dict[str, Any]:
        """config.json as `transformers` reads it."""
        values = asdict(self)
        if self.model_type == "qwen2":
            del values["head_dim"]  # always hidden_size / heads there
        if self.rope_scaling is None:
            del values["rope_scaling"]
        else:
            values["rope_scaling"]["rope_type"] = "llama3"
        match self.eos_token_id:
            case ():
                del values["eos_token_id"]
            case [only]:
                values["eos_token_id"] = only
            case several:
                values["eos_token_id"] = list(several)
        # Stated only where the family has the choice.
        choices = {
            "qwen2": {"use_sliding_window": False},
            "llama": {"attention_bias": False, "mlp_bias": False},
            "qwen3": {"attention_bias": False, "use_sliding_window": False},
        }
        return {
            "architectures": [FAMILIES[self.model_type].architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            **choices[self.model_type],
            **values,
        }
