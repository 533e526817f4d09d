"""Reading a Qwen2 tokenizer from disk: tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json.

Byte-level BPE: text is cut at the added tokens; what lies between is normalised to NFC, split by `SPLIT`,
mapped to bytes and merged. Source: the tokenizer of Qwen/Qwen2.5-7B-Instruct, and `Qwen2Tokenizer` of
transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minipersona.errors import UserError
from minipersona.files import LARGEST_JSON, read_json, sha256

WHOLE = "tokenizer.json"
PARTS = ("vocab.json", "merges.txt", "tokenizer_config.json")
FILES = (WHOLE, *PARTS)
PANIC = "PanicException"  # its module cannot be imported

# Contractions; words with at most one leading mark; single digits; marks; line ends; other white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(directory: Path) -> tuple[Tokenizer, str]:
    """The tokenizer in a directory, and the SHA-256 (hex) of what was read.

    That is tokenizer.json if it is there, else the three `PARTS`, whose contents are joined for the digest.
    UserError where files are missing or cannot be read.
    """
    whole, parts = directory / WHOLE, [directory / name for name in PARTS]
    missing = [path.name for path in parts if not path.is_file()]
    if not whole.is_file() and missing:
        raise UserError(
            f"{directory}: holds no tokenizer (no {WHOLE}, and no {', '.join(missing)}); "
            "copy the model's tokenizer files there, or name another tokenizer"
        )
    files = [whole] if whole.is_file() else parts
    for file in files:
        if file.stat().st_size > LARGEST_JSON:
            raise UserError(f"{file}: is longer than {LARGEST_JSON:,} bytes; check that it is a tokenizer's")
    try:
        tokenizer = Tokenizer.from_file(str(whole)) if whole.is_file() else _from_parts(*parts)
        digest = sha256(*files)
    except BaseException as error:  # the library raises nothing narrower; a panic of its Rust is no Exception
        if isinstance(error, UserError) or not (isinstance(error, Exception) or type(error).__name__ == PANIC):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        names = ", ".join(path.name for path in files)
        raise UserError(f"{directory}: cannot read {names} ({reason}); download the tokenizer again") from None
    # A tokenizer.json may carry what its last user set, but truncation is ours, and nothing is ever padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, digest


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer around `model` that normalises, splits and decodes text as Qwen2.5's does."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_parts(vocab: Path, merges: Path, config: Path) -> Tokenizer:
    tokenizer = byte_level(models.BPE.from_file(str(vocab), str(merges)))
    listed = read_json(config).get("added_tokens_decoder", {})
    added = sorted((int(token_id), token) for token_id, token in listed.items())
    tokenizer.add_tokens([_added_token(token) for _, token in added])  # ids are given out in this order
    for token_id, token in added:
        actual = tokenizer.token_to_id(token["content"])
        if actual != token_id:
            raise UserError(
                f"{config}: {token['content']} has id {token_id}, but follows {vocab.name} as {actual}; "
                "take both files from one model"
            )
    return tokenizer


def _added_token(token: dict[str, Any]) -> AddedToken:
    options = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return AddedToken(token["content"], **{name: token.get(name, False) for name in options})
