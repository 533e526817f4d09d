"""Models and registered sets over the network, against a hub on loopback; and that no token is ever shown."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Fault, LoopbackHub, Repository

from minipersona.files import data_dir
from minipersona.geometry.prompts import REGISTERED_PERSONAS, REGISTERED_QUESTIONS, load_personas, load_questions
from minipersona.hub import PINNED, PinnedFile
from minipersona.model import smollm2
from minipersona.model.load import load_model

CANARY = "hf_canaryCanaryCanary00"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "home") as hub:
        yield hub


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


LOCATE = """
from minipersona.hub import locate, resolved_revision
def found(name, files, revision=None):
    directory = locate(name, files, revision=revision)
    return [resolved_revision(directory), sorted(path.name for path in directory.iterdir())]
"""


def found(hub: LoopbackHub, name: str, *files: str, revision: str | None = None, **environment: str) -> Any:
    return hub.run(f"{LOCATE}\nresult = found({name!r}, {files!r}, {revision!r})", **environment)


# ---------------------------------------------------------------- models


def test_a_sharded_model_loads_and_says_its_revision(hub: LoopbackHub, hf_model: Callable[..., Path]) -> None:
    directory = hf_model(shards=3)
    unneeded = {"pytorch_model.bin": b"x" * 1000, "README.md": b"a card", "optimizer.safetensors": b"y" * 1000}
    hub.repositories["models/me/model"] = Repository({**files_of(directory), **unneeded})
    code = """
    import hashlib
    from minipersona import load_model
    model = load_model("me/model", device="cpu")
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    result = [model.source, digest.hexdigest()]
    """
    loaded = hub.run(code)
    expected = hashlib.sha256()
    for name, tensor in sorted(load_model(str(directory), device="cpu").named_parameters()):
        expected.update(name.encode() + tensor.detach().numpy().tobytes())
    assert loaded == [{"name": "me/model", "revision": COMMIT}, expected.hexdigest()]
    needed = {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        *(f.name for f in directory.glob("*.safetensors")),
    }
    assert hub.served.keys() == needed
    assert all(hub.served[name] == (directory / name).stat().st_size for name in needed)  # each once
    hub.close()
    assert found(hub, "me/model", *sorted(needed)) == [COMMIT, sorted(needed)]


def test_a_name_without_a_revision_is_the_pinned_one(hub: LoopbackHub) -> None:
    name, commit = "HuggingFaceTB/SmolLM2-135M-Instruct", PINNED["HuggingFaceTB/SmolLM2-135M-Instruct"]
    repository = hub.repositories[f"models/{name}"] = Repository({"config.json": b"{}"}, commit=commit)
    assert found(hub, name, "config.json") == [commit, ["config.json"]]
    repository.commit = COMMIT  # main has moved on
    calls = f"[found({name!r}, ['config.json'], revision) for revision in (None, 'main')]"
    assert hub.run(f"{LOCATE}\nresult = {calls}") == [[commit, ["config.json"]], [COMMIT, ["config.json"]]]


def test_the_real_model_comes_from_the_hub_where_it_can_be_reached(hub: LoopbackHub, tmp_path: Path) -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    files = {file: f"content of {file}".encode() for file in (*smollm2.FILES, "README.md", "runs/events.json")}
    hub.repositories[f"models/{name}"] = Repository(files, commit=PINNED[name])
    code = f"""
    from pathlib import Path
    from minipersona.model.smollm2 import fetch
    result = []
    fetch(Path({str(tmp_path / "out")!r}), result.append)
    """
    said = hub.run(code, PIP_NO_INDEX="1")
    assert "Apache-2.0" in said[0] and said[1] == f"from the Hub: {name} at {PINNED[name]}"
    assert files_of(tmp_path / "out") == {file: files[file] for file in smollm2.FILES}
    assert not any((tmp_path / "out" / file).is_symlink() for file in smollm2.FILES)  # the Hub's cache may be emptied


def test_a_shard_that_breaks_off_is_resumed(hub: LoopbackHub) -> None:
    shard = random.Random(0).randbytes(24_000_000)
    hub.repositories["models/me/model"] = Repository({"model.safetensors": shard})
    hub.faults = [Fault("model.safetensors", break_off=21_000_000)]
    code = """
    import hashlib
    from minipersona.hub import locate
    result = hashlib.sha256((locate("me/model", ["*.safetensors"]) / "model.safetensors").read_bytes()).hexdigest()
    """
    assert hub.run(code) == hashlib.sha256(shard).hexdigest()
    ranges = [headers["range"] for method, _, headers in lower(hub) if method == "GET" and "range" in headers]
    assert ranges and all(int(text.removeprefix("bytes=").rstrip("-")) >= 10_000_000 for text in ranges)
    assert hub.served["model.safetensors"] < 1.7 * len(shard)


def lower(hub: LoopbackHub) -> list[tuple[str, str, dict[str, str]]]:
    return [(method, path, {k.lower(): v for k, v in headers.items()}) for method, path, headers in hub.requests]


def test_what_the_hub_refuses_is_one_line(hub: LoopbackHub) -> None:
    token = "hf_" + "o" * 20
    hub.repositories |= {
        "models/me/private": Repository({"config.json": b"{}"}, token=token),
        "models/me/gated": Repository({"config.json": b"{}"}, gated=True),
    }
    expected = {
        "me/private": "not on the Hub, or private (Repository not found",
        "me/absent": "check the name, or set HF_TOKEN",
        "me/gated": "gated (Access to me/gated is restricted",
    }
    said = {"X-Error-Message": "see http://me:secret@host/x?Signature=secret"}
    hub.faults = [Fault("/me/odd", times=99, status=403, headers=said)]
    expected["me/odd"] = "the Hub refuses (see http://***@host/x?***)"
    calls = [*((name, None) for name in expected), ("me/gated", "nowhere")]
    lines = hub.run(
        f"{LOCATE}\nresult = [error_of(lambda: locate(n, ['config.json'], revision=r)) for n, r in {calls!r}]",
        HF_TOKEN=CANARY,
    )
    for (name, _), line in zip(calls, lines, strict=True):
        assert line.startswith(name) and "\n" not in line and CANARY not in line
    for line, part in zip(lines, [*expected.values(), "at nowhere: no such revision"], strict=True):
        assert part in line, line
    assert found(hub, "me/private", "config.json", HF_TOKEN=token)[0] == COMMIT


def test_busy_offline_and_gone(hub: LoopbackHub) -> None:
    hub.repositories["models/me/model"] = Repository({"config.json": b"{}"})
    code = f"result = [error_of(lambda: locate('me/model', ['x'], revision=r)) for r in (None, {COMMIT!r})]"
    assert all("HF_HUB_OFFLINE is set" in line for line in hub.run(f"{LOCATE}\n{code}", HF_HUB_OFFLINE="1"))
    assert not hub.requests
    hub.faults = [Fault("/api/models", status=429, headers={"Retry-After": "0"})]
    assert found(hub, "me/model", "config.json") == [COMMIT, ["config.json"]]
    assert hub.faults[0].times == 0
    assert found(hub, "me/model", "config.json", HF_HUB_OFFLINE="1") == [COMMIT, ["config.json"]]
    hub.close()
    code = "result = [found('me/model', ['config.json']), error_of(lambda: locate('me/other', ['config.json']))]"
    kept, line = hub.run(f"{LOCATE}\n{code}")
    assert kept == [COMMIT, ["config.json"]] and "cannot be reached" in line


UNREACHABLE = """
import json, time
from huggingface_hub import HfFileSystem, get_session, snapshot_download  # what is measured is not imports
from minipersona.corpus.sources import read_source
from minipersona.errors import UserError
from minipersona.geometry.prompts import load_personas
from minipersona.hub import locate
result = []
for call in (
    lambda: locate("Qwen/Qwen2.5-7B-Instruct", ["config.json"]),  # pinned, so that the client would ask six times
    lambda: locate("me/model", ["config.json"]),
    lambda: read_source("hub:me/data/x.jsonl"),
    lambda: load_personas("registered"),
):
    began = time.monotonic()
    try:
        call()
    except UserError as error:
        result.append([str(error), time.monotonic() - began])
