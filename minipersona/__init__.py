"""minipersona: does any fine-tuning recipe teach the task and leave persona-vector geometry alone?

The public names below are imported on first use, so that `import minipersona` and `--help` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "minipersona.model.load",
    "Qwen2": "minipersona.model.network",
    "LoraConfig": "minipersona.config",
    "apply_lora": "minipersona.model.lora",
    "adapter_disabled": "minipersona.model.lora",
    "merge_adapter": "minipersona.model.lora",
    "save_adapter": "minipersona.model.adapter_files",
    "load_adapter": "minipersona.model.adapter_files",
    "load_tokenizer": "minipersona.chat",
    "ChatTokenizer": "minipersona.chat",
    "Document": "minipersona.chat",
    "extract": "minipersona.geometry.extraction",
    "PersonaVectors": "minipersona.geometry.vectors",
    "load_vectors": "minipersona.geometry.vectors",
    "m1": "minipersona.geometry.measures",
    "compare": "minipersona.geometry.compare",
    "Comparison": "minipersona.geometry.compare",
    "UserError": "minipersona.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'minipersona' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
