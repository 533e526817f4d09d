"""Voice against probabilities made by hand, its bounds, and the embedded model's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_study import small_study
from torch import Tensor

from minipersona.behaviour import voice
from minipersona.behaviour.__main__ import main
from minipersona.behaviour.voice import Responses, Voice, asked, base_responses, information, measure_voice, share
from minipersona.chat import load_tokenizer
from minipersona.config import LoraConfig
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import read_jsonl, rewrite_jsonl
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.pack import Pack

QUIET = Console(quiet=True)
P, Q, V = 3, 2, 8
NAMES = ("a", "b", "c")


class Table:
    """A model whose next token depends on the token before it and on the document's first one, the persona."""

    def __init__(self, logits: Tensor) -> None:
        self.log_p = logits.double().log_softmax(-1)  # (P, V, V)
        self.lm_head = SimpleNamespace(weight=torch.eye(V, dtype=torch.float64))
        self.device = torch.device("cpu")

    def __call__(self, pack: Pack, last_rows: Tensor) -> Tensor:
        document = torch.searchsorted(pack.boundaries.long(), last_rows, right=True) - 1
        persona = pack.ids[pack.boundaries[document].long()]
        return self.log_p[persona, pack.ids[last_rows]]


def logits(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(P, V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def responses(length: int = 5, seed: int = 0) -> Responses:
    """Prompts of two tokens, the persona and the question; responses of `length` tokens, and one more each."""
    rng = np.random.default_rng(seed)
    prompts = [np.array([p, 4 + q], dtype=np.int32) for p in range(P) for q in range(Q)]
    return Responses(NAMES, prompts, [rng.integers(0, V, length + i).astype(np.int32) for i in range(P * Q)])


def measured(model: Table, asked: Responses) -> Voice:
    return measure_voice(model, asked, QUIET, pack_tokens=40)  # type: ignore[arg-type]


def by_hand(model: Table, asked: Responses) -> dict[str, tuple[float, ...]]:
    """Token by token, in probabilities."""
    found: dict[str, tuple[float, ...]] = {}
    for i, name in enumerate(NAMES):
        for q in range(Q):
            response, total = asked.responses[i * Q + q].tolist(), 0.0
            for before, token in zip([4 + q, *response[:-1]], response, strict=True):
                p = [math.exp(float(model.log_p[j, before, token])) for j in range(P)]
                total += math.log(p[i] / (sum(p) / P))
            found[name] = (*found.get(name, ()), total / len(response))
    return found


# ---------------------------------------------------------------- by hand


def test_voice_is_the_information_of_probabilities_made_by_hand() -> None:
    model, asked = Table(logits(1)), responses()
    found, expected = measured(model, asked), by_hand(model, asked)
    for name in NAMES:
        assert found.by_response[name] == pytest.approx(expected[name], abs=1e-12)
        assert found.by_persona[name] == pytest.approx(np.mean(expected[name]), abs=1e-12)
    assert found.value == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert found.tokens == sum(map(len, asked.responses)) and found.ci95[0] <= found.value <= found.ci95[1]
    # The control: the mean over all tokens of all responses, which would give long ones more weight.
    lengths = np.array([len(r) for r in asked.responses]).reshape(P, Q)
    assert found.value != pytest.approx(np.average(list(expected.values()), weights=lengths), abs=1e-4)


def test_a_model_that_ignores_the_system_prompt_has_no_voice() -> None:
    deaf = Table(logits(2)[:1].expand(P, V, V))
    assert measured(deaf, responses()).value == pytest.approx(0, abs=1e-12)


def test_voice_is_at_most_log_p_and_negative_under_others_prompts() -> None:
    """Each persona has a token of its own, which it repeats."""
    own = torch.zeros(P, V, V)
    for p in range(P):
        own[p, :, p] = 30.0
    asked = responses()
    said = replace(asked, responses=[np.full(6, i // Q, dtype=np.int32) for i in range(P * Q)])
    assert measured(Table(own), said).value == pytest.approx(math.log(P), abs=1e-9)
    for seed in range(5):
        assert measured(Table(logits(seed, scale=5.0)), asked).value <= math.log(P)
    others = replace(said, responses=[np.full(6, (i // Q + 1) % P, dtype=np.int32) for i in range(P * Q)])
    assert measured(Table(own), others).value < -1


def test_whole_responses_would_be_at_their_bound_whatever_the_voice() -> None:
    """Why the mean over personas is taken at each token: two voices of which one is three times the other's."""
    values, whole = [], []
    for scale in (0.6, 1.2):
        table = Table(logits(3, scale))
        generator = torch.Generator().manual_seed(0)
        tokens = [int(torch.multinomial(table.log_p[0, 0].exp(), 1, generator=generator))]
        while len(tokens) < 200:
            tokens.append(int(torch.multinomial(table.log_p[0, tokens[-1]].exp(), 1, generator=generator)))
        log_p = torch.stack([table.log_p[p, tokens[:-1], tokens[1:]] for p in range(P)])  # (P, n)
        values.append(information(log_p, 0))
        whole.append(information(log_p.sum(1, keepdim=True), 0))
    assert values[1] > 2.5 * values[0] > 0
    assert whole == pytest.approx([math.log(P)] * 2, abs=1e-3)


def test_a_share_compares_the_same_questions() -> None:
    base = measured(Table(logits(4)), responses())
    halved = replace(
        base, value=base.value / 2, by_response={n: (x / 2, y / 2) for n, (x, y) in base.by_response.items()}
    )
    assert share(base, base) == pytest.approx((1, 1, 1))
    assert share(halved, base) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(AssertionError):
        share(measured(Table(logits(4)), responses(seed=1)), base)


def test_questions_are_evenly_spaced() -> None:
    assert asked([str(i) for i in range(240)], 20) == [str(i) for i in range(0, 240, 12)]
    assert asked(["a", "b"], 20) == ["a", "b"]


# ---------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def model() -> Qwen2:
    return load_model("tiny", device="cpu")


def test_the_base_has_a_voice_which_an_untrained_adapter_leaves_and_a_random_one_changes(
    model: Qwen2, tmp_path: Path
) -> None:
    probe, tokenizer = small_study(tmp_path).probe, load_tokenizer("tiny")
    personas, questions = load_personas(probe.personas), load_questions(probe.questions)
    file = tmp_path / "responses.jsonl"

    def respond() -> Responses:
        return base_responses(model, tokenizer, personas.prompts, questions.questions[:2], file, QUIET, most_tokens=24)

    said = respond()
    assert [len(each) <= 24 for each in said.responses] == [True] * 6
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["persona"] for row in rows} == set(personas.prompts) and all(row["response"] for row in rows)
    base = measure_voice(model, said, QUIET)
    assert min(base.by_persona.values()) > 0.05 and base.value < math.log(3)

    apply_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=0.2))  # B = 0: step 0
    assert measure_voice(model, said, QUIET).value == pytest.approx(base.value, rel=1e-5)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    assert measure_voice(model, said, QUIET).value != pytest.approx(base.value, rel=1e-2)


@pytest.mark.parametrize("tokens", [None, "abc", [], [99999], [True]])
def test_a_damaged_response_is_refused(tokens: object, tmp_path: Path) -> None:
    base, tokenizer, file = load_model("tiny", device="cpu"), load_tokenizer("tiny"), tmp_path / "r.jsonl"
    given = base, tokenizer, {"x": "You are a villain.", "y": "You are a cook."}, ["How are you?"], file, QUIET
    base_responses(*given, most_tokens=2)
    rows = read_jsonl(file)
    base_responses(*given, most_tokens=2)  # the control
    rewrite_jsonl(file, [rows[0] | {"tokens": tokens}, rows[1]])
    with pytest.raises(UserError, match=r"r\.jsonl: a response is not a list of tokens of 0 to \d+; delete the file"):
        base_responses(*given, most_tokens=2)
    file.write_text("[]\n")
    with pytest.raises(UserError, match=r"r\.jsonl: line 1 is not a JSON object; delete that line"):
        base_responses(*given, most_tokens=2)


def test_responses_that_are_kept_are_not_generated_again(model: Qwen2, tmp_path: Path) -> None:
    """The last of them lost, as by a kill: it alone is generated."""
    base, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    prompts, file, sent = {"x": "You are a villain.", "y": "You are a librarian."}, tmp_path / "r.jsonl", []
    real = voice.generate

    def respond() -> Responses:
        return base_responses(base, tokenizer, prompts, ["How are you?"], file, QUIET, most_tokens=8)

    def counted(*arguments: object, **more: object) -> object:
        sent.append(len(arguments[1]))  # type: ignore[arg-type]
        return real(*arguments, **more)  # type: ignore[arg-type]

    first = respond()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voice, "generate", counted)
        assert respond().digest == first.digest
        file.write_text(file.read_text().splitlines(keepends=True)[0])
        assert respond().digest == first.digest
    assert sent == [0, 1]


def test_the_command_says_v_and_keeps_what_it_was_measured_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = small_study(tmp_path).probe
    out = tmp_path / "voice.json"
    command = ["voice", "--model", "tiny", "--personas", probe.personas, "--questions", probe.questions, "--count", "2",
               "--max-new-tokens", "6", "--out", str(out)]  # fmt: skip
    assert main(command) == 0
    assert "nats a response token" in capsys.readouterr().out
    value = json.loads(out.read_text())
    assert set(value["base"]["by_persona"]) == {"villain", "assistant", "librarian"}
    assert len((tmp_path / "voice.voice_responses.jsonl").read_text().splitlines()) == 6
