"""A hub on loopback: as much of the Hugging Face Hub's API as its client calls, and raw files of pinned repositories.

It counts the bytes that it serves of each file, and fails when it is told to. Large files are redirected to, as the
Hub does it. The client reads its environment once, when it is imported, so it is used in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from forking import run_code

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".parquet")  # what the Hub keeps in large-file storage

SCRIPT = """
import json, time
time.sleep = lambda seconds: None  # attempts follow one another at once
from minipersona.errors import UserError
def error_of(call):
    try:
        call()
    except UserError as error:
        return str(error)
try:
CODE
except UserError as error:
    result = {"error": str(error)}
print(json.dumps(result))
"""


@dataclass
class Repository:
    files: Mapping[str, bytes]
    commit: str = COMMIT
    token: str = ""  # without it a private repository is not even seen
    gated: bool = False  # seen by all, its files by none


@dataclass
class Fault:
    """What goes wrong with the next requests whose path holds `part`."""

    part: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    break_off: int = 0  # in place of a status: after so many bytes of a body that is longer


class LoopbackHub:
    """Use it as a context; `repositories` are keyed "models/OWNER/NAME" and "datasets/OWNER/NAME"."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repositories: dict[str, Repository] = {}
        self.raw: dict[str, bytes] = {}  # by OWNER/REPO/COMMIT/PATH
        self.faults: list[Fault] = []
        self.served: Counter[str] = Counter()  # bytes of file content, by path in the repository
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, path: str, body: int = 0) -> Fault | None:
        """The fault that befalls a request; with the length of its body, one that breaks it off."""
        with self._lock:
            for fault in self.faults:
                hits = 0 < fault.break_off < body if body else fault.status > 0
                if hits and fault.times and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    def count(self, path: str, sent: int) -> None:
        with self._lock:
            self.served[path] += sent

    def run(self, code: str, **environment: str) -> Any:
        """What `code` leaves in `result`, run against this hub; {"error": line} after a UserError."""
        script = SCRIPT.replace("CODE", textwrap.indent(textwrap.dedent(code).strip(), "    "))
        done = run_code(script, environment=self._environment(environment))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def process(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A Python process whose hub this is."""
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[1],
            env=self._environment(environment),
        )

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MINIPERSONA_RAW_BASE": f"{self.url}/raw",
            "OMP_NUM_THREADS": "1",
            **more,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        fault = self.hub.take_fault(path)
        if fault is not None:
            self._answer(fault.status, b"", fault.headers)
        elif path in ("/", "/raw"):  # asked whether it is there
            self._answer(200, b"")
        elif path.startswith("/raw/"):
            content = self.hub.raw.get(path.removeprefix("/raw/"))
            if content is None:
                self._answer(404, b"no such file")
            else:
                self._file(content, path, {})
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), query)
        else:
            self._resolve(path.removeprefix("/"))

    # ---------------------------------------------------------------- the API

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        kind, owner, name, *rest = path.split("/")
        repository = self._repository(f"{kind}/{owner}/{name}")
        if repository is None:
            return
        action, revision, *folders = rest or ["revision", "main"]
        if revision not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif action == "revision":
            info = {"id": f"{owner}/{name}", "sha": repository.commit, "private": bool(repository.token)}
            self._json({**info, "siblings": [{"rfilename": file} for file in repository.files]})
        else:
            assert action == "tree", path
            self._tree(repository, "/".join(folders), query.get("recursive", [""])[0].lower() in ("1", "true"))

    def _tree(self, repository: Repository, folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in repository.files.items():
            if not path.startswith(prefix):
                continue
            first, slash, _ = path.removeprefix(prefix).partition("/")
            if slash and not recursive:
                entries[first] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + first}
                continue
            entry: dict[str, Any] = {"type": "file", "oid": _etag(content)[:40], "size": len(content), "path": path}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
            entries[path] = entry
        if not entries and folder:
            self._refuse(404, "EntryNotFound", f"{folder} does not exist on {repository.commit}")
        else:
            self._json(list(entries.values()))

    # ---------------------------------------------------------------- files

    def _resolve(self, path: str) -> None:
        stored = path.startswith("storage/")  # where redirections lead
        path = path.removeprefix("storage/")
        if not path.startswith("datasets/"):
            path = f"models/{path}"
        kind, owner, name, _, revision, *rest = path.split("/")
        repository, file = self._repository(f"{kind}/{owner}/{name}"), "/".join(rest)
        if repository is None:
            return
        content = repository.files.get(file)
        if repository.gated:
            sent = self.headers.get("Authorization", "nothing")
            self._refuse(403, "GatedRepo", f"Access to {owner}/{name} is restricted. You sent {sent}.")
        elif revision not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{_etag(content)}"'}
            if file.endswith(LARGE) and not stored:
                linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"]}
                location = f"{self.hub.url}/storage/{path.removeprefix('models/')}"
                self._answer(302, b"", {**headers, **linked, "Location": location})
            else:
                self._file(content, file, headers)

    def _file(self, content: bytes, name: str, headers: dict[str, str]) -> None:
        first, last, status = 0, len(content) - 1, 200
        if asked := self.headers.get("Range"):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(end or last), last), 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        body = content[first : last + 1]
        sent = body
        if self.command == "GET":
            fault = self.hub.take_fault(name, len(body))
            sent = body if fault is None else body[: fault.break_off]
            self.hub.count(name, len(sent))
        self._answer(status, body, {**headers, "Accept-Ranges": "bytes"}, sent)

    def _repository(self, key: str) -> Repository | None:
        repository = self.hub.repositories.get(key)
        if repository is None or (
            repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}"
        ):
            self._refuse(401, "RepoNotFound", "Repository not found")
            return None
        return repository

    # ---------------------------------------------------------------- answers

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, sent: bytes | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent is None else sent)
            self.close_connection |= sent is not None and len(sent) < len(body)


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
