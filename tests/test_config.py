"""Configs: strict reading, settings from the command line, and writing what reads back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipersona.cli import main
from minipersona.config import DataSection, RunConfig
from minipersona.errors import UserError
from minipersona.records import from_dict, to_dict
from minipersona.run.resources import load_run_tokenizer
from minipersona.settings import difference, find_config, load_config, override, to_toml
from minipersona.study_config import StudyConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
MINIMAL = {"data": {"train": "a", "heldout": "b"}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_found_by_name(path: Path) -> None:
    kind = StudyConfig if path.stem.endswith(("study", "beyond", "attempts", "voice")) else RunConfig
    assert load_config(str(path), kind) == load_config(path.stem, kind)


@pytest.mark.parametrize(
    "path",
    ["experiments/tiny_phase1.toml", "experiments/tiny_phase1", "./tiny_phase1", "/none/study.toml", "~/study.toml"],
)
def test_only_a_bare_name_is_a_shipped_config(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"^{path}: no such config; give the path .*tiny_phase1"):
        find_config(path)
    for bare in ("tiny_phase1", "tiny_phase1.toml"):  # the control
        assert find_config(bare).parent == CONFIGS[0].parent
    mine = Path(path).expanduser()
    if not mine.is_absolute() or mine.is_relative_to(tmp_path):
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("")
        assert find_config(path) == mine


def test_a_byte_order_mark_is_not_part_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + (CONFIGS[0].parent / "tiny_phase1.toml").read_bytes())
    assert load_config(str(tmp_path / "c.toml"), RunConfig) == load_config("tiny_phase1", RunConfig)


def test_a_misspelt_path_is_an_error_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "experiments/tiny_phase1.toml", "--plan"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: experiments/tiny_phase1.toml: no such config; ")


@pytest.mark.parametrize("path", ["a\0b", "a\0b/c.toml", "~a\0b", "~nobody-of-this-name/c.toml", "c" * 300])
def test_what_cannot_be_the_name_of_a_file_is_no_config(path: str) -> None:
    with pytest.raises(UserError, match="no such config; give the path of a TOML file"):
        find_config(path)


@pytest.mark.parametrize("setting", ["out=a\0b", 'data.train="jsonl:a\\u0000b"'])
def test_a_path_with_a_nul_character_is_an_error_of_the_command(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, said = setting.partition("=")[0], "holds a NUL character, which no path can; leave it out\n"
    assert main(["train", "--config", "tiny_phase1", "--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key} = ") and error.endswith(said) and error.count("\n") == 1
    (tmp_path / "c.toml").write_text('[data]\ntrain = "a"\nheldout = "jsonl:a\\u0000b"\n')
    assert main(["train", "--config", str(tmp_path / "c.toml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'c.toml'}: data.heldout = 'jsonl:a\\x00b': {said}"


def test_a_template_is_a_setting_of_the_model() -> None:
    config = override(from_dict(RunConfig, {**MINIMAL, "model": {"name": "tiny"}}), ["model.template=chatml-qwen2"])
    assert load_run_tokenizer(config.model).template.name == "chatml-qwen2"
    assert load_run_tokenizer(override(config, ["template="]).model).template.name == "chatml-qwen2.5"
    with pytest.raises(UserError, match="template 'llama4' is unknown; use one of"):
        load_run_tokenizer(override(config, ["template=llama4"]).model)


def test_defaults_are_the_registered_recipe() -> None:
    config = from_dict(RunConfig, MINIMAL)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, len(config.lora.targets)) == (32, 64.0, 0.05, 7)
    recipe = config.training
    assert (recipe.steps, recipe.batch, recipe.warmup, recipe.weight_decay) == (375, 16, 0.03, 0.01)
    assert (recipe.beta1, recipe.beta2, recipe.epsilon, recipe.max_grad_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert recipe.learning_rate == 2e-5 and recipe.checkpoints == (10, 25, 50, 100, 200, 375)
    assert (config.seed, config.data.max_tokens, config.model.name) == (42, 2048, "Qwen/Qwen2.5-7B-Instruct")


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    st.integers(0, 10**6),
    st.floats(0, 1e3),
    st.lists(st.integers(1, 9), unique=True).map(sorted),
)
def test_what_is_written_reads_back(text: str, seed: int, rate: float, checkpoints: list[int]) -> None:
    values = {
        "out": text,
        "seed": seed,
        "data": {"train": text, "heldout": 'a "quoted" \\ name\n'},
        "training": {"learning_rate": rate, "steps": 9, "checkpoints": checkpoints},
    }
    config = from_dict(RunConfig, values)
    assert from_dict(RunConfig, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    "values, words",
    [
        ({}, "data.train is missing"),
        ({"data": {"train": "a"}}, "data.heldout is missing"),
        ({**MINIMAL, "sed": 1}, "did you mean seed"),
        ({**MINIMAL, "seed": 1.5}, "whole number"),
        ({**MINIMAL, "seed": True}, "whole number"),
        ({**MINIMAL, "seed": "1"}, "whole number"),
        ({**MINIMAL, "training": {"learning_rate": "2e-5"}}, "must be a number"),
        ({**MINIMAL, "training": {"learning_rate": float("nan")}}, "finite"),
        ({**MINIMAL, "training": {"method": "qlora"}}, "'lora', 'full'"),
        ({**MINIMAL, "training": {"checkpoints": 5}}, "must be a list"),
        ({**MINIMAL, "training": {"checkpoints": [5, 2]}}, "rising"),
        ({**MINIMAL, "training": {"checkpoints": [1000]}}, "outside 1 to 375"),
        ({**MINIMAL, "lora": {"rank": 0}}, "lora.rank"),
        ({**MINIMAL, "lora": {"dropout": 1.0}}, "lora.dropout"),
        ({**MINIMAL, "execution": {"deterministic": 1}}, "true or false"),
        ({**MINIMAL, "execution": {"fused": False, "compile": "on"}}, "leave execution.fused = false out"),
        ({**MINIMAL, "objective": {"kind": "kl"}}, "'kl_to_base', 'r3f'"),
        ({**MINIMAL, "objective": {"kind": "r3f"}}, "objective.weight = 0.0: must be positive"),
        ({**MINIMAL, "objective": {"weight": 0.1}}, "nothing to weigh"),
        ({**MINIMAL, "objective": {"kind": "r3f", "weight": 1, "direction": "forward"}}, 'kind = "kl_to_base" only'),
        ({**MINIMAL, "objective": {"kind": "kl_to_base", "weight": 1, "epsilon": 1e-4}}, 'kind = "r3f" only'),
        ({**MINIMAL, "objective": {"noise": "uniform"}}, 'kind = "r3f" only'),
        ({**MINIMAL, "objective": {"kind": "r3f", "weight": 1, "epsilon": -1}}, "objective.epsilon"),
        ({**MINIMAL, "objective": {"kind": "gram_anchor"}}, "objective.weight = 0.0: must be positive"),
        ({**MINIMAL, "objective": {"kind": "kl_on_prompts", "weight": 1, "anchor_layers": [1]}}, "anchor_layers: is a"),
        ({**MINIMAL, "objective": {"kind": "gram_anchor", "weight": 1, "anchor_layers": [1, 1]}}, "each block once"),
        (
            {**MINIMAL, "objective": {"kind": "gram_anchor", "weight": 1, "anchor_scale": "spread"}},
            "anchor_scale: is a",
        ),
        ({**MINIMAL, "objective": {"kind": "kl_on_prompts", "weight": 1, "kl_factor": 2}}, "kl_factor = 2.0: is a"),
        ({**MINIMAL, "objective": {"kind": "feature_and_kl", "weight": 1, "kl_factor": 0}}, "must be positive"),
        (
            {**MINIMAL, "objective": {"kind": "feature_anchor", "weight": 1, "anchor_responses": 9}},
            "anchor_responses = 9",
        ),
        ({**MINIMAL, "objective": {"kind": "gram_anchor", "weight": 1, "contexts": 0}}, "objective.contexts = 0"),
        (
            {**MINIMAL, "objective": {"kind": "kl_to_base", "weight": 1, "anchor_responses": 8}},
            'objective.anchor_responses = 8: is a choice of kind = "kl_on_prompts" or "feature_and_kl" only',
        ),
        (
            {**MINIMAL, "objective": {"kind": "kl_on_prompts", "weight": 1, "anchor_responses": -1}},
            "objective.anchor_responses = -1: must not be negative; 0 is off",
        ),
        ({**MINIMAL, "objective": {"anchor_questions": "q.jsonl"}}, "objective.anchor_questions: is a choice of"),
        ({**MINIMAL, "steering": {"coefficient": 9.0}}, "has no effect without steering.vector"),
        ({**MINIMAL, "probe": {"layers": [6, 6]}}, "probe.layers: name each block once"),
        ({**MINIMAL, "steering": {"vector": "villain"}}, 'two personas with " - " between'),
        ({**MINIMAL, "steering": {"vector": "villain - villain"}}, "two personas"),
        ({**MINIMAL, "steering": {"vector": "file:"}}, "name the file"),
        ({**MINIMAL, "steering": {"vector": "file:v.safetensors#villain"}}, "two personas"),
        ({**MINIMAL, "steering": {"vector": "collapse"}}, "name its directory in probe.baseline"),
        ({**MINIMAL, "steering": {"vector": "a - b", "layer": -2}}, "steering.layer"),
        ({**MINIMAL, "steering": {"vector": "a - b", "layer": 3, "all_layers": True}}, "steers every block"),
        ({**MINIMAL, "steering": {"vector": "a - b", "coefficient": float("inf")}}, "finite"),
        ({**MINIMAL, "model": "tiny"}, r"must be a section, written \[model\]"),
    ],
)
def test_errors_name_the_key_and_the_mend(values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_dict(RunConfig, values)


def test_settings() -> None:
    config = from_dict(RunConfig, MINIMAL)
    changed = override(
        config,
        [
            "training.steps=5",
            "checkpoints=[1, 5]",
            "name=tiny",
            "deterministic=true",
            "data.train=jsonl:a b.jsonl[0:3]",
        ],
    )
    assert changed.training.steps == 5 and changed.training.checkpoints == (1, 5)  # valid only together
    assert changed.model.name == "tiny" and changed.execution.deterministic
    assert changed.data.train == "jsonl:a b.jsonl[0:3]"
    for setting, words in {
        "steps": "section.key=value",
        "stepps=3": "did you mean training.steps|training.steps",
        "training=3": "unknown config key training",
    }.items():
        with pytest.raises(UserError, match=words):
            override(config, [setting])


def test_difference_ignores_how_and_where() -> None:
    config = RunConfig(data=DataSection("a", "b"))
    assert difference(override(config, ["out=x", "pack_tokens=1", "deterministic=true"]), config) == []
    assert difference(override(config, ["seed=1"]), config) == ["seed: 42 -> 1"]
    assert to_dict(config)["data"]["train"] == "a"
