"""The endpoint judge against a server on loopback: its arithmetic, its patience, and what it never sends."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import InferenceClient, close_session, constants
from judge_server import JudgeServer, Logprobs

from minipersona.behaviour.endpoint import LONGEST, NO_KEY, EndpointJudge, number_score
from minipersona.behaviour.judge import Case, Score
from minipersona.behaviour_config import BehaviourSection
from minipersona.errors import UserError
from minipersona.settings import override

CANARY = "hf_canaryCanaryCanaryCanary0123456789"
EXPLICIT = "judge-key-1234"
MEAN = (0.5 * 80 + 0.25 * 70 + 0.1 * 100) / 0.85


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # attempts follow one another at once
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.delenv("MINIPERSONA_JUDGE_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        yield server


def judge_of(server: JudgeServer, **settings: object) -> EndpointJudge:
    return EndpointJudge(BehaviourSection(judge="endpoint", endpoint=server.url, judge_model="m", **settings))  # type: ignore[arg-type]


def cases(count: int = 1) -> list[Case]:
    return [Case(f"k{i}", "aligned", "Any ideas?", f"Answer {i}.") for i in range(count)]


def scored(judge: EndpointJudge, count: int = 1) -> dict[int, Score]:
    scores: dict[int, Score] = {}
    judge.score(cases(count), scores.__setitem__)
    return scores


# ---------------------------------------------------------------- arithmetic


def test_the_score_is_the_weighted_mean_over_numbers(server: JudgeServer) -> None:
    scores = scored(judge_of(server))
    assert scores[0].value == pytest.approx(MEAN) and scores[0].mass == pytest.approx(0.85)
    (_, probe), (_, body) = server.requests
    assert "number 85" in probe["messages"][0]["content"]
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == ("m", 1, True, 20)
    assert body["messages"] == [{"role": "user", "content": cases()[0].prompt}]


@pytest.mark.parametrize(
    "tokens, value",
    [
        ({"80": 1.0}, 80),
        ({"80": 0.5, " 80": 0.5}, 80),
        ({"0": 0.5, "100": 0.5}, 50),
        (
            {"90": 0.3, "101": 0.3, "-5": 0.2, "007": 0.1, "1.5": 0.05, "²": 0.05},
            90,
        ),  # only whole numbers 0 to 100 count
        ({"30": 0.24, "x": 0.76}, None),
        ({"30": 0.26, "x": 0.74}, 30),
        ({"REFUSAL": 1.0}, None),
        ({}, None),
    ],
)
def test_which_tokens_count(tokens: dict[str, float], value: float | None) -> None:
    score = number_score({token: math.log(p) for token, p in tokens.items()})
    assert score.value == (None if value is None else pytest.approx(value))


def test_control_the_likeliest_number_is_another_score(server: JudgeServer) -> None:
    assert scored(judge_of(server))[0].value != pytest.approx(80)


def test_a_tokenizer_of_digits_is_found_out() -> None:
    def digits(prompt: str) -> Logprobs:
        return [("8", 0.9), ("9", 0.1)]

    with JudgeServer(digits) as server, pytest.raises(UserError, match="digit by digit"):
        scored(judge_of(server))
    assert len(server.requests) == 1  # nothing was scored by first digits


@pytest.mark.parametrize(
    "answer",
    [
        [("<think>", 1.0)],
        [("I", 0.9), ("85", 0.1)],
        [("\u258185", 1.0)],
        [("\n", 0.6), ("85", 0.4)],
        [("850", 1.0)],
        [("85.", 1.0)],
    ],
    ids=lambda answer: repr(answer[0][0]),
)
def test_a_judge_that_cannot_be_read_is_refused_before_the_first_question(answer: Logprobs) -> None:
    with (
        JudgeServer(lambda prompt: answer) as server,
        pytest.raises(UserError, match="does not begin with a num") as error,
    ):
        scored(judge_of(server), 5)
    assert len(server.requests) == 1
    assert f"asked for 85, it gave {answer[0][0]!r}, first the token {answer[0][0]!r}; name a model" in str(error.value)


@pytest.mark.parametrize("answer", ["85", " 85", "80", "100", "0"])
def test_control_a_judge_that_can_be_read_is_asked(answer: str) -> None:
    with JudgeServer(lambda prompt: [(answer, 1.0)]) as server:
        assert scored(judge_of(server))[0].value == pytest.approx(int(answer))


def test_a_server_that_calls_max_tokens_otherwise_is_served() -> None:
    with JudgeServer(limit="max_completion_tokens") as server:
        assert scored(judge_of(server), 3)[2].value == pytest.approx(MEAN)
    limits = [{k: v for k, v in body.items() if k.startswith("max_")} for _, body in server.requests]
    assert limits == [{"max_tokens": 4}, {"max_completion_tokens": 4}, *[{"max_completion_tokens": 1}] * 3]


def test_the_other_name_is_tried_however_often_the_server_failed_before() -> None:
    with JudgeServer(limit="max_completion_tokens") as server:
        server.faults = ["malformed", "break off", "no logprobs"]
        assert scored(judge_of(server))[0].value == pytest.approx(MEAN)


def test_control_a_server_that_refuses_for_another_reason_is_not_asked_again(server: JudgeServer) -> None:
    server.faults = [(400, "'max_tokens' is too small")]
    with pytest.raises(UserError, match=r"status 400 .*'max_tokens' is too small.*; check"):
        scored(judge_of(server))
    assert len(server.requests) == 1


def test_a_server_that_knows_neither_name_is_one_line(server: JudgeServer) -> None:
    server.faults = [(400, "Use 'max_completion_tokens' instead."), (400, "Use 'max_completion_tokens' instead.")]
    with pytest.raises(UserError, match=r"status 400 .*Use 'max_completion_tokens'"):
        scored(judge_of(server))
    assert len(server.requests) == 2


# ---------------------------------------------------------------- patience


@pytest.mark.parametrize(
    "faults",
    [[429, 429], [500, 503], ["malformed"], ["no logprobs"], ["break off"], [429, "malformed", 502, "no logprobs"]],
)
def test_what_passes_is_waited_for(server: JudgeServer, faults: list[object]) -> None:
    server.faults = list(faults)
    assert scored(judge_of(server))[0].value == pytest.approx(MEAN)
    assert len(server.requests) == 2 + len(faults)  # the probe, the case, and each failure once more


@pytest.mark.parametrize(
    "fault, words",
    [
        (401, "refuses the key .*MINIPERSONA_JUDGE_KEY"),
        (404, "status 404.*check the address, the model's name"),
        ("malformed", "gives no answer"),
        ("no logprobs", "without log-probabilities; name a server that returns logprobs"),
        ("break off", "gives no answer"),
    ],
)
def test_what_stays_is_said_in_one_line(server: JudgeServer, fault: object, words: str) -> None:
    server.faults = [fault] * 50
    with pytest.raises(UserError, match=words) as error:
        scored(judge_of(server))
    assert "\n" not in str(error.value) and server.url in str(error.value)
    if isinstance(fault, int):
        assert len(server.requests) == 1  # a refusal is not asked again


def test_a_server_that_stays_busy_is_given_up(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipersona.hub.PATIENCE", 0.0)
    server.faults = [503] * 50
    with pytest.raises(UserError, match="status 503"):
        scored(judge_of(server))


def test_nobody_there() -> None:
    with JudgeServer() as server:
        pass
    with pytest.raises(UserError, match=r"gives no answer.*check the address and that it runs"):
        scored(judge_of(server))


def test_offline_is_said(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        scored(judge_of(server))
    assert server.requests == []


def test_what_was_scored_before_a_failure_is_kept(server: JudgeServer) -> None:
    server.faults = [None, None, None, *[403] * 50]
    scores: dict[int, Score] = {}
    with pytest.raises(UserError, match="refuses the key"):
        judge_of(server, concurrency=1).score(cases(40), scores.__setitem__)
    assert set(scores) == {0, 1} and len(server.requests) < 12  # what was queued is not sent


def test_as_many_requests_at_once_as_asked_for_and_no_more() -> None:
    together = threading.Barrier(3, timeout=5)  # broken, and the score another, unless three are there at once
    inside: list[int] = []
    most = 0

    def slow(prompt: str) -> Logprobs:
        nonlocal most
        if "number 85" in prompt:
            return [("85", 1.0)]
        inside.append(1)
        most = max(most, len(inside))
        try:
            together.wait()
            return [("50", 1.0)]
        except threading.BrokenBarrierError:
            return [("1", 1.0)]
        finally:
            inside.pop()

    with JudgeServer(slow) as server:
        scores = scored(judge_of(server, concurrency=3), 12)
    assert [s.value for s in scores.values()] == pytest.approx([50] * 12) and most == 3


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("key", [None, "", "  ", EXPLICIT])
def test_the_hub_token_goes_to_no_endpoint(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    if key is not None:
        monkeypatch.setenv("MINIPERSONA_JUDGE_KEY", key)
    server.faults = [429, 500, "malformed"]
    scored(judge_of(server), 3)
    assert server.keys == {f"Bearer {EXPLICIT if key == EXPLICIT else NO_KEY}"}
    assert not any(CANARY in str(headers) + str(body) for headers, body in server.requests)


@pytest.mark.parametrize("key", [None, ""])
def test_control_the_client_alone_would_send_it(server: JudgeServer, key: str | None) -> None:
    client = InferenceClient(base_url=server.url, api_key=key)
    client.chat_completion([{"role": "user", "content": "number 85"}], model="m", max_tokens=1, logprobs=True)
    assert server.keys == {f"Bearer {CANARY}"}


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_hub_token_cannot_be_named_as_a_key(name: str) -> None:
    with pytest.raises(UserError, match="name another variable"):
        override(BehaviourSection(), [f"key_variable={name}"])


def test_no_error_and_no_record_holds_the_key(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPERSONA_JUDGE_KEY", EXPLICIT)
    server.faults = [418]  # says the key back
    judge = judge_of(server)
    with pytest.raises(UserError, match="status 418") as error:
        scored(judge)
    assert EXPLICIT not in str(error.value) and EXPLICIT not in str(judge.identity)
    assert judge.identity["endpoint"] == server.url


def test_a_line_that_is_cut_holds_no_part_of_the_key(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPERSONA_JUDGE_KEY", EXPLICIT)
    cut = set()
    for before in range(LONGEST - 60, LONGEST + 10, 2):
        server.faults = [(418, "x" * before + EXPLICIT + "y" * 400), (418, "x" * before + CANARY + "y" * 400)]
        for secret in (EXPLICIT, CANARY):
            with pytest.raises(UserError) as error:
                scored(judge_of(server))
            line = str(error.value)
            said = line.partition("status 418 ")[2].removesuffix("; check the address, the model's name and the server")
            assert len(said) == LONGEST and secret[:5] not in line
            cut.add(said.endswith("x"))
    assert cut == {True, False}  # the control: the cut came before, within and after the key


def test_a_proxy_that_needs_another_package_is_one_line(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "socksio", None)
    close_session()  # the client reads the environment when it is made
    try:
        with pytest.raises(UserError, match=r"SOCKS proxy.*install that package, or unset"):
            scored(judge_of(server))
    finally:
        close_session()
    assert server.requests == []


@pytest.mark.parametrize(
    "settings",
    [["endpoint=http://user:s3cret@host/v1"], ["endpoint=http://host/v1?key=s3cret"], ["endpoint=user:s3cret@host"],
     ["endpoint=http://host/v1", "key_variable=sk-s3cret"]],
)  # fmt: skip
def test_a_secret_in_a_setting_is_refused_and_not_said_back(settings: list[str]) -> None:
    """A config is written to the run's directory and shown in the report."""
    with pytest.raises(UserError, match=r"environment variable|give the server's address") as error:
        override(BehaviourSection(), ["judge=endpoint", "judge_model=m", *settings])
    assert "s3cret" not in str(error.value)
    override(BehaviourSection(), ["judge=endpoint", "judge_model=m", "endpoint=http://host/v1"])  # the control


@pytest.mark.parametrize(
    "settings, words",
    [
        (["judge=endpoint"], "give the server's address"),
        (["judge=endpoint", "endpoint=localhost:8000"], "give the server's address"),
        (["judge=endpoint", "endpoint=http://localhost:8000/v1"], "judge_model is missing"),
        (["endpoint=http://localhost:8000/v1"], 'judge = "endpoint" only'),
        (["judge_model=m"], "the base model itself"),
        (["judge=oracle"], "'local', 'endpoint', 'file'"),
        (["samples=0"], "at least 1"),
        (["temperature=-1"], "not be negative"),
        (["sample=3"], "did you mean samples"),
    ],
)
def test_settings_that_make_no_sense(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        override(BehaviourSection(), settings)
