"""A Hugging Face directory of a GGUF file, llama.cpp's format for weights, tokenizer and chat template.

The weights are dequantised and rounded once, to bf16. Nothing is guessed: a key of the architecture that is not known
is refused, and so is a tensor that the network has no place for. Source: the specification of the format
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, which this undoes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minipersona.errors import UserError, require
from minipersona.model.attention import frequencies, scaled
from minipersona.model.config import FAMILIES, ModelConfig, RotaryScaling
from minipersona.model.config_file import parse_config
from minipersona.model.gguf_tokenizer import write_tokenizer
from minipersona.model.network import Qwen2
from minipersona.model.save import save_model
from minipersona.model.turn_ends import turn_ends
from minipersona.model.weights import expected_shapes

# GGUF's names of the modules of a block, and Hugging Face's.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"
MOST_VALUES = 1_000_000  # of a list; vocabularies have some hundred thousand, and each value takes some hundred bytes

# Keys behind the name of the architecture, and the key of config.json that says the same.
SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
HEAD_WIDTHS = ("attention.value_length", "rope.dimension_count")  # the same as a head's keys
# Keys that say what the network does not do, and the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "attention.sliding_window": (0,),
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,), "rope.scaling.finetuned": (False,),
    "pooling_type": (0,), "logit_scale": (1.0,), "embedding_scale": (1.0,), "residual_scale": (1.0,),
}  # fmt: skip


def from_gguf(file: Path, out: Path) -> Qwen2:
    """Write `out`, a directory in Hugging Face layout, and return the model (bf16, on the CPU).

    UserError where the file is damaged, of another architecture, or states what these families do not do.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with _explained(file):
            reader = _open(file)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            config = _read_config(file, fields, tensors)
            tokenizer_files = write_tokenizer(file, fields, config.vocab_size, Path(scratch))
            with torch.device("meta"):
                model = Qwen2(config, compute_dtype=torch.bfloat16)
            _assign_weights(model, file, tensors)
        token_ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", "eot")}
        model.generation = {
            f"{kind}_token_id": token_ids[name]
            for kind, name in (("bos", "bos"), ("pad", "padding"))
            if token_ids[name] is not None
        }
        turn_end = [token_ids["eot"]] if token_ids["eot"] is not None else []
        save_model(model, out, extra_files=tokenizer_files, stop_tokens=(*turn_end, *turn_ends(Path(scratch))))
    return model


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError:
        raise UserError("reading GGUF needs the package gguf; pip install 'minipersona[gguf]'") from None
    require(file.is_file(), f"{file}: no such file; check the path")

    class Reader(GGUFReader):  # type: ignore[misc, unused-ignore]
        """Alone, gguf's reads empty values beyond the end of a file, as many as a damaged count says."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it ends before byte {end:,}, which it speaks of")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: Any) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                kind, length = self._get(orig_offs, np.uint32)[0], int(self._get(orig_offs + 4, np.uint64)[0])
                if length > MOST_VALUES:
                    raise ValueError(f"a list of {length:,} values; at most {MOST_VALUES:,} are read")
                least = np.dtype(self.gguf_scalar_to_np.get(kind, np.uint64)).itemsize  # bytes; a text has its length
                self._get(orig_offs + 12, np.uint8, length * least)  # the whole list, before its values one by one
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader(file)


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Whatever a reader says of damaged bytes, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # three libraries raise whatever they like
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"{file}: not a GGUF file that can be read ({reason}); fetch it again") from None


# ---------------------------------------------------------------- sizes


def _read_config(file: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> ModelConfig:
    require(
        fields.get("split.count", 0) in (0, 1),
        f"{file}: is one part of several; merge them with llama.cpp's llama-gguf-split --merge",
    )
    family = fields.get("general.architecture")
    require(
        isinstance(family, str) and family in FAMILIES,
        f"{file}: general.architecture is {family!r}; only {', '.join(FAMILIES)} are supported",
    )
    stated = {key.removeprefix(f"{family}."): value for key, value in fields.items() if key.startswith(f"{family}.")}
    for key, value in stated.items():
        known = key in SIZES or key in HEAD_WIDTHS or key == "vocab_size"
        require(known or value in NEUTRAL.get(key, ()), f"{file}: {family}.{key} = {value!r} is not supported")
    raw = {ours: _plain(stated[key]) for key, ours in SIZES.items() if key in stated}
    require("token_embd.weight" in tensors, f"{file}: holds no tensor token_embd.weight; is it a language model?")
    raw["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    raw["tie_word_embeddings"] = "output.weight" not in tensors
    for kind in ("bos", "eos"):
        raw[f"{kind}_token_id"] = fields.get(f"tokenizer.ggml.{kind}_token_id")
    if "head_dim" not in raw and "rope.dimension_count" in stated:
        raw["head_dim"] = stated["rope.dimension_count"]
    config = parse_config(file, {"model_type": family, **raw})
    for key, ours in {**dict.fromkeys(HEAD_WIDTHS, config.head_dim), "vocab_size": config.vocab_size}.items():
        require(
            stated.get(key, ours) == ours, f"{file}: {family}.{key} = {stated.get(key)} is not supported: {ours} is"
        )
    if ROPE_FACTORS in tensors:
        config = replace(config, rope_scaling=_read_scaling(file, _values(tensors[ROPE_FACTORS]), config))
    return config


def _plain(value: Any) -> Any:
    """A number as it was before it was stored in fp32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_scaling(file: Path, factors: Tensor, config: ModelConfig) -> RotaryScaling | None:
    """The scaling whose effect the file holds: (d/2,) by how much each frequency is divided.

    Of Llama 3.1's four numbers, all its successors share three.
    """
    plain = frequencies(config, torch.float64)
    scaling = RotaryScaling(_plain(float(factors.max())), 1.0, 4.0, 8192)
    if factors.shape == plain.shape and bool((factors == 1).all()):
        return None
    require(
        factors.shape == plain.shape and torch.allclose(factors.double(), plain / scaled(plain, scaling), rtol=1e-4),
        f"{file}: {ROPE_FACTORS} is not a scaling of Llama 3.1's kind (low_freq_factor 1, high_freq_factor 4, "
        "original_max_position_embeddings 8192); it is not supported",
    )
    return scaling