print(json.dumps(result))
"""


def lines_of_the_unreachable(hub: LoopbackHub, code: str = UNREACHABLE, **environment: str) -> list[str]:
    done = hub.process("-c", code, **environment)
    assert done.returncode == 0 and "Retrying" not in done.stderr, done.stderr
    lines = json.loads(done.stdout.splitlines()[-1])
    assert len(lines) == 4 and all("\n" not in line and seconds < 5 for line, seconds in lines), lines
    return [line for line, _ in lines]


def test_a_hub_that_refuses_connections_is_one_line_within_five_seconds(hub: LoopbackHub) -> None:
    hub.close()
    for line, variable in zip(
        lines_of_the_unreachable(hub), [*["HF_ENDPOINT"] * 3, "MINIPERSONA_RAW_BASE"], strict=True
    ):
        assert "not in the local cache, and http://127.0.0.1:" in line and "Connection refused" in line
        assert f"check the network, the proxy and {variable}" in line


def test_a_hub_that_never_answers_is_one_line_within_five_seconds(hub: LoopbackHub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are made, and nobody takes them
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        lines = lines_of_the_unreachable(hub, HF_ENDPOINT=url, MINIPERSONA_RAW_BASE=url + "/raw")
    assert all("cannot be reached (" in line and "check the network, the proxy" in line for line in lines), lines


PLANS = """
import contextlib, io, json, time
from huggingface_hub import get_session  # what is measured is not imports
import minipersona.run.plan, minipersona.study.plan
from minipersona.cli import main
result = []
for command in (["train", "--config", "phase1", "--model", "me/model"], ["train", "--config", "phase1"],
                ["study", "--config", "study"]):
    began, said = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([*command, "--plan"])
    result.append([status, said.getvalue(), time.monotonic() - began])
