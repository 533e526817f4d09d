"""Chat formats: the tokenizer, the templates of the model families, and which tokens are supervised."""

from __future__ import annotations

from minipersona.chat.template import TEMPLATES
from minipersona.chat.tokenizer import ChatTokenizer, Document, load_tokenizer

__all__ = ["TEMPLATES", "ChatTokenizer", "Document", "load_tokenizer"]
