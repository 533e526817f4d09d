"""Qwen2.5's chat format: the tokenizer, the template, and which tokens are supervised."""

from __future__ import annotations

from minipersona.chat.template import DEFAULT_SYSTEM_PROMPT, render
from minipersona.chat.tokenizer import ChatTokenizer, Document, load_tokenizer

__all__ = ["DEFAULT_SYSTEM_PROMPT", "ChatTokenizer", "Document", "load_tokenizer", "render"]
