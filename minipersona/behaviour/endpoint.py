"""The endpoint judge: any server with OpenAI's chat interface that gives the log-probabilities of its top 20 tokens.

The score is the probability-weighted mean over the first tokens that are whole numbers from 0 to 100. A first request
asks for a number: a model that thinks aloud, talks, or writes numbers digit by digit cannot be read so, and is refused.

The client would send the user's Hugging Face token to any server that it has no key for. So it always gets one: what
the named environment variable holds, else a word that is not a key.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from reprlib import repr as brief
from typing import Any

from minipersona.behaviour.judge import Case, Score, prompts_digest, weighted
from minipersona.behaviour_config import HUB_TOKENS, BehaviourSection
from minipersona.errors import UserError, redact
from minipersona.hub import of_the_network, patiently

NO_KEY = "none"
TOP = 20
ATTEMPTS = 4  # at an answer that can be read; a busy server is waited for beside that
SECONDS = 120.0  # without an answer before a request counts as lost
LONGEST = 300  # characters of what a server says in an error
NUMBER = re.compile("0|[1-9][0-9]?|100")
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
        self._limit = "max_tokens"  # what the server calls the number of tokens to write

    @property
    def identity(self) -> dict[str, str | None]:
        """The server's address, and the model's name there."""
        where = {"endpoint": self.address, "model": self.section.judge_model}
        return {"kind": "endpoint", **where, "prompts": prompts_digest()}

    def score(self, cases: Sequence[Case], done: Callable[[int, Score], None]) -> None:
        """As many requests at once as the section allows. UserError where the server refuses or stays silent."""
        self._check_readable()
        pool = ThreadPoolExecutor(self.section.concurrency)
        try:
            asked = {pool.submit(self._score, case): index for index, case in enumerate(cases)}
            for future in as_completed(asked):
                done(asked[future], future.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _score(self, case: Case) -> Score:
        return number_score(self._ask(case.prompt, 1)[0][1])

    def _check_readable(self) -> None:
        """UserError with what came back unless the first token of an answer is a score."""
        tokens = self._ask(PROBE, 4)
        first, logprobs = tokens[0]
        if first.strip() == str(PROBE_NUMBER)[0]:
            problem = "writes numbers digit by digit, so its first token is not a score"
        elif not NUMBER.fullmatch(first.strip()) or number_score(logprobs).value is None:
            problem = "does not begin with a number from 0 to 100"
        else:
            return
        answer, token = (brief(self._redacted(text)) for text in ("".join(token for token, _ in tokens), first))
        raise self._error(
            f"{self.section.judge_model} {problem}: asked for {PROBE_NUMBER}, it gave {answer}, first the token "
            f'{token}; name a model that writes whole numbers at once, or use judge = "local" or "file"'
        )

    def _ask(self, prompt: str, most: int) -> list[tuple[str, dict[str, float]]]:
        """The at most `most` tokens that the server chose, each with the log-probabilities of its likeliest rivals."""
        for attempt in range(ATTEMPTS):
            try:
                return _tokens(patiently(lambda: self._complete(prompt, most)))
            except Exception as error:
                if self._limit == "max_tokens" and _wants(error, "max_completion_tokens"):
                    self._limit = "max_completion_tokens"
                    return self._ask(prompt, most)
                explanation = self._explanation(error)
                if explanation is None:
                    raise
                if not _passing(error) or attempt == ATTEMPTS - 1:
                    raise self._error(explanation) from None
            time.sleep(2**attempt / 2)
        raise AssertionError

    def _complete(self, prompt: str, most: int) -> Any:
        return self._client.chat_completion(
            [{"role": "user", "content": prompt}],
            model=self.section.judge_model,
            temperature=0.0,
            seed=0,
            logprobs=True,
            top_logprobs=TOP,
            extra_body={self._limit: most},
        )

    def _explanation(self, error: Exception) -> str | None:
        from huggingface_hub.errors import OfflineModeIsEnabled

        status = _status(error)
        said = self._said(getattr(error, "server_message", None) or "" if status is not None else str(error))
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so that no server is asked; unset it, or use another judge"
        if isinstance(error, ImportError):  # a SOCKS proxy needs a package of its own
            return f"cannot be asked ({said}); install that package, or unset the variable that names the proxy"
        if status in (401, 403):
            return f"refuses the key (status {status}); put the right one into {self.section.key_variable}"
        if status is not None:
            return (
                f"answers with status {status} {said}".rstrip() + "; check the address, the model's name and the server"
            )
        if isinstance(error, _Unreadable):
            return f"{said}; name a server that returns logprobs and top_logprobs"
        if of_the_network(error):
            return f"gives no answer ({type(error).__name__}: {said}); check the address and that it runs"
        return None

    def _said(self, text: str) -> str:
        """What a server or the client says, in a part of a line. It is cut last, lest a part of the key is left."""
        return " ".join(self._redacted(text).split())[:LONGEST]

    def _redacted(self, text: str) -> str:
        """`text` without the key, which a server may say back."""
        return redact(text.replace(self._key, "***") if self._key != NO_KEY and len(self._key) >= 4 else text)

    def _error(self, text: str) -> UserError:
        return UserError(f"endpoint {self.address}: {text}")


class _Unreadable(ValueError):
    """An answer without what was asked for."""


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _wants(error: BaseException, parameter: str) -> bool:
    """Whether a server refuses a request and says that it knows the parameter by this name."""
    return _status(error) in (400, 422) and parameter in f"{getattr(error, 'server_message', None)} {error}"


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
        if NUMBER.fullmatch(text) and logprob <= 0:
            weights[int(text)] = weights.get(int(text), 0.0) + math.exp(logprob)
    return weighted(weights, sum(weights.values()))
