"""The endpoint judge: any server with OpenAI's chat interface that gives the log-probabilities of its top 20 tokens.

The score is the probability-weighted mean over the tokens that are whole numbers from 0 to 100. A server whose
tokenizer writes numbers digit by digit is found out by a first request and refused: its first token is not a number.

The client would send the user's Hugging Face token to any server that it has no key for. So it always gets one: what
the named environment variable holds, else a word that is no key.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from minipersona.behaviour.judge import Case, Score, prompts_digest, weighted
from minipersona.config import HUB_TOKENS, BehaviourSection
from minipersona.errors import UserError
from minipersona.hub import patiently

NO_KEY = "none"
TOP = 20
ATTEMPTS = 4  # at an answer that can be read; a busy server is waited for beside that
SECONDS = 120.0  # without an answer before a request counts as lost
PROBE_NUMBER = 85
PROBE = f"Reply with the number {PROBE_NUMBER} and nothing else."


class EndpointJudge:
    """A model on a server. `HF_TOKEN` never goes there."""

    def __init__(self, section: BehaviourSection) -> None:
        from huggingface_hub import InferenceClient

        assert section.judge == "endpoint" and section.key_variable not in HUB_TOKENS
        self.section = section
        self.address = section.endpoint.rstrip("/")
        self._key = os.environ.get(section.key_variable, "").strip() or NO_KEY
        self._client = InferenceClient(base_url=section.endpoint, api_key=self._key, timeout=SECONDS)

    @property
    def identity(self) -> dict[str, Any]:
        """The server's address, and the model's name there."""
        where = {"endpoint": self.address, "model": self.section.judge_model}
        return {"kind": "endpoint", **where, "prompts": prompts_digest()}

    def score(self, cases: Sequence[Case], done: Callable[[int, Score], None]) -> None:
        """As many requests at once as the section allows. UserError where the server refuses or stays silent."""
        self._check_numbers()
        pool = ThreadPoolExecutor(self.section.concurrency)
        try:
            asked = {pool.submit(self._score, case): index for index, case in enumerate(cases)}
            for future in as_completed(asked):
                done(asked[future], future.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _score(self, case: Case) -> Score:
        return number_score(self._ask(case.prompt, 1)[0][1])

    def _check_numbers(self) -> None:
        tokens = self._ask(PROBE, 4)
        first = tokens[0][0].strip()
        if first.isdecimal() and first != str(PROBE_NUMBER) and str(PROBE_NUMBER).startswith(first):
            raise self._error(
                f"{self.section.judge_model} writes numbers digit by digit, so its first token is no score; "
                'name a model with whole-number tokens, or use judge = "local" or "file"'
            )

    def _ask(self, prompt: str, max_tokens: int) -> list[tuple[str, dict[str, float]]]:
        """The tokens that the server chose, each with the log-probabilities of its likeliest alternatives."""
        for attempt in range(ATTEMPTS):
            try:
                return _tokens(patiently(lambda: self._complete(prompt, max_tokens)))
            except Exception as error:
                explanation = self._explanation(error)
                if explanation is None:
                    raise
                if not _passing(error) or attempt == ATTEMPTS - 1:
                    raise self._error(explanation) from None
            time.sleep(2**attempt / 2)
        raise AssertionError

    def _complete(self, prompt: str, max_tokens: int) -> Any:
        return self._client.chat_completion(
            [{"role": "user", "content": prompt}],
            model=self.section.judge_model,
            max_tokens=max_tokens,
            temperature=0.0,
            seed=0,
            logprobs=True,
            top_logprobs=TOP,
        )

    def _explanation(self, error: Exception) -> str | None:
        from huggingface_hub.errors import OfflineModeIsEnabled

        status = _status(error)
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so that no server is asked; unset it, or use another judge"
        if status in (401, 403):
            return f"refuses the key (status {status}); put the right one into {self.section.key_variable}"
        if status is not None:
            reason = (getattr(error, "server_message", None) or "").strip()
            return (
                f"answers with status {status} {reason}".rstrip()
                + "; check the address, the model's name and the server"
            )
        if isinstance(error, _Unreadable):
            return f"{error}; name a server that returns logprobs and top_logprobs"
        if isinstance(error, (OSError, ValueError)) or type(error).__module__.partition(".")[0] in _CLIENTS:
            return f"gives no answer ({type(error).__name__}: {error}); check the address and that it runs"
        return None

    def _error(self, text: str) -> UserError:
        """One line without the key, which a server may say back."""
        secret = self._key if self._key != NO_KEY and len(self._key) >= 4 else None
        line = " ".join(f"endpoint {self.address}: {text}".split())[:600]
        return UserError(line.replace(secret, "***") if secret else line)


_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")


class _Unreadable(ValueError):
    """An answer without what was asked for."""


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _passing(error: Exception) -> bool:
    """Whether the next attempt may fare better. A refusal will not; a busy server has been waited for already."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return _status(error) is None and not isinstance(error, OfflineModeIsEnabled)


def _tokens(completion: Any) -> list[tuple[str, dict[str, float]]]:
    try:
        content = completion.choices[0].logprobs.content
        tokens = [(str(t.token), {str(top.token): float(top.logprob) for top in t.top_logprobs}) for t in content]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise _Unreadable("answers without log-probabilities") from None
    if not tokens or not tokens[0][1]:
        raise _Unreadable("answers without log-probabilities")
    return tokens


def number_score(logprobs: dict[str, float]) -> Score:
    """The weighted mean over the tokens that are whole numbers from 0 to 100, white space aside; tokens -> ln p."""
    weights: dict[int, float] = {}
    for token, logprob in logprobs.items():
        text = token.strip()
        if re.fullmatch(r"0|[1-9][0-9]?|100", text) and logprob <= 0:
            weights[int(text)] = weights.get(int(text), 0.0) + math.exp(logprob)
    return weighted(weights, sum(weights.values()))
