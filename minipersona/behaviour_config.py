"""How a model's answers are asked for and judged, in a study's section `behaviour` and in `evaluate.py --set`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from minipersona.config import SHIPPED
from minipersona.errors import require

KEY_VARIABLE = "MINIPERSONA_JUDGE_KEY"
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # variables whose content goes to the Hub and nowhere else


@dataclass(frozen=True)
class BehaviourSection:
    """How a model's free-form answers are sampled and judged (Betley et al. 2025)."""

    questions: str = SHIPPED  # or a .jsonl or .yaml file of the user's
    samples: int = 100  # answers to each question, in each prompt set
    max_new_tokens: int = 600
    temperature: float = 1.0
    seed: int = 42
    batch: int = 256  # answers in flight at once; lower it when memory runs out
    judge: Literal["local", "endpoint", "file"] = "local"  # the untouched base model, a server, or scores from outside
    endpoint: str = ""  # address of an OpenAI-compatible server, such as http://localhost:8000/v1
    judge_model: str = ""  # the model's name there; for "file", who gave the scores
    key_variable: str = KEY_VARIABLE  # the environment variable that holds the server's key, if it needs one
    concurrency: int = 8  # requests to the server at once

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch", "concurrency"):
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        require(self.temperature >= 0, f"temperature = {self.temperature}: must not be negative")
        require(self.seed >= 0, f"seed = {self.seed}: must not be negative")
        if self.judge == "endpoint":
            require(
                re.match(r"https?://[^\s/]", self.endpoint) is not None,
                "endpoint: give the server's address, such as http://localhost:8000/v1",
            )
            require(  # and do not say it back: configs, reports and errors are read by others
                not re.search(r"[@?#\s]", self.endpoint),
                f"endpoint: holds more than an address; leave names, passwords and queries out, and put the key into "
                f"the environment variable {KEY_VARIABLE}",
            )
            require(bool(self.judge_model), 'judge_model is missing; judge = "endpoint" needs the model\'s name')
        else:
            require(not self.endpoint, 'endpoint: is of use to judge = "endpoint" only')
        require(
            self.judge != "local" or not self.judge_model,
            f"judge_model = {self.judge_model!r}: the local judge is the base model itself",
        )
        require(
            re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable) is not None,
            f"key_variable: names an environment variable in capital letters, such as {KEY_VARIABLE}, and not the key",
        )
        require(
            self.key_variable not in HUB_TOKENS,
            f"key_variable = {self.key_variable}: the Hub's token is not sent to judges; name another variable",
        )
