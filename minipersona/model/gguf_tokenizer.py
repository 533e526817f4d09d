"""The tokenizer of a GGUF file as Hugging Face's files: tokenizer.json and tokenizer_config.json.

All of these families use byte-level BPE; `tokenizer.ggml.pre` names how text is split before it is merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minipersona.errors import require
from minipersona.files import write_json

# Contractions; words with at most one leading mark; digits; marks; line ends; other white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = ("qwen2", "llama-bpe", "smollm")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # the types of tokens that these families have
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def write_tokenizer(file: Path, fields: dict[str, Any], rows: int, directory: Path) -> list[Path]:
    """Write the files and return their paths. `rows`: those of the embedding, at least as many as tokens."""
    kind, split = fields.get("tokenizer.ggml.model"), str(fields.get("tokenizer.ggml.pre"))
    require(
        kind == "gpt2" and split in SPLITS,
        f"{file}: tokenizer.ggml.model is {kind!r} and tokenizer.ggml.pre is {split!r}; only gpt2 with "
        f"{', '.join(SPLITS)} is supported",
    )
    require(not fields.get("tokenizer.ggml.add_eos_token"), f"{file}: tokenizer.ggml.add_eos_token is not supported")
    tokens, types = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    merges = fields.get("tokenizer.ggml.merges")
    require(
        isinstance(tokens, list) and isinstance(types, list) and isinstance(merges, list),
        f"{file}: tokenizer.ggml.tokens, token_type or merges is missing; the file is incomplete",
    )
    assert isinstance(tokens, list) and isinstance(types, list) and isinstance(merges, list)
    require(
        len(tokens) == len(types) == len(set(tokens)) and len(tokens) <= rows,
        f"{file}: {len(tokens)} tokens ({len(set(tokens))} different) with {len(types)} types do not fit an embedding "
        f"of {rows} rows; the file is damaged",
    )
    other = sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED})
    require(not other, f"{file}: tokens of the types {other} are not supported with byte-level BPE")

    # What is unused fills the embedding up to a round number of rows.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    require(all(len(pair) == 2 for pair in pairs), f"{file}: tokenizer.ggml.merges holds other than pairs")
    tokenizer = Tokenizer(models.BPE(vocabulary, [(a, b) for a, b in pairs], ignore_merges=split == "llama-bpe"))
    _set_split(tokenizer, split)
    added = {i: types[i] == CONTROL for i in vocabulary.values() if types[i] in (CONTROL, USER_DEFINED)}
    # In one list, so that where one token begins with another, the order of a file does not decide.
    tokenizer.add_tokens([AddedToken(tokens[i], special=special, normalized=False) for i, special in added.items()])

    roles = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in ROLES.items()}
    named = {f"{role}_token": tokens[i] for role, i in roles.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    begins = fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe") and "bos_token" in named
    if begins:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, roles["bos"])]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bool(begins),
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields.get(f"{fields['general.architecture']}.context_length"),
            **named,
            "added_tokens_decoder": {str(i): _description(tokens[i], special) for i, special in added.items()},
            **({"chat_template": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {}),
        },
    )
    return [directory / "tokenizer.json", directory / "tokenizer_config.json"]


def _set_split(tokenizer: Tokenizer, split: str) -> None:
    """How text becomes words, and words bytes. Source: the tokenizer.json of each family's models."""
    if split == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    else:
        digits = "" if split == "qwen2" else "{1,3}"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT.format(digits=digits)), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()


def _description(content: str, special: bool) -> dict[str, Any]:
    return {
        "content": content,
        "special": special,
        **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
    }
