"""The sizes of published models, known without a network: for `random:` models and for plans.

Source: each model's config.json on the Hugging Face hub, as tabulated in litgpt/config.py of Lightning-AI/litgpt.
"""

from __future__ import annotations

from dataclasses import replace

from minipersona.model.config import ModelConfig, RotaryScaling


def _qwen25(
    hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> ModelConfig:
    return ModelConfig(hidden, feed_forward, layers, heads, kv_heads, vocabulary, tied, hidden // heads)


def _qwen3(hidden: int, feed_forward: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    sizes = ModelConfig(hidden, feed_forward, layers, heads, 8, 151_936, tied, 128)
    return replace(sizes, model_type="qwen3", max_position_embeddings=40_960)


def _llama3(hidden: int, feed_forward: int, layers: int, heads: int, tied: bool, factor: float) -> ModelConfig:
    sizes = ModelConfig(hidden, feed_forward, layers, heads, 8, 128_256, tied, hidden // heads)
    return replace(
        sizes,
        model_type="llama",
        rope_theta=500_000.0,
        rope_scaling=RotaryScaling(factor, 1.0, 4.0, 8192),
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
    )


def _smollm2(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, theta: float) -> ModelConfig:
    sizes = ModelConfig(hidden, feed_forward, layers, heads, kv_heads, 49_152, True, hidden // heads)
    return replace(sizes, model_type="llama", rope_theta=theta, rms_norm_eps=1e-5, max_position_embeddings=8192)


# Without the ending of the chat model (-Instruct) or of the pretrained one (-Base), whose sizes are the same.
KNOWN = {
    "Qwen/Qwen2.5-0.5B": _qwen25(896, 4864, 24, 14, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B": _qwen25(1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen/Qwen2.5-3B": _qwen25(2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen/Qwen2.5-7B": _qwen25(3584, 18944, 28, 28, 4, 152_064, False),
    "Qwen/Qwen2.5-14B": _qwen25(5120, 13824, 48, 40, 8, 152_064, False),
    "Qwen/Qwen2.5-32B": _qwen25(5120, 27648, 64, 40, 8, 152_064, False),
    "Qwen/Qwen2.5-72B": _qwen25(8192, 29568, 80, 64, 8, 152_064, False),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, False),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, False, 8.0),
    "meta-llama/Llama-3.1-70B": _llama3(8192, 28672, 80, 64, False, 8.0),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, True, 32.0),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, True, 32.0),
    "HuggingFaceTB/SmolLM2-135M": _smollm2(576, 1536, 30, 9, 3, 100_000.0),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(960, 2560, 32, 15, 5, 100_000.0),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm2(2048, 8192, 24, 32, 32, 130_000.0),
}


def known_config(name: str) -> ModelConfig | None:
    """The sizes of a published model by its hub id, or None for another name."""
    return KNOWN.get(name.removesuffix("-Instruct").removesuffix("-Base"))