# ---------------------------------------------------------------- weights


def _assign_weights(model: Qwen2, file: Path, tensors: dict[str, Any]) -> None:
    expected = expected_shapes(model)
    names = {_name(file, name): name for name in tensors if name != ROPE_FACTORS}
    missing, unknown = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
    if missing:
        raise UserError(f"{file}: holds no tensor for {missing[0]} ({len(missing)} in all); the file is incomplete")
    if unknown:
        raise UserError(
            f"{file}: unknown tensor {names[unknown[0]]}: a {model.config.model_type} network has none such"
        )
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, shape in expected.items():
        values = _values(tensors[names[name]])
        require(tuple(values.shape) == shape, f"{file}: {names[name]} has shape {tuple(values.shape)}, not {shape}")
        owner, _, leaf = name.rpartition(".")
        if model.config.model_type == "llama" and (projection := owner.rpartition(".")[2]) in heads:
            values = halves_apart(values, heads[projection])
        require(bool(torch.isfinite(values.sum())), f"{file}: {names[name]} holds non-finite values; fetch it again")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values.to(torch.bfloat16), requires_grad=False))
    model.tie_head()


def _name(file: Path, name: str) -> str:
    """Hugging Face's name of a tensor."""
    module, _, leaf = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    parts = module.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in BLOCK:
        return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.{leaf}"
    raise UserError(f"{file}: unknown tensor {name}; the file states something that these networks do not have")


def _values(tensor: Any) -> Tensor:
    """A stored tensor in fp32, in the order of dimensions of torch."""
    from gguf import dequantize

    with np.errstate(all="ignore"):  # scales of damaged blocks may be infinite; what is not finite is refused
        values = dequantize(tensor.data, tensor.tensor_type)
    return torch.tensor(np.asarray(values, dtype=np.float32).reshape([int(n) for n in reversed(tensor.shape)]))


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """(heads d, I), rows in llama.cpp's order for Llama -> Hugging Face's.

    There the two channels that are rotated together are neighbours (2i, 2i + 1); here they are i and i + d/2.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
