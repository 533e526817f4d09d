"""Reading config.json. What it states and the network does not do is refused; so are statements that contradict.

A config may say one thing in several places: transformers 5 moved `rope_theta` and `rope_scaling` into
`rope_parameters`, and a file that both versions have saved holds both. The same statement twice is fine.
"""

from __future__ import annotations

import math
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from minipersona.errors import UserError, require
from minipersona.files import read_json
from minipersona.model.config import FAMILIES, ModelConfig, RotaryScaling

# Beyond every published model of these families, and small enough that a damaged file can ask for neither terabytes
# nor hours.
LARGEST = {
    "hidden_size": 65_536,
    "intermediate_size": 1_000_000,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 65_536,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 100_000_000,
    "original_max_position_embeddings": 100_000_000,
    "sliding_window": 100_000_000,
    "max_window_layers": 1_000_000,
}

# Keys that change what a network of these families would compute, and the values at which they do not. Null always is
# one, and so is the absence of the key. Other keys (token ids, the precision of the stored weights, how they were
# initialised, caches and parallelism of other tools) change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # code, and weights that are not numbers as they stand
    "auto_map": (), "quantization_config": (), "compression_config": (),
    # what a token sees
    "is_causal": (True,), "use_causal_mask": (True,), "use_bidirectional_attention": (False,),
    "bidirectional": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "attention_chunk_size": (), "use_alibi": (False,), "alibi": (False,),
    "position_embedding_type": ("rope", "rotary"), "no_rope_layer_interval": (0,),
    "attn_temperature_tuning": (False, 0), "use_attention_sinks": (False,),
    # how channels are rotated
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rope_interleaved": (False,), "rope_interleave": (False,),
    "rope_local_base_freq": (),
    # scores, logits and the stream
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "softmax_scale": (), "logits_scaling": (1,),
    "logit_scale": (1,), "residual_multiplier": (1,), "embedding_multiplier": (1,), "scale_emb": (1,), "clip_qkv": (),
    # the layers
    "hidden_act": ("silu", "swish"), "hidden_activation": ("silu", "swish"), "mlp_bias": (False,),
    "lm_head_bias": (False,), "use_parallel_residual": (False,), "num_experts": (0,), "num_local_experts": (0,),
    "n_routed_experts": (0,),
    # dropout, which the recipe of a run decides
    "attention_dropout": (0,), "hidden_dropout": (0,), "resid_pdrop": (0,), "embd_pdrop": (0,), "attn_pdrop": (0,),
}  # fmt: skip


def read_config(path: Path) -> ModelConfig:
    """The config of a network of these `FAMILIES`. UserError names the key, or both of those that contradict."""
    raw = read_json(path)
    require(isinstance(raw, dict), f"{path}: is {type(raw).__name__}, not an object; fetch the file again")
    return parse_config(path, raw)


def parse_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    """`read_config` of an object that is read already, from a file that errors name."""
    raw = {key: value for key, value in raw.items() if value is not None}
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{path}: model_type is {brief(model_type)}; only {', '.join(FAMILIES)} are supported "
            "(Qwen2 and Qwen2.5, Llama 3 and SmolLM2, dense Qwen3)"
        )
    _check_architecture(path, raw)
    sizes = _read_sizes(path, raw)
    tied = raw.get("tie_word_embeddings", False)
    require(isinstance(tied, bool), f"{path}: tie_word_embeddings must be true or false")
    config = ModelConfig(
        **sizes,
        tie_word_embeddings=tied,
        model_type=model_type,
        rope_theta=_read_theta(path, raw),
        rope_scaling=_read_scaling(path, raw),
        rms_norm_eps=_number(path, raw, "rms_norm_eps", 1e-6),
        bos_token_id=next(iter(_token_ids(path, raw, "bos_token_id")), None),
        eos_token_id=_token_ids(path, raw, "eos_token_id"),
    )
    _check_neutral(path, raw, config)
    _check_windows(path, raw, config)
    return config


def read_generation(path: Path) -> dict[str, Any]:
    """What generation_config.json states; nothing where there is none."""
    if not path.is_file():
        return {}
    raw = read_json(path)
    require(isinstance(raw, dict), f"{path}: is {type(raw).__name__}, not an object; fetch the file again")
    stated = {key: value for key, value in raw.items() if value is not None}
    if "eos_token_id" in stated:
        stated["eos_token_id"] = list(_token_ids(path, stated, "eos_token_id"))
    return stated


