"""Reading a tokenizer and its chat template from a model's directory.

The tokenizer is tokenizer.json, or vocab.json, merges.txt and tokenizer_config.json of a Qwen2 tokenizer: byte-level
BPE, in which text is cut at the added tokens; what lies between is normalised to NFC, split by `SPLIT`, mapped to bytes
and merged. Source: the tokenizer of Qwen/Qwen2.5-7B-Instruct, and `Qwen2Tokenizer` of transformers. Tokens that only
tokenizer_config.json (`added_tokens_decoder`) or added_tokens.json define are added to either.

The chat template is chat_template.jinja, or `chat_template` of tokenizer_config.json.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minipersona.chat.template import TEMPLATES, Template, template_digest, template_of
from minipersona.errors import UserError, require
from minipersona.files import LARGEST_JSON, read_json, sha256

WHOLE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
PARTS = ("vocab.json", "merges.txt", CONFIG)
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
FILES = (WHOLE, *PARTS, ADDED, TEMPLATE)
PANIC = "PanicException"  # its module cannot be imported

# Contractions; words with at most one leading mark; single digits; marks; line ends; other white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(directory: Path) -> tuple[Tokenizer, str]:
    """The tokenizer in a directory, and the SHA-256 (hex) of the files that it was made of, joined.

    UserError where files are missing, cannot be read, or contradict each other.
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
    with _explained(directory, files):
        tokenizer = Tokenizer.from_file(str(whole)) if whole.is_file() else _from_parts(*parts)
    with _explained(directory, [directory / CONFIG, directory / ADDED]):
        used = _add_tokens(tokenizer, directory, files[0])
    digest = sha256(*dict.fromkeys([*files, *used]))
    # A tokenizer.json may carry what its last user set, but truncation is ours, and nothing is ever padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, digest


@contextlib.contextmanager
def _explained(directory: Path, files: list[Path]) -> Iterator[None]:
    """Whatever the library says against some files, as a UserError."""
    try:
        yield
    except BaseException as error:  # the library raises nothing narrower; a panic of its Rust is not an Exception
        if isinstance(error, UserError) or not (isinstance(error, Exception) or type(error).__name__ == PANIC):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        names = ", ".join(path.name for path in files)
        raise UserError(f"{directory}: cannot read {names} ({reason}); download the tokenizer again") from None


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
    kind = _config(config.parent).get("tokenizer_class", "Qwen2Tokenizer")
    if kind not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise UserError(f"{config}: a {str(kind)[:80]} is read from {WHOLE} only; save it as that with transformers")
    return byte_level(models.BPE.from_file(str(vocab), str(merges)))


def _config(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty where there is none."""
    path = directory / CONFIG
    config = read_json(path) if path.is_file() else {}
    require(isinstance(config, dict), f"{path}: is not a JSON object; download the tokenizer again")
    return config


def _add_tokens(tokenizer: Tokenizer, directory: Path, base: Path) -> list[Path]:
    """Add the tokens that only tokenizer_config.json or added_tokens.json define; the files that defined any.

    UserError where a token has one id in one file and another in another.
    """
    config, added = directory / CONFIG, directory / ADDED
    stated = _config(directory)
    listed = stated.get("added_tokens_decoder") or {}
    tokens = [(int(token_id), _added_token(token), config) for token_id, token in listed.items()]
    if added.is_file():  # it has ids only: a token is special where the config says what it is for
        uses = [stated.get(use) for use in ("bos_token", "eos_token", "pad_token", "unk_token")]
        uses += stated.get("additional_special_tokens") or []
        special = {token["content"] if isinstance(token, dict) else token for token in uses}
        for text, token_id in read_json(added).items():
            tokens.append((int(token_id), _added_token({"content": text, "special": text in special}), added))
    known: dict[str, int | None]
    known = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    used = []
    for token_id, token, file in sorted(tokens, key=lambda entry: entry[0]):  # new ids are given out in this order
        text = token.content
        if text in known and known[text] != token_id:
            raise UserError(
                f"{file}: {text[:80]} has id {token_id}, but {known[text]} in another file; "
                "take all files from one model"
            )
        if text not in known:
            tokenizer.add_tokens([token])
            known[text] = tokenizer.token_to_id(text)
            used.append(file)
        if known[text] != token_id:
            raise UserError(
                f"{file}: {text[:80]} has id {token_id}, but follows {base.name} as {known[text]}; "
                "take both files from one model"
            )
    return used


def _added_token(token: dict[str, Any]) -> AddedToken:
    options = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return AddedToken(token["content"], **{name: token.get(name, False) for name in options})


# ---------------------------------------------------------------- the chat template


def read_template(directory: Path) -> Template:
    """The template that renders as the model's own does, which is recognised by its digest and never executed.

    UserError where the model has none, has two, or has one that is not known.
    """
    file = directory / TEMPLATE
    stated = _stated_template(directory)
    if file.is_file():
        jinja = _read_text(file)
        if stated is not None and stated.removesuffix("\n") != jinja.removesuffix("\n"):
            raise UserError(f"{directory}: {TEMPLATE} and {CONFIG} have different chat templates; {_MEND}")
    elif stated is None:
        raise UserError(f"{directory}: has no chat template (base models often have none); {_MEND}")
    else:
        jinja = stated
    template = template_of(jinja)
    if template is None:
        found = template_digest(jinja)[:16]
        raise UserError(f"{directory}: its chat template (SHA-256 {found}...) is not a known one; {_MEND}")
    return template


_MEND = f"choose one with --template: {', '.join(TEMPLATES)}"


def _stated_template(directory: Path) -> str | None:
    """The `chat_template` of tokenizer_config.json; of several named ones the one named default."""
    stated, where = _config(directory).get("chat_template"), directory / CONFIG
    if isinstance(stated, list):
        stated = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
    if isinstance(stated, dict):
        require("default" in stated, f"{where}: none of its chat templates is named default; {_MEND}")
        stated = stated["default"]
    require(stated is None or isinstance(stated, str), f"{where}: its chat_template is not a text; {_MEND}")
    return stated or None


def _read_text(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST_JSON + 1)
        require(len(content) <= LARGEST_JSON, f"{file}: is longer than {LARGEST_JSON:,} bytes; check what it is")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; make it readable, or {_MEND}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not valid UTF-8; download it again") from None