print(json.dumps(result))
"""


def test_a_plan_waits_five_seconds_at_most_for_a_hub_that_never_answers(hub: LoopbackHub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = hub.process("-c", PLANS, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    (status, error, seconds), *plans = json.loads(done.stdout.splitlines()[-1])
    assert status == 2 and error.startswith("error: me/model: not in the local cache, and ") and error.count("\n") == 1
    assert seconds < 5
    assert all(status == 0 and "# tokens are an estimate" in said.replace("# data       ", "# ") and seconds < 5
               for status, said, seconds in plans), plans  # fmt: skip


@pytest.mark.parametrize("proxy, words", [("socks5://127.0.0.1:9", "SOCKS"), ("socks4://127.0.0.1:9", "socks4")])
def test_a_proxy_that_the_client_cannot_use_is_one_line(hub: LoopbackHub, proxy: str, words: str) -> None:
    without_package = f"import sys\nsys.modules['socksio'] = None\n{UNREACHABLE}"
    for line in lines_of_the_unreachable(hub, without_package, ALL_PROXY=proxy):
        assert words in line and "check the network, the proxy" in line
    assert not hub.requests


def test_a_server_of_which_the_name_cannot_be_looked_up(hub: LoopbackHub) -> None:
    slow_lookup = "import socket, time\nsocket.getaddrinfo = lambda *a, **k: time.sleep(30)"
    lines = lines_of_the_unreachable(
        hub,
        f"{slow_lookup}\n{UNREACHABLE}",
        HF_ENDPOINT="http://hub.invalid",
        MINIPERSONA_RAW_BASE="http://raw.invalid",
    )
    assert all("cannot be reached (no answer within 3 seconds)" in line for line in lines)


def test_no_command_shows_the_token(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.repositories |= {
        "models/me/gated": Repository({"tokenizer.json": b"{}"}, gated=True),
        "datasets/me/gated": Repository({"x.jsonl": b""}, gated=True),
    }
    out = tmp_path / "run"
    train = ["minipersona", "train", "--debug", "--config", "tiny_phase1", "--out", str(out)]
    show = ["minipersona.chat", str(data_dir() / "tiny" / "benign.jsonl"), "--tokenizer", "me/gated"]
    for command in (show, [*train, "--set", "data.train=hub:me/gated/x.jsonl"]):
        done = hub.process("-m", *command, HF_TOKEN=CANARY, HF_DEBUG="1")
        assert done.returncode == 2 and "gated (Access to me/gated is restricted" in done.stderr
        assert "You sent Bearer ***" in done.stderr  # the server said it back
        assert CANARY not in done.stdout + done.stderr
    assert any(headers.get("authorization") == f"Bearer {CANARY}" for *_, headers in lower(hub))
    written = [path for folder in (out, hub.home) if folder.exists() for path in folder.rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in path.read_bytes() for path in written)


# ---------------------------------------------------------------- the registered sets

PERSONAS = {"note": "x", "eval_personas": {"b": "You are B.", "a": "You are A."}, "eval_persona_order": ["a", "b"]}
FILES = {
    "REGISTERED_PERSONAS": (REGISTERED_PERSONAS, json.dumps(PERSONAS).encode()),
    "REGISTERED_QUESTIONS": (REGISTERED_QUESTIONS, b'{"question": "Why?", "id": 0}\n{"question": "How?", "id": 1}\n'),
}


def address(file: PinnedFile) -> str:
    return f"{file.repository}/{file.commit}/{file.path}"


# Both loaders; `PIN` makes two small files of ours the registered ones.
LOAD = """
from dataclasses import replace
from minipersona.geometry import prompts
def both(personas="registered", questions="registered"):
    p, q = prompts.load_personas(personas), prompts.load_questions(questions)
    return [p.name, p.prompts, p.digest, q.name, q.questions, q.digest]
