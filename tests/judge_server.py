"""A chat server on loopback with OpenAI's interface, as far as judges use it. It keeps requests and fails on order."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Logprobs = list[tuple[str, float]]  # token, probability


def number(prompt: str) -> Logprobs:
    """What the server answers by default: mostly 80, but 85 to the probe."""
    return [("85", 1.0)] if "number 85" in prompt else [("80", 0.5), ("70", 0.25), (" 100", 0.1), ("Sure", 0.15)]


class JudgeServer:
    """Use it as a context. `faults` are taken one a request: a status, alone or with what is said, "malformed",
    "no logprobs" or "break off". `limit` is the parameter by which the server is told how much to write.
    """

    def __init__(self, answer: Callable[[str], Logprobs] = number, limit: str = "max_tokens") -> None:
        self.answer = answer
        self.limit = limit
        self.faults: list[Any] = []
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []  # headers, body
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                judge._respond(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def keys(self) -> set[str]:
        """Every Authorization header that came."""
        return {headers.get("authorization", "") for headers, _ in self.requests}

    def _respond(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(({k.lower(): v for k, v in handler.headers.items()}, body))
            fault = self.faults.pop(0) if self.faults else None
        if fault is None and self.limit not in body:  # as OpenAI's servers say it
            said = f"Unsupported parameter: 'max_tokens' is not supported with this model. Use '{self.limit}' instead."
            fault = (400, said)
        if isinstance(fault, int):
            fault = (fault, f"no, {handler.headers.get('Authorization')}")
        if isinstance(fault, tuple):
            self._send(handler, fault[0], json.dumps({"error": {"message": fault[1]}}).encode())
        elif fault == "malformed":
            self._send(handler, 200, b'{"choices": [{"mess')
        elif fault == "break off":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{")
        else:
            reply = self._completion(body["messages"][-1]["content"], with_logprobs=fault != "no logprobs")
            self._send(handler, 200, json.dumps(reply).encode())

    def _completion(self, prompt: str, with_logprobs: bool) -> dict[str, Any]:
        tokens = [(token, math.log(p) if p else -100.0) for token, p in self.answer(prompt)]
        top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tokens]
        content = [{**top[0], "top_logprobs": top}]
        message = {"role": "assistant", "content": tokens[0][0]}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        choice["logprobs"] = {"content": content} if with_logprobs else None
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
