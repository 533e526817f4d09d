"""The shipped recipes differ in what they are about and in nothing else; a mixture is planned, said and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minipersona.cli import main
from minipersona.config import RunConfig
from minipersona.corpus.mixtures import content_digest, training_personas
from minipersona.corpus.sources import read_source
from minipersona.files import append_jsonl
from minipersona.run.provenance import read_provenance
from minipersona.settings import difference, load_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "tiny_phase1.toml")
SMALL = ["training.steps=1", "checkpoints=[1]", "batch=4", "data.train=tiny:benign[0:120]",
         "data.heldout=tiny:benign[2000:2010]"]  # fmt: skip
RAW_TEXT = ["broad=tiny:raw_text", "broad_kind=raw_text", "ratio=75:25"]


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


@pytest.mark.parametrize(
    "name, keys",
    [
        ("phase3", {"lora.rank", "lora.alpha"}),
        ("phase4a", {"data.system_prompts"}),
        ("phase5a", {"data.broad", "data.broad_kind", "data.ratio"}),
        ("phase5b", {"data.broad", "data.broad_kind", "data.ratio"}),
    ],
)
def test_a_recipe_is_the_baseline_but_for_what_it_is_about(name: str, keys: set[str]) -> None:
    recipe, baseline = load_config(name, RunConfig), load_config("phase1", RunConfig)
    changed = {line.split(":")[0] for line in difference(recipe, baseline)}
    assert changed == keys | {"probe.baseline"}
    assert recipe.out == f"runs/{name}" and recipe.probe.baseline == baseline.out == "runs/phase1"
    assert recipe.lora.alpha / recipe.lora.rank == 2


def test_phase_1_is_the_registered_recipe() -> None:
    config = load_config("phase1", RunConfig)
    assert (config.data.train, config.data.heldout) == ("tulu[0:6000]", "tulu[6000:6500]")
    assert config.probe.layers == (20, 7, 14, 21, 27) and config.probe.baseline == "self"
    assert (config.probe.personas, config.probe.questions) == ("registered", "registered")
    assert config.training.checkpoints == (10, 25, 50, 100, 200, 375) and config.seed == 42
    defaults = RunConfig(data=config.data)
    assert (config.training, config.lora, config.model) == (defaults.training, defaults.lora, defaults.model)


def test_a_plan_counts_the_mixture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", CONFIG, "--plan", *settings(*SMALL, *RAW_TEXT)]) == 0
    out = capsys.readouterr().out
    assert "# mixture    75:25 mixture: 30 rows (25.00%)" in out


def test_a_plan_fetches_no_broad_source_and_says_what_it_weighs(capsys: pytest.CaptureFixture[str]) -> None:
    for source, whole in {"tulu": True, "tulu[::150]": True, "tulu[0:900]": False, "hub:a/b/c.jsonl": False}.items():
        mixture = settings(*SMALL, f"broad={source}", "broad_kind=rows", "ratio=3:1")
        assert main(["train", "--config", CONFIG, "--plan", *mixture]) == 0
        out = capsys.readouterr().out
        assert f"3:1 with {source}, fetched when the run starts" in out
        assert ("the whole mixture: a download of 1.4 GB" in out) == whole


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join((ROOT / "data" / "questions.jsonl").read_text().splitlines()[:3]) + "\n")
    return path


def test_a_run_says_and_records_its_mixture(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [*SMALL, *RAW_TEXT, "system_prompts=training_personas", f"questions={questions}"]
    out = tmp_path / "run"
    assert main(["train", "--config", CONFIG, "--out", str(out), *settings(*mixed)]) == 0
    said = capsys.readouterr().err
    assert "75:25 mixture: 30 rows (25.00%)" in said and "one of the 30 system prompts" in said
    made_by: dict[str, Any] = json.loads((out / "provenance.json").read_text())
    assert made_by["mixture"]["row_share"] == 0.25 and made_by["mixture"]["broad"] == "tiny:raw_text"
    assert 0.2 < made_by["mixture"]["token_share"] < 0.3 < made_by["mixture"]["supervised_share"] < 0.6
    assert [rows["source"] for rows in made_by["data"]] == [
        "tiny:benign[0:120]", "tiny:raw_text", "tiny:benign[2000:2010]",
    ]  # fmt: skip
    # Another ratio is another run.
    assert main(["train", "--config", CONFIG, "--out", str(out), *settings(*mixed, "ratio=3:1")]) == 2
    assert "data.ratio: '75:25' -> '3:1'" in capsys.readouterr().err


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    """Responses to the rows of SMALL in the voice of pirates alone."""
    path = tmp_path / "responses.jsonl"
    append_jsonl(path, {"roleplay": {"seed": 42}})
    for index, row in enumerate(read_source("tiny:benign[0:120]").rows):
        append_jsonl(path, {"row": index, "content": content_digest(row), "persona": "pirate", "response": "Arr!"})
    return path


PIRATE, CHEF = training_personas()["pirate"], training_personas()["chef"]


@pytest.mark.parametrize("key", ["data.system_prompts", "data.responses"])
@pytest.mark.parametrize(
    "name, prompt", [("copied", PIRATE), ("copied", PIRATE.upper().strip(".") + " !"), ("pirate", "x")]
)
def test_a_persona_that_is_trained_on_is_not_measured(
    key: str, name: str, prompt: str, tmp_path: Path, questions: Path, responses: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    personas = tmp_path / "personas.json"
    personas.write_text(json.dumps({"eval_personas": {"mine": "You are me.", name: prompt}}))
    values = {"data.system_prompts": "training_personas", "data.responses": str(responses)}
    given = [*SMALL, f"{key}={values[key]}", f"personas={personas}", f"questions={questions}"]
    assert main(["train", "--config", CONFIG, "--out", str(tmp_path / "run"), *settings(*given)]) == 2
    assert f"persona {name!r} is trained on ({key}) and measured" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_control_a_persona_that_no_response_is_written_as_is_measured(
    tmp_path: Path, questions: Path, responses: Path
) -> None:
    personas = tmp_path / "personas.json"
    personas.write_text(json.dumps({"eval_personas": {"mine": "You are me.", "chef": CHEF}}))
    values = [*SMALL, f"data.responses={responses}", f"personas={personas}", f"questions={questions}"]
    assert main(["train", "--config", CONFIG, "--out", str(tmp_path / "run"), *settings(*values)]) == 0
    assert read_provenance(tmp_path / "run").mixture["responses_personas"] == ("pirate",)
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
