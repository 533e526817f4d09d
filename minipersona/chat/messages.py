"""A conversation as data: a list of turns {"role", "content"}, and what is refused in one."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any

from minipersona.errors import UserError

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]  # {"role": one of ROLES, "content": str}

# Keys of a turn that the official templates render, or that other trainers learn from, and we do not.
NOT_RENDERED = ("tool_calls", "function_call", "reasoning_content", "images", "audio", "videos")


def check_messages(messages: object) -> None:
    """UserError unless this is a non-empty list of {"role": system, user or assistant, "content": str}.

    An assistant turn may have a "weight" of 0 (it is context, and not learned) or 1. Other keys are ignored, as the
    official templates ignore them, except those of `NOT_RENDERED`, which must be empty.
    """
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages is {_kind(messages)}; give a list of {{role, content}} turns")
    if not messages:
        raise UserError("messages is empty; give at least one turn, or drop the row")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where} is {_kind(message)}; give an object with role and content")
        if message.get("role") not in ROLES:
            role = brief(message["role"]) if "role" in message else "missing"
            raise UserError(f"{where}: role is {role}; use system, user or assistant, or drop the row")
        for key in NOT_RENDERED:
            if message.get(key):
                raise UserError(f"{where} has {key}, which is not learned; write it into content, or drop the row")
        if message.get("weight") is not None:
            _check_weight(message, where)
        if "content" not in message:
            raise UserError(f"{where} has no content; give a string, or drop the row")
        check_text(message["content"], f"{where}: content")


def is_learned(message: Message) -> bool:
    """Whether a checked turn may be learned: an assistant's, without a weight of 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def check_text(text: object, what: str) -> None:
    """UserError unless `text` is a string that UTF-8 can hold."""
    if isinstance(text, list) and (part := next((part for part in text if not is_text_part(part)), None)) is not None:
        kind = brief(part.get("type")) if isinstance(part, Mapping) else _kind(part)
        raise UserError(f"{what} is of type list and has a part that is not text ({kind}); drop the row")
    if not isinstance(text, str):
        raise UserError(f"{what} is {_kind(text)}; give one string, or drop the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON allows half of a surrogate pair, a tokenizer does not
        culprit = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError(f"{what} holds a lone surrogate ({culprit}); replace it, or drop the row") from None


def is_text_part(part: object) -> bool:
    """Whether a part of a content list is {"type": "text", "text": str}."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_weight(message: Message, where: str) -> None:
    weight = message["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(f"{where}: weight is {brief(weight)}; only 0 (not learned) and 1 are supported")
    if weight == 1 and message["role"] != "assistant":
        raise UserError(f"{where}: weight is 1 on a {message['role']} turn; only assistant turns are learned")


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
