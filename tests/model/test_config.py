"""config.json: what each family states, what is refused, and which statements contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, LLAMA3

from minipersona.config import DataSection, LoraConfig, RunConfig
from minipersona.errors import UserError
from minipersona.model.config import ModelConfig, RotaryScaling
from minipersona.model.config_file import read_config
from minipersona.model.load import architecture
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.sizes import KNOWN, known_config
from minipersona.run.work import adapter_parameters

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALING = RotaryScaling(8.0, 1.0, 4.0, 64)


@pytest.fixture
def read(hf_model: Callable[..., Path], tmp_path: Path) -> Callable[..., ModelConfig]:
    """The config of a family's test model after some changes: ... takes a key away."""

    def read(family: str, changes: dict[str, Any]) -> ModelConfig:
        raw = {**json.loads((hf_model(family=family) / "config.json").read_text()), **changes}
        path = tmp_path / "config.json"
        path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
        return read_config(path)

    return read


@pytest.mark.parametrize(
    "changes",
    [
        # the same said twice, in the places of transformers 4 and 5
        {"rope_theta": 10_000, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {}, "rope_theta": 10_000.0, "rope_scaling": {"rope_type": "default", "type": "default"}},
        {"rope_parameters": ..., "rope_theta": 10_000.0, "rope_scaling": None},
        {"rope_parameters": ...},
        {"torch_dtype": "bfloat16"},
        # windows that no layer has
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3, "layer_types": ...},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 28},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": None},
        # options at the value at which they change nothing
        {"is_causal": True, "use_bidirectional_attention": False, "attn_logit_softcapping": None},
        {"partial_rotary_factor": 1.0, "attention_multiplier": 8**-0.5, "logits_scaling": 1, "num_experts": 0},
        {"head_dim": 8, "mlp_bias": False, "attention_dropout": 0, "hidden_act": "swish"},
        {"no_rope_layers": [1, 1, 1], "use_qk_norm": False, "qkv_bias": True},
        # keys of other tools, which change nothing
        {"use_cache": False, "pretraining_tp": 2, "unsloth_version": "1", "transformers.js_config": {"dtype": {}}},
        {"architectures": ["Qwen2Model"]},
        {"architectures": None},
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_changes_nothing_is_accepted(read: Callable[..., ModelConfig], changes: dict[str, Any]) -> None:
    assert read("qwen2", changes) == read("qwen2", {})