"""
PIN = "".join(
    f"prompts.{name} = replace(prompts.{name}, sha256={hashlib.sha256(content).hexdigest()!r})\n"
    for name, (_, content) in FILES.items()
)


@pytest.fixture
def raw(hub: LoopbackHub) -> LoopbackHub:
    hub.raw = {address(file): content for file, content in FILES.values()}
    return hub


def test_the_registered_sets_are_fetched_once(raw: LoopbackHub) -> None:
    code = f"{LOAD}\n{PIN}\nresult = both()"
    sets = raw.run(code, HF_TOKEN=CANARY)
    assert sets[0] == sets[3] == "registered" and sets[4] == ["Why?", "How?"]
    assert list(sets[1].items()) == [("a", "You are A."), ("b", "You are B.")]  # in the order that the file says
    fetched = [path for method, path, _ in raw.requests if method == "GET"]
    assert len(fetched) == 2 and not any("authorization" in headers for *_, headers in lower(raw))
    assert raw.run(code, HF_HUB_OFFLINE="1") == sets


def test_another_file_is_an_error(raw: LoopbackHub) -> None:
    result = raw.run(f"{LOAD}\nresult = both()")  # the digests of the real ones
    assert "superkaiba/explore-persona-space/data/issue_205/personas.json" in result["error"]
    assert "not the pinned 00f81dc64d01" in result["error"] and "MINIPERSONA_RAW_BASE" in result["error"]
    assert not any(path.is_file() for path in (raw.home / "minipersona").rglob("*"))
    code = f"{LOAD}\n{PIN}\nresult = both()"
    raw.run(code)
    kept = next((raw.home / "minipersona").rglob("*personas.json"))
    kept.write_bytes(kept.read_bytes() + b" ")
    assert f"delete {kept}" in raw.run(code)["error"]


def test_a_local_file_with_the_right_digest_is_registered(raw: LoopbackHub, tmp_path: Path) -> None:
    paths = {"REGISTERED_PERSONAS": tmp_path / "personas.json", "REGISTERED_QUESTIONS": tmp_path / "questions.jsonl"}
    for name, path in paths.items():
        path.write_bytes(FILES[name][1])
    arguments = ", ".join(repr(str(path)) for path in paths.values())
    sets = raw.run(f"{LOAD}\n{PIN}\nresult = both({arguments})", HF_HUB_OFFLINE="1")
    assert sets[0] == sets[3] == "registered" and not raw.requests
    other = load_personas(str(paths["REGISTERED_PERSONAS"]))  # the control: here the real digests are pinned
    assert other.name == str(paths["REGISTERED_PERSONAS"]) and list(other.prompts) == ["a", "b"]


def test_raw_files_that_cannot_be_had(raw: LoopbackHub) -> None:
    code = f"{LOAD}\n{PIN}\nresult = both()"
    assert "HF_HUB_OFFLINE is set" in raw.run(code, HF_HUB_OFFLINE="1")["error"]
    local = "import os; os.environ['MINIPERSONA_RAW_BASE'] = 'file:///etc'"
    assert "is not an http address" in raw.run(f"{LOAD}\n{local}\nresult = both()")["error"]
    assert not raw.requests
    raw.faults = [Fault("personas", status=429), Fault("questions", break_off=10)]
    assert raw.run(code)[0] == "registered" and [fault.times for fault in raw.faults] == [0, 0]
    raw.raw.clear()
    assert "404" in raw.run(code, HF_HOME=str(raw.home / "other"))["error"]
    raw.close()
    assert "check the network" in raw.run(code, HF_HOME=str(raw.home / "other"))["error"]


def test_the_registered_sets_to_the_bit(hub: LoopbackHub) -> None:
    reference = Path(os.environ.get("MINIPERSONA_REFERENCE", "")) / "predecessor"
    if not (reference / "personas.json").is_file():
        pytest.skip("MINIPERSONA_REFERENCE names no copy of the registered files")
    personas, questions = reference / "personas.json", reference / "extraction_questions.jsonl"
    hub.raw = {
        address(REGISTERED_PERSONAS): personas.read_bytes(),
        address(REGISTERED_QUESTIONS): questions.read_bytes(),
    }
    sets = hub.run(f"{LOAD}\nresult = both()")
    assert sets[0] == sets[3] == "registered" and (len(sets[1]), len(sets[4])) == (12, 240)
    assert (load_personas(str(personas)).name, load_questions(str(questions)).name) == ("registered", "registered")
