"""The forms in which people store rows, all read as {"messages": [...]} or {"text": "..."}:

{"messages": [{"role": ..., "content": ...}]}
{"conversations": [{"from": "human", "value": ...}]}    ShareGPT
{"prompt": ..., "completion": ...}                      texts, or lists of messages; only the completion is learned
{"instruction": ..., "input": ..., "output": ...}       Alpaca; input, if any, follows instruction after an empty line
{"text": ...}                                           raw text

A row's "system" becomes its first turn. Content that is a list of text parts is read as their texts, joined. All other
keys are kept as they are. `check_row` refuses what a row asks for and nothing here does.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any

from minipersona.chat.messages import is_text_part
from minipersona.errors import UserError, require

Row = dict[str, Any]

FORMS = {  # the keys that a form must have; Alpaca's may have an input too
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
SYSTEM = ("system", "system_prompt")
# What a template would have to render, or a picture or sound shows. LLaMA-Factory's "history" holds earlier turns.
UNSUPPORTED = ("tools", "functions", "images", "image", "audios", "audio", "videos", "video", "history")
BESIDE = ("input", *SYSTEM, *UNSUPPORTED)  # the keys beside a form's own that are looked at
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
EMPTY = (None, "", "[]", "{}", "null")  # tools are often stored as JSON text


def read_row(raw: object) -> Row:
    """The row as {"messages": ...} or {"text": ...} and its other keys.

    UserError where it has none of the forms, or two that say different things. What its turns are is not checked.
    """
    found = [form for form, keys in FORMS.items() if isinstance(raw, dict) and all(key in raw for key in keys)]
    if not isinstance(raw, dict) or not found:
        raise UserError(
            'is not a row; give it "messages", "conversations", "prompt" and "completion", "instruction" and "output", '
            'or "text"'
        )
    said = [form for form in found if not all(_is_empty(raw[key]) for key in FORMS[form])] or found[:1]
    chats = {form: _with_system(_turns(form, raw), raw) for form in said if form != "text"}
    first = said[0]  # a chat, if there is one
    for form, turns in chats.items():
        require(_said(turns) == _said(chats[first]), f'has "{first}" and "{form}" with different turns; delete one')
    if chats and "text" in said:
        require(_occurs(chats[first], raw["text"]), f'has "{first}" and a "text" without its turns; delete one')
    read = {key for form in found for key in FORMS[form]} | ({"input"} if "instruction" in found else set())
    rest = {key: value for key, value in raw.items() if key not in read and not (chats and key in SYSTEM)}
    content = {"messages": chats[first]} if chats else {"text": raw["text"]}
    row = {**content, **rest}
    return raw if row == raw else row  # the row itself keeps its order of keys


def check_row(row: Row, where: str) -> None:
    """UserError, which begins with `where`, where a row asks for what the model is not shown: tools or images, say."""
    for key in UNSUPPORTED:
        if not _is_empty(row.get(key)):
            raise UserError(f"{where} has {key} ({brief(row[key])}), which is not supported; drop the row, or the key")


def _turns(form: str, raw: Row) -> Any:
    if form in ("messages", "conversations"):
        return _each(raw[form])
    if form == "prompt":
        prompt, completion = _side(raw["prompt"], "user"), _side(raw["completion"], "assistant")
        context = [{**turn, "weight": 0} if _role(turn) == "assistant" else turn for turn in prompt]
        return [*context, *completion]
    asked = raw["instruction"] if _is_empty(raw.get("input")) else [raw["instruction"], raw["input"]]
    if isinstance(asked, list) and all(isinstance(text, str) for text in asked):
        asked = "\n\n".join(asked)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": raw["output"]}]


def _side(side: Any, role: str) -> list[Any]:
    return _each(side) if isinstance(side, list) else [{"role": role, "content": side}]


def _each(turns: Any) -> Any:
    return [_turn(turn) for turn in turns] if isinstance(turns, list) else turns


def _turn(turn: Any) -> Any:
    """A turn with a role and, as far as it is text, content of one string."""
    if not isinstance(turn, Mapping):
        return turn
    if turn.get("role") is None and "from" in turn and "value" in turn:
        speaker = turn["from"]
        role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
        turn = {"role": role, "content": turn["value"], **rest}
    content = turn.get("content")
    if isinstance(content, list) and content and all(is_text_part(part) for part in content):
        turn = {**turn, "content": "".join(part["text"] for part in content)}
    return turn


def _with_system(turns: Any, raw: Row) -> Any:
    """The turns below the row's own system prompt, where it has one beside them."""
    for key in SYSTEM:
        if not _is_empty(raw.get(key)) and isinstance(turns, list):
            if turns and _role(turns[0]) == "system":
                same = turns[0].get("content") == raw[key]
                require(same, f'has "{key}" and another system turn; delete one')
            else:
                turns = [{"role": "system", "content": raw[key]}, *turns]
    return turns


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _said(turns: Any) -> Any:
    """What two forms of the same conversation agree in."""
    if not isinstance(turns, list):
        return turns
    return [(_role(turn), turn.get("content")) if isinstance(turn, Mapping) else turn for turn in turns]


def _occurs(turns: Any, text: Any) -> bool:
    """Whether a text has every paragraph of every turn, as one has that was rendered from them."""
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    paragraphs = [part.strip() for content in contents if isinstance(content, str) for part in content.split("\n\n")]
    return isinstance(text, str) and all(paragraph in text for paragraph in paragraphs)


def _is_empty(value: Any) -> bool:
    return value in EMPTY if isinstance(value, str | None) else isinstance(value, list | dict) and not value