@pytest.mark.parametrize(
    "family, changes, words",
    [
        # two statements
        ("qwen2", {"rope_theta": 1e6}, ["rope_theta = 1000000.0", "rope_parameters.rope_theta = 10000.0"]),
        ("qwen2", {"rope_scaling": {"rope_theta": 5e5}}, ["rope_scaling.rope_theta", "rope_parameters.rope_theta"]),
        ("qwen2", {"rope_scaling": YARN}, ["rope_parameters.rope_type = 'default'", "rope_scaling.rope_type = 'yarn'"]),
        ("qwen2", {"rope_scaling": LLAMA3}, ["rope_parameters.rope_type", "rope_scaling.rope_type = 'llama3'"]),
        ("llama", {"rope_scaling": {**LLAMA3, "factor": 32.0}}, ["rope_parameters = ", "rope_scaling = "]),
        ("llama", {"rope_scaling": {"type": "default"}}, ["rope_parameters.rope_type", "rope_scaling.rope_type"]),
        ("llama", {"original_max_position_embeddings": 32}, ["original_max_position_embeddings = 32", "= 64"]),
        ("qwen2", {"rope_parameters": {"type": "mrope", "rope_type": "default"}}, ["rope_type", "type = 'mrope'"]),
        ("qwen2", {"architectures": ["LlamaForCausalLM"]}, ["architectures", "model_type = 'qwen2'"]),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "causal language model"]),
        ("qwen2", {"head_dim": 16}, ["head_dim = 16", "hidden_size / num_attention_heads"]),
        ("qwen2", {"use_qk_norm": True}, ["use_qk_norm"]),
        ("qwen3", {"use_qk_norm": False}, ["use_qk_norm"]),
        ("llama", {"qkv_bias": True}, ["qkv_bias"]),
        # what is not done, in the words of the file
        ("qwen2", {"rope_parameters": YARN}, ["rope_parameters = {", "yarn"]),
        ("qwen2", {"rope_parameters": ..., "rope_scaling": YARN}, ["rope_scaling = {", "yarn"]),
        ("qwen2", {"rope_parameters": {"mrope_section": [1]}}, ["rope_parameters.mrope_section"]),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, ["rope_parameters.factor = 2.0"]),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope_parameters.full_attention"]),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": None}}, ["rope_parameters.factor"]),
        ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, ["low_freq_factor", "high_freq_factor"]),
        ("llama", {"attention_bias": True}, ["attention_bias = True"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias = True"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias = True"]),
        ("qwen3", {"num_experts": 128}, ["num_experts = 128"]),
        ("llama", {"sliding_window": 4096}, ["sliding_window = 4096"]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, ["use_sliding_window", "_layers = 0 of 3"]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": None},
         ["sliding_window = 4", "max_window_layers = 2 of 3 layers"]),
        ("qwen2", {"use_sliding_window": 1}, ["use_sliding_window = 1"]),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ["layer_types"]),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, ["layer_types", "3 layers"]),
        *(
            (family, {key: value}, [f"{key} = "])
            for family in ("qwen2", "llama", "qwen3")
            for key, value in {
                "is_causal": False, "use_bidirectional_attention": True, "bidirectional": True,
                "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "attention_multiplier": 0.01,
                "logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 12, "logit_scale": 0.06,
                "partial_rotary_factor": 0.5, "rope_interleaved": True, "quantization_config": {"bits": 4},
                "hidden_act": "gelu", "attention_dropout": 0.1, "no_rope_layers": [1, 0, 1], "clip_qkv": 8,
                "query_pre_attn_scalar": 256, "num_local_experts": 8, "use_parallel_residual": True,
                "eos_token_id": "</s>", "bos_token_id": [1.5],
            }.items()
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_not_done_is_refused(
    read: Callable[..., ModelConfig], family: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        read(family, changes)
    line = str(caught.value)
    assert "config.json" in line and "\n" not in line and all(word in line for word in words), line


def test_each_familys_config(read: Callable[..., ModelConfig]) -> None:
    qwen2, llama, smollm2, qwen3 = (read(family, {}) for family in FAMILIES)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 8)
    assert (llama.qkv_bias, llama.qk_norm, llama.head_dim, llama.rope_scaling) == (False, False, 8, SCALING)
    assert (smollm2.rope_scaling, smollm2.rope_theta, smollm2.rms_norm_eps) == (None, 100_000.0, 1e-5)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim, qwen3.query_width) == (False, True, 16, 96)
    # Heads of their own width, Llama's and Qwen3's; heads that do not divide the width are no contradiction then.
    assert read("llama", {"head_dim": 6}).query_width == 36
    assert read("qwen3", {"num_attention_heads": 10, "num_key_value_heads": 5}).query_width == 160
    assert read("qwen3", {"head_dim": ...}).head_dim == 128  # as transformers has it
    # transformers 4's form of the same.
    four = {"rope_parameters": ..., "rope_theta": 10_000.0, "rope_scaling": LLAMA3}
    assert read("llama", four) == llama
    assert read("llama", {"eos_token_id": [7, 9], "bos_token_id": 3}).eos_token_id == (7, 9)
    assert read("llama", {"eos_token_id": 7}).eos_token_id == (7,)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_network(read: Callable[..., ModelConfig], family: str) -> None:
    lora = LoraConfig(rank=3)
    for tied in (False, True):
        config = read(family, {"tie_word_embeddings": tied})
        model = Qwen2(config)
        assert config.parameters == sum(p.numel() for p in model.parameters())
        products = {id(p): p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n}
        assert config.matmul_parameters == sum(products.values()) + tied * config.hidden_size * config.vocab_size
        apply_lora(model, lora)
        learned = sum(p.numel() for adapter in adapters(model).values() for p in adapter.parameters())
        assert adapter_parameters(config, RunConfig(DataSection("a", "b"), lora=lora)) == learned


# As the models' pages on the hub say.
MILLIONS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494, "Qwen/Qwen2.5-7B-Instruct": 7_616, "Qwen/Qwen3-0.6B": 596,
    "Qwen/Qwen3-1.7B": 1_721, "Qwen/Qwen3-4B": 4_022, "Qwen/Qwen3-8B": 8_191, "Qwen/Qwen3-14B-Base": 14_768,
    "Qwen/Qwen3-32B": 32_762,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030, "meta-llama/Llama-3.1-70B": 70_554,
    "meta-llama/Llama-3.2-1B-Instruct": 1_236, "meta-llama/Llama-3.2-3B": 3_213,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 135, "HuggingFaceTB/SmolLM2-360M": 362, "HuggingFaceTB/SmolLM2-1.7B": 1_711,
}  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes(name: str) -> None:
    config = known_config(name)
    assert config is not None and round(config.parameters / 1e6) == MILLIONS[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen2(config).parameters()) == config.parameters
    assert architecture(f"random:{name}") == config


def test_every_known_size_is_a_config_that_is_read_again(tmp_path: Path) -> None:
    for config in KNOWN.values():
        (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
        assert read_config(tmp_path / "config.json") == config
    assert known_config("Qwen/Qwen2-7B") is None and known_config("Qwen/Qwen3-8B-FP8") is None


def test_the_probe_layer_has_the_same_relative_depth() -> None:
    layers = {name: config.probe_layer for name, config in KNOWN.items()}
    assert layers["Qwen/Qwen2.5-7B"] == 20
    assert layers["Qwen/Qwen3-8B"] == 26
    assert layers["meta-llama/Llama-3.2-1B"] == 11
    assert layers["HuggingFaceTB/SmolLM2-135M"] == 21