def _check_architecture(path: Path, raw: dict[str, Any]) -> None:
    """`architectures` names the class of the weights: a decoder of this family, with its head or without."""
    named, model_type = raw.get("architectures", []), raw["model_type"]
    whole = FAMILIES[model_type].architecture
    known = {name.lower() for name in (whole, whole.replace("ForCausalLM", "Model"))}
    require(
        isinstance(named, list) and all(isinstance(name, str) and name.lower() in known for name in named),
        f"{path}: architectures = {brief(named)} is not model_type = {brief(model_type)}'s {whole}; "
        "name a causal language model",
    )


# ---------------------------------------------------------------- sizes


def _read_sizes(path: Path, raw: dict[str, Any]) -> dict[str, int]:
    model_type, names = raw["model_type"], [*LARGEST][:8]
    filled = {"num_key_value_heads": raw.get("num_attention_heads"), "max_position_embeddings": 32_768, **raw}
    sizes = {name: _size(path, filled, name) for name in names if name != "head_dim"}
    width, heads, kv_heads = (sizes[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    own = raw.get("head_dim", 128 if model_type == "qwen3" else None)
    require(
        not heads % kv_heads and (own is not None or not width % heads),
        f"{path}: hidden_size {width}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not divide "
        "each other; the file is damaged or of another architecture",
    )
    sizes["head_dim"] = width // heads if own is None else _size(path, {"head_dim": own}, "head_dim")
    require(
        model_type != "qwen2" or sizes["head_dim"] * heads == width,
        f"{path}: head_dim = {sizes['head_dim']} differs from hidden_size / num_attention_heads = {width} / {heads}, "
        "which qwen2 does not support",
    )
    require(
        sizes["head_dim"] % 2 == 0,
        f"{path}: head_dim = {sizes['head_dim']} (or hidden_size / num_attention_heads) is odd; rotary positions turn "
        "pairs of channels",
    )
    return sizes


def _size(path: Path, raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST[name]:
        raise UserError(
            f"{path}: {name} = {brief(value)} must be a whole number from 1 to {LARGEST[name]:,}; fetch the file again"
        )
    return value


def _number(path: Path, raw: dict[str, Any], name: str, default: float | None = None, where: str = "") -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise UserError(f"{path}: {where}{name} = {brief(value)} is not a positive number")
    return float(value)


def _token_ids(path: Path, raw: dict[str, Any], name: str) -> tuple[int, ...]:
    """A token id, or several, as a tuple."""
    stated = raw.get(name, [])
    ids = stated if isinstance(stated, list) else [stated]
    # -1 is how some files say that there is none.
    require(
        all(isinstance(i, int) and not isinstance(i, bool) and -1 <= i < LARGEST["vocab_size"] for i in ids),
        f"{path}: {name} = {brief(stated)} must be a token's id or a list of them",
    )
    return tuple(i for i in ids if i >= 0)


# ---------------------------------------------------------------- rotary positions

ROPE = ("rope_parameters", "rope_scaling")  # where a config describes its rotary positions, besides `rope_theta`

# What is done of such a description. Keys that change nothing, with the values at which they do not: as `NEUTRAL`.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {"factor": (1,), "attention_factor": (1,), "partial_rotary_factor": (1,)}


def _read_theta(path: Path, raw: dict[str, Any]) -> float:
    stated = {"rope_theta": _number(path, raw, "rope_theta")} if "rope_theta" in raw else {}
    for key in ROPE:
        described = _described(path, raw, key)
        if "rope_theta" in described:
            stated[f"{key}.rope_theta"] = _number(path, described, "rope_theta", where=f"{key}.")
    _agree(path, stated)
    return next(iter(stated.values()), 10_000.0)


def _read_scaling(path: Path, raw: dict[str, Any]) -> RotaryScaling | None:
    keys = [key for key in ROPE if _described(path, raw, key)]
    _agree(path, {f"{key}.rope_type": _kind(path, raw, key) for key in keys})
    stated = {key: _scaling(path, raw, key) for key in keys}
    if len(set(stated.values())) > 1:
        _agree(path, {key: raw[key] for key in keys})
    return next(iter(stated.values()), None)


def _described(path: Path, raw: dict[str, Any], key: str) -> dict[str, Any]:
    described = raw.get(key, {})
    require(isinstance(described, dict), f"{path}: {key} = {brief(described)} is not an object; it is not supported")
    return {name: value for name, value in described.items() if value is not None}


def _kind(path: Path, raw: dict[str, Any], key: str) -> Any:
    """The type of a description, which some files spell `type` and others `rope_type`."""
    described = _described(path, raw, key)
    kinds = {f"{key}.{name}": described[name] for name in ("rope_type", "type") if name in described}
    _agree(path, kinds)
    return next(iter(kinds.values()), "default")


def _scaling(path: Path, raw: dict[str, Any], key: str) -> RotaryScaling | None:
    described, kind = _described(path, raw, key), _kind(path, raw, key)
    require(
        kind in ("default", "llama3"),
        f"{path}: {key} = {brief(raw[key])} is not supported; only the types default and llama3 are",
    )
    known = (
        "rope_theta",
        "rope_type",
        "type",
        "original_max_position_embeddings",
        *(LLAMA3 if kind == "llama3" else ()),
    )
    for name, value in described.items():
        require(
            name in known or _is_one_of(value, ROPE_NEUTRAL.get(name, ())),
            f"{path}: {key}.{name} = {brief(value)} is not supported with the type {kind}",
        )
    if kind == "default":
        return None
    factor, low, high = (_number(path, described, name, where=f"{key}.") for name in LLAMA3[:3])
    original = _size(path, described, LLAMA3[3])
    require(low < high, f"{path}: {key}.low_freq_factor {low} must be below {key}.high_freq_factor {high}")
    if LLAMA3[3] in raw:
        _agree(path, {LLAMA3[3]: raw[LLAMA3[3]], f"{key}.{LLAMA3[3]}": original})
    return RotaryScaling(factor, low, high, original)


def _agree(path: Path, stated: dict[str, Any]) -> None:
    """UserError unless all of these statements say the same."""
    (first, value), *others = stated.items() if stated else [("", None)]
    for name, other in others:
        require(
            other == value,
            f"{path}: {first} = {brief(value)} beside {name} = {brief(other)}: they contradict each other; delete the "
            "wrong one",
        )


# ---------------------------------------------------------------- what the network does not do


def _check_neutral(path: Path, raw: dict[str, Any], config: ModelConfig) -> None:
    own: dict[str, tuple[Any, ...]] = {
        "attention_multiplier": (config.head_dim**-0.5,),
        "query_pre_attn_scalar": (config.head_dim,),
        "rotary_dim": (config.head_dim,),
        "no_rope_layers": ([], [1] * config.num_hidden_layers),
        "qkv_bias": (config.qkv_bias,),
        "use_qk_norm": (config.qk_norm,),
        "qk_layernorm": (config.qk_norm,),
    }
    if config.model_type != "qwen2":  # transformers does not read it there
        own["attention_bias"] = (False,)
    for key, values in {**NEUTRAL, **own}.items():
        require(
            key not in raw or _is_one_of(raw[key], values),
            f"{path}: {key} = {brief(raw.get(key))} is not supported; use a plain {config.model_type} checkpoint",
        )


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether the value is one of these. A number may be written as an integer; true is not 1."""
    for each in values:
        if isinstance(value, bool) or isinstance(each, bool) or not isinstance(each, (int, float)):
            if value is each or (type(value) is type(each) and value == each):
                return True
        elif value == each or (isinstance(value, float) and math.isclose(value, each, rel_tol=1e-6)):
            return True
    return False


def _check_windows(path: Path, raw: dict[str, Any], config: ModelConfig) -> None:
    """Every layer must see everything that precedes it.

    Source: `Qwen2Config` of transformers, where the layers from `max_window_layers` on have a window if
    `use_sliding_window`, unless `layer_types` says otherwise; Llama has none of these keys.
    """
    layers, kinds = config.num_hidden_layers, raw.get("layer_types")
    require(
        kinds is None or kinds == ["full_attention"] * layers,
        f"{path}: layer_types = {brief(kinds)} is not supported; only full_attention in each of the {layers} layers is",
    )
    used = raw.get("use_sliding_window", config.model_type == "llama")
    require(isinstance(used, bool), f"{path}: use_sliding_window = {brief(used)} must be true or false")
    if not used or (config.model_type == "llama" and "sliding_window" not in raw):
        return
    filled = {"sliding_window": 4096, "max_window_layers": 28, **raw}
    window, first = _size(path, filled, "sliding_window"), filled["max_window_layers"]
    whole = 0 if first == 0 else _size(path, filled, "max_window_layers")
    require(
        config.model_type != "llama" and whole >= layers,
        f"{path}: sliding_window = {window} with use_sliding_window = {brief(raw.get('use_sliding_window'))} and "
        f"max_window_layers = {brief(first)} of {layers} layers gives some a window, which is not supported",
    )
