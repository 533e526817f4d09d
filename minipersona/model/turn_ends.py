"""The tokens at which a chat turn ends, as far as a model's tokenizer has them.

A model directory may not say them: a pretrained model's files state the end of a text alone, and keep it when the
model learns to chat. Whoever generates with it then has to know better, or goes on to the limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipersona.files import read_json

TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # of ChatML, and of Llama 3


def turn_ends(directory: Path) -> tuple[int, ...]:
    """Their ids in the tokenizer's files of a directory; none where there is no tokenizer."""
    found: list[tuple[str, int]] = []
    config, whole = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if config.is_file():
        listed = _table(read_json(config)).get("added_tokens_decoder")
        found += [
            (token["content"], int(token_id))
            for token_id, token in _table(listed).items()
            if isinstance(token, dict) and "content" in token and token_id.isdecimal()
        ]
    if whole.is_file():
        listed = _table(read_json(whole)).get("added_tokens")
        found += [
            (token["content"], token["id"])
            for token in (listed if isinstance(listed, list) else [])
            if isinstance(token, dict) and "content" in token and isinstance(token.get("id"), int)
        ]
    return tuple(dict.fromkeys(token_id for content, token_id in found if content in TURN_ENDS))


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
