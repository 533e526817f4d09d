"""Tokens, keys and passwords are used and never shown: not in errors, tracebacks or logs, nor in anything written."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, LoopbackHub, Repository

from minipersona.errors import redact

TOKEN = "hf_canaryCanaryCanary00"
PASSWORD = "canary-Passw0rd"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "home") as hub:
        yield hub


def secrets(hub: LoopbackHub) -> dict[str, str]:
    """An environment full of secrets, one of them in the hub's own address."""
    return {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": hub.url.replace("://", f"://someone:{PASSWORD}@"),
        "MINIPERSONA_RAW_BASE": hub.url.replace("://", f"://someone:{PASSWORD}@") + "/raw",
        "JUDGE_API_KEY": "canary-Api-key",
    }


def shown(text: str) -> bool:
    encoded = base64.b64encode(f"someone:{PASSWORD}".encode()).decode()  # as it is sent
    return any(secret in text for secret in (TOKEN, PASSWORD, encoded, "canary"))


FAULTS = {
    "nothing": [],
    "refused": [Fault("", times=99, status=401, headers={"X-Error-Message": f"token {TOKEN} for canary-Api-key"})],
    "forbidden": [Fault("", times=99, status=403)],
    "broken": [Fault("", times=99, status=500)],
    "redirected": [Fault("", times=99, status=418, headers={"X-Error-Message": f"http://someone:{PASSWORD}@x/?a=b"})],
}

CALLS = """
import traceback
from minipersona.errors import UserError
from minipersona.corpus.sources import read_source
from minipersona.geometry.prompts import load_personas
from minipersona.hub import locate
from minipersona.chat import load_tokenizer
calls = [
    lambda: locate("me/model", ["config.json"]),
    lambda: locate("Qwen/Qwen2.5-7B-Instruct", ["config.json"]),  # pinned: the client itself asks again, and logs it
    lambda: locate("http://someone:canary@host/model", ["config.json"]),
    lambda: load_tokenizer("me/model"),
    lambda: read_source("hub:me/data/x.jsonl"),
    lambda: read_source("tulu[0:2]"),
    lambda: load_personas("registered"),
]
result = []
for call in calls:
    try:
        call()
    except UserError:
        result.append(traceback.format_exc())
"""


@pytest.mark.parametrize("fault", [*FAULTS, "gone"])
def test_no_error_or_traceback_of_the_hub_shows_one(hub: LoopbackHub, fault: str) -> None:
    hub.faults = FAULTS.get(fault, [])
    environment = secrets(hub)
    if fault == "gone":
        hub.close()
    done = hub.process("-c", f"import time\ntime.sleep = lambda s: None\n{CALLS}\nprint(*result)", **environment)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^minipersona\.errors\.\w+: ", done.stdout, re.M)) == 7  # each call failed, and said so
    assert not shown(done.stdout + done.stderr), done.stdout + done.stderr
    if fault == "refused":
        assert any(shown(" ".join(headers.values())) for _, _, headers in hub.requests)  # the control: they are used


def test_no_command_shows_or_writes_one(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.repositories["datasets/me/data"] = Repository({"x.jsonl": b'{"text": "row"}\n'}, gated=True)
    out = tmp_path / "run"
    base = ["--debug", "--config", "tiny_phase1", "--out", str(out)]
    for command in (
        ["train", *base, "--set", "data.train=hub:me/data/x.jsonl"],
        ["extract", "--debug", "--model", "me/absent"],
    ):
        done = hub.process("-m", "minipersona", *command, **secrets(hub))
        assert done.returncode == 2 and "Traceback" in done.stderr and "\nerror: " in done.stderr, done.stderr
        last = done.stderr.rstrip().splitlines()[-1]
        assert not shown(done.stdout + done.stderr), last
    written = [path for folder in (out, hub.home) if folder.exists() for path in folder.rglob("*") if path.is_file()]
    assert not any(shown(path.read_bytes().decode("latin-1")) for path in written)


def test_what_counts_as_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12")
    monkeypatch.setenv("MY_PASSWORD", "short")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pass-word@proxy:80")
    for text, expected in {
        "key abcdefgh12 refused": "key *** refused",
        "at http://me:pass-word@proxy:80/x": "at http://***@proxy:80/x",
        "nonnumeric port: 'pass-word@proxy:80'": "nonnumeric port: '***@proxy:80'",
        f"x {TOKEN} y": "x *** y",
        "Authorization: Bearer abc.def": "Authorization: Bearer ***",
        "You sent Basic c29tZW9uZTpw": "You sent Basic ***",
        "http://host/file?Signature=abc&x=y now": "http://host/file?*** now",
        "sk-proj-0123456789abcdefXYZ": "***",
        "a short word, me/model at main": "a short word, me/model at main",  # the control
    }.items():
        assert redact(text) == expected
