"""The commands as a user meets them: one run end to end, killed and continued, and every refusal in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipersona.cli import main
from minipersona.errors import UserError
from minipersona.files import read_jsonl
from minipersona.geometry.compare import compare
from minipersona.geometry.vectors import PersonaVectors, load_vectors
from minipersona.locks import lock
from minipersona.model.__main__ import main as merge
from minipersona.model.load import load_model
from minipersona.run.directory import baseline_row
from minipersona.run.evaluate import check_side_by_side
from minipersona.run.result import read_result

ROOT = Path(__file__).parents[1]
SMALL = ["--set", "training.steps=4", "--set", "training.checkpoints=[2, 4]", "--set", "training.batch=4"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = (ROOT / "data" / "questions.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines[:6]) + "\n")
    return path


@pytest.fixture(scope="module")
def settings(questions: Path) -> list[str]:
    heldout = ["--set", "data.heldout=tiny:benign[2000:2020]"]
    return ["--config", str(ROOT / "configs" / "tiny_phase1.toml"), *SMALL, *heldout, "--set", f"questions={questions}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *settings, "--out", str(out)]) == 0
    return out


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **QUIET}
    )


QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def comparable(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


# ---------------------------------------------------------------- a run


def test_a_run_leaves_what_the_contract_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.toml", "provenance.json", "metrics.jsonl", "probes.jsonl", "step-000002", "step-000004", "latest",
        "vectors", "losses",
    }  # fmt: skip
    metrics = read_jsonl(finished / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert set(metrics[0]) == {
        "step", "loss", "cross_entropy", "supervised_tokens", "tokens", "grad_norm", "lr", "tokens_per_second",
    }  # fmt: skip
    probes = read_jsonl(finished / "probes.jsonl")
    assert [row["step"] for row in probes] == [0, 2, 4]
    assert probes[0]["delta_norm"] == 0 and probes[1]["delta_norm"] > 0
    for row in probes:
        assert row["m1_low"] <= row["m1"] <= row["m1_high"]
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__
    assert not {"HF_TOKEN", "PATH"} & set(json.dumps(provenance).split('"'))


def test_evaluate_judges_the_base_first(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--run", str(finished)]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[2].split()[0] == "base"
    result = json.loads((finished / "result.json").read_text())
    assert {"protocol", "base", "baseline", "checkpoints", "best", "gpu_seconds"} <= set(result)
    assert result["protocol"]["model"] == "tiny" and result["protocol"]["question_set"].endswith("questions.jsonl")
    assert [row["step"] for row in result["checkpoints"]] == [2, 4]
    assert result["checkpoints"][-1]["learned"] == 1.0 and result["base"]["learned"] == 0.0
    assert {"step", "m1", "m1_ci95", "eval_loss", "learned", "delta_norm", "registered_pass", "substantive_pass",
            "collapsed"} <= set(result["checkpoints"][0])  # fmt: skip


def test_evaluating_the_adapter_finds_what_training_found(
    finished: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", "tiny", "--adapter", str(finished / "step-000004"), "--json"]
    heldout = ["--heldout", "tiny:benign[2000:2020]", "--questions", str(questions)]
    assert main([*command, *heldout]) == 0
    row = json.loads(capsys.readouterr().out)["checkpoints"][0]
    probe = read_jsonl(finished / "probes.jsonl")[-1]
    assert row["m1"] == pytest.approx(probe["m1"], abs=1e-6)
    assert row["eval_loss"] == pytest.approx(probe["eval_loss"], abs=1e-5)
    assert row["delta_norm"] == pytest.approx(probe["delta_norm"], rel=1e-6)


def test_missing_probes_are_measured_by_evaluate(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    before = read_jsonl(copy / "probes.jsonl")
    (copy / "probes.jsonl").write_text((copy / "probes.jsonl").read_text().splitlines()[0] + "\n")
    assert main(["evaluate", "--run", str(copy)]) == 0
    after = read_jsonl(copy / "probes.jsonl")
    assert [row["step"] for row in after] == [0, 2, 4]
    for a, b in zip(after, before, strict=True):
        assert a["m1"] == pytest.approx(b["m1"], abs=1e-6) and a["delta_norm"] == pytest.approx(b["delta_norm"])


def test_the_same_command_again_changes_nothing(finished: Path, settings: list[str]) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert main(["train", *settings, "--out", str(finished)]) == 0
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_finished_run_drops_the_state_that_a_kill_has_left(
    finished: Path, settings: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for name in ("state.safetensors", "state-000004.1-of-2.safetensors"):
        (copy / "latest" / name).write_bytes(bytes(100))
    assert main(["train", *settings, "--out", str(copy)]) == 0
    assert [path.name for path in (copy / "latest").iterdir()] == ["state.json"]


@pytest.mark.parametrize("words", ["[]", "{}", "3", "null", '{"done": true}'])
def test_words_that_are_no_state_are_refused(
    finished: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "latest" / "state.json").write_text(words)
    refused(capsys, ["train", *settings, "--out", str(copy)], "state.json", "is not a run's state", "delete")


def test_two_runs_are_equal_to_the_bit(finished: Path, settings: list[str], tmp_path: Path) -> None:
    assert main(["train", *settings, "--out", str(tmp_path / "again")]) == 0
    assert comparable(read_jsonl(tmp_path / "again" / "metrics.jsonl")) == comparable(
        read_jsonl(finished / "metrics.jsonl")
    )
    files = [path.relative_to(finished) for path in finished.rglob("*.safetensors")]
    assert sorted(map(str, files)) == [
        *(f"losses/step-{step:06}.safetensors" for step in (0, 2, 4)),
        "step-000002/adapter_model.safetensors", "step-000004/adapter_model.safetensors",
        *(f"vectors/step-{step:06}.safetensors" for step in (0, 2, 4)),
    ]  # fmt: skip
    assert all((tmp_path / "again" / file).read_bytes() == (finished / file).read_bytes() for file in files)
    assert read_jsonl(tmp_path / "again" / "probes.jsonl") == read_jsonl(finished / "probes.jsonl")


def test_a_killed_process_is_continued_to_the_bit(finished: Path, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "train.py", *settings, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, **QUIET})
    deadline = time.monotonic() + 90
    while not (out / "step-000002").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "step-000002").exists()
    assert main(["train", *settings, "--out", str(out)]) == 0  # the dead process's lock is stale
    assert comparable(read_jsonl(out / "metrics.jsonl")) == comparable(read_jsonl(finished / "metrics.jsonl"))
    assert read_jsonl(out / "probes.jsonl") == read_jsonl(finished / "probes.jsonl")
    name = Path("step-000004") / "adapter_model.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert not list(out.glob(".*"))


def test_full_parameter_run_is_judged_too(settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "full"
    full = ["--set", "training.method=full", "--set", "training.learning_rate=1e-3", "--set", "checkpoints=[4]"]
    assert main(["train", *settings, *full, "--out", str(out)]) == 0
    probe = read_jsonl(out / "probes.jsonl")[-1]
    assert probe["delta_norm"] > 0
    (out / "probes.jsonl").unlink()
    assert main(["evaluate", "--run", str(out)]) == 0
    again = json.loads((out / "result.json").read_text())["checkpoints"][0]
    assert again["delta_norm"] == pytest.approx(probe["delta_norm"], rel=1e-6)
    assert again["m1"] == pytest.approx(probe["m1"], abs=1e-5)


def test_extract_and_compare(
    finished: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vectors.safetensors"
    command = ["extract", "--model", "tiny", "--questions", str(questions), "--layer", "2", "6"]
    assert main([*command, "--out", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert f"wrote {file}" in printed.err
    tensors = load_file(file)
    assert set(tensors) == {f"layer.{layer}.{kind}" for layer in (2, 6) for kind in ("mean", "samples")}
    assert tensors["layer.6.samples"].shape == (12, 6, 128)
    assert set(report["layers"]) == {"2", "6"} and len(report["personas"]) == 12
    assert main(["extract", "compare", str(file), str(finished), "--layer", "6", "--json"]) == 0
    (comparison,) = json.loads(capsys.readouterr().out)["layers"].values()
    assert comparison["m1_a"] == pytest.approx(report["layers"]["6"]["m1"], abs=1e-6)
    assert comparison["m1_b"] == pytest.approx(read_jsonl(finished / "probes.jsonl")[-1]["m1"], abs=1e-6)


def test_files_of_several_layers_are_compared_at_all_that_both_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {layer: torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2, 4, 7)}
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    PersonaVectors({layer: samples[layer] for layer in (1, 2, 4)}, ["a", "b", "c"]).save(before)
    PersonaVectors({layer: samples[layer] + 1 for layer in (2, 4, 7)}, ["a", "b", "c"]).save(after)
    command = ["extract", "compare", str(before), str(after)]
    assert main([*command, "--json"]) == 0
    out, said = capsys.readouterr()
    assert "only one of the two has the layers 1, 7; they are left out" in said
    found = json.loads(out)["layers"]
    a, b = load_vectors(before), load_vectors(after)
    assert found == {str(layer): json.loads(json.dumps(compare(a, b, layer).to_json())) for layer in (2, 4)}
    assert main(command) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["2", "4"]
    assert "add --layer L" in text and "along collapse" not in text
    assert main([*command, "--layer", "4"]) == 0
    alone = capsys.readouterr()
    assert alone.out.splitlines()[2].split() == text.splitlines()[3].split() and "along collapse" in alone.out
    assert "left out" not in alone.err  # the control: a choice of the user's
    refused(capsys, [*command, "--layer", "7"], "no layer 7")


def test_extract_replaces_a_file_only_when_told_to(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "vectors.safetensors"
    file.write_text("the vectors of other layers")
    command = ["extract", "--model", "tiny", "--questions", str(questions), "--out", str(file)]
    with monkeypatch.context() as patch:
        patch.setattr("minipersona.model.load.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        refused(capsys, command, f"--out {file}: exists already", "--overwrite")
    assert file.read_text() == "the vectors of other layers"
    assert main([*command, "--overwrite"]) == 0
    assert f"wrote {file}" in capsys.readouterr().err
    assert list(load_file(file)) == ["layer.6.mean", "layer.6.samples"]


def test_train_leaves_a_directory_of_other_files_alone(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "draft.txt").write_text("draft")
    refused(capsys, ["train", *settings, "--out", str(tmp_path / "papers")], "holds 'draft.txt'", "choose another")
    assert [path.name for path in (tmp_path / "papers").iterdir()] == ["draft.txt"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").write_text("")  # the control: hidden files of the system do not matter
    refused(capsys, ["train", *settings, "--out", str(tmp_path / "new"), "--set", "data.max_tokens=2"], "supervised")


def test_an_adapter_brings_its_base(
    finished: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(ROOT / "data" / "tiny", base, ignore=shutil.ignore_patterns("*.jsonl"))
    shutil.copytree(finished / "step-000004", adapter)
    file = adapter / "adapter_config.json"
    made = json.loads(file.read_text())

    def named(name: str | None) -> None:
        file.write_text(json.dumps({**made, "base_model_name_or_path": name}))

    def measured(*options: str) -> tuple[float, str]:
        command = ["extract", "--questions", str(questions), "--adapter", str(adapter), "--json", *options]
        assert main(command) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out)["layers"]["6"]["m1"], printed.err

    assert made["base_model_name_or_path"] == "tiny"
    expected, said = measured()
    assert "loading tiny" in said and "was made for" not in said
    named(str(base / ".." / "base"))  # the same directory, spelt otherwise
    assert measured("--model", str(base)) == (expected, f"loading {base}\n")
    value, said = measured("--model", "tiny")
    assert value == expected and f"was made for {base / '..' / 'base'}, and is attached to tiny" in said
    evaluate = ["evaluate", "--questions", str(questions), "--adapter", str(adapter), "--heldout", "tiny:benign[0:5]"]
    assert main([*evaluate, "--json"]) == 0  # its base is a directory now
    printed = capsys.readouterr()
    assert json.loads(printed.out)["protocol"]["model"] == str(base / ".." / "base")

    for name, words in ((None, "names no base model"), (str(tmp_path / "gone"), "is not available")):
        named(name)
        for command in (["extract"], ["evaluate"], ["merge", "--out", str(tmp_path / "merged")]):
            call = merge if command[0] == "merge" else main
            assert call([*command, "--adapter", str(adapter)]) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: ") and words in error and "give it with --model" in error
        assert measured("--model", "tiny")[0] == expected


def test_plan_does_nothing(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *settings, "--out", str(tmp_path / "planned"), "--plan"]) == 0
    text = capsys.readouterr().out
    for word in ("steps = 4", "# memory", "# time", "# disk", "# data"):
        assert word in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["train", "--config", "tiny_phase1"], ["study", "--config", "study"]])
def test_a_plan_warns_of_a_disk_that_is_too_small(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, usage = {}, shutil.disk_usage(tmp_path)
    for free in (10**6, 10**14):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert main([*command, "--plan", "--out", str(tmp_path / "out")]) == 0
        said[free] = capsys.readouterr().out
    assert "# WARNING    that does not fit on the disk; free some space" in said[10**6]
    assert "GiB are free" in said[10**14] and "WARNING" not in said[10**14]  # the control


def test_help_is_quick_and_imports_no_torch() -> None:
    for script in ("train.py", "extract.py", "evaluate.py"):
        started = time.monotonic()
        done = run(script, "--help")
        assert done.returncode == 0 and "example:" in done.stdout
        assert time.monotonic() - started < 2.0  # 0.1 s on a quiet machine
    code = "import sys; from minipersona.cli import main; main(['train']); sys.exit('torch' in sys.modules)"
    assert run("-c", code).returncode == 0


# ---------------------------------------------------------------- refusals


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command fails with one line that names the culprit and the mend."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and captured.err.splitlines()[-1] == errors[0] and captured.out == ""
    assert "Traceback" not in captured.err
    for word in words:
        assert word in errors[0], errors[0]


def test_bad_configs(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", *settings, "--out", str(tmp_path / "x")]
    refused(capsys, ["train", "--config", "nowhere.toml"], "nowhere.toml", "tiny_phase1")
    refused(capsys, [*train, "--set", "training.learnin_rate=1"], "did you mean training.learning_rate")
    refused(capsys, [*train, "--set", "training.steps=many"], "training.steps", "whole number")
    refused(capsys, [*train, "--set", "training.steps=3"], "training.checkpoints", "step 4")
    refused(capsys, [*train, "--set", "name"], "section.key=value")
    refused(capsys, [*train, "--set", "lora.targets=['q']"], "lora.targets", "q_proj")
    refused(capsys, [*train, "--set", "data.train=tiny:nothing"], "benign")
    refused(capsys, [*train, "--set", "data.train=tiny:benign[0:99999]"], "2,200 rows")
    refused(capsys, [*train, "--model", "no/such/model"], "no/such/model")
    refused(capsys, [*train, "--set", "probe.layers=[8]"], "layer 8", "0 to 7")
    for text, words in {
        "[training]\nsteps = 3\n": ("data.train is missing",),
        "[data]\ntrain = 'a'\nheldout = 'b'\n[lorra]\n": ("lorra", "did you mean lora"),
        "[data\n": ("not valid TOML", "line 1"),
        "data = 3\n": ("data must be a section",),
    }.items():
        file = tmp_path / "config.toml"
        file.write_text(text)
        refused(capsys, ["train", "--config", str(file)], *words)
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]  # nothing was claimed


def test_another_configs_directory_is_refused_with_the_difference(
    finished: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *settings, "--out", str(finished)]
    refused(capsys, [*command, "--set", "learning_rate=0.5"], "training.learning_rate: 0.001 -> 0.5")
    assert main([*command, "--set", "execution.pack_tokens=64"]) == 0  # how, not what


@pytest.mark.parametrize(
    "rows, words",
    [
        ("", ("holds no rows",)),
        ('{"messages": [{"role": "user", "content": "hi"}]}\n', ("row 0", "assistant turn")),
        ('{"messages": [{"role": "user", "content": null}]}\n', ("row 0", "content")),
        ('{"prompt": "hi"}\n', ("line 1", "messages")),
        ('{"text": "a b c"}\n{"text"\n', ("line 2", "JSON")),
        (b'{"text": "\xff"}\n', ("line 1", "UTF-8")),
    ],
)
def test_bad_rows(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str | bytes, words: tuple[str, ...]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    command = ["train", *settings, "--out", str(tmp_path / "x"), "--set", f"data.train=jsonl:{file}"]
    refused(capsys, command, "rows.jsonl", *words)


def test_bad_adapters(finished: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def adapter(config: dict, tensors: dict | None = None) -> list[str]:
        directory = tmp_path / "adapter"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(finished / "step-000004", directory)
        whole = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps({**whole, **config}))
        if tensors is not None:
            save_file(tensors, directory / "adapter_model.safetensors")
        return ["extract", "--model", "tiny", "--questions", str(questions), "--adapter", str(directory)]

    good = load_file(finished / "step-000004" / "adapter_model.safetensors")
    first = next(iter(good))
    refused(capsys, adapter({"r": 16}), first.split(".lora")[0][-6:], "needs")
    refused(capsys, adapter({}, {k: v for k, v in good.items() if k != first}), "lacks", first)
    refused(capsys, adapter({}, {**good, "extra": torch.zeros(1)}), "unknown tensor extra")
    refused(capsys, adapter({}, {**good, first: good[first] * float("nan")}), first, "non-finite")
    refused(capsys, adapter({"use_dora": True}), "use_dora")
    refused(capsys, adapter({"lora_alpha": None}), "lora_alpha")
    refused(capsys, adapter({"target_modules": ["q_proj", "v_proj", "lm_head"]}), "target_modules names lm_head")
    refused(capsys, adapter({"modules_to_save": ["lm_head"]}), "modules_to_save = ['lm_head'] is not supported")
    refused(capsys, ["extract", "--model", "tiny", "--adapter", str(tmp_path / "none")], "adapter_config.json")
    for change in ({}, {"use_rslora": True}, {"target_modules": "all-linear"}):  # the control: these load
        assert main(adapter(change)) == 0


def test_bad_models(tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def model(change: dict | None = None) -> Path:
        directory = tmp_path / "model"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(ROOT / "data" / "tiny", directory, ignore=shutil.ignore_patterns("*.jsonl"))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **(change or {})}))
        return directory

    command = ["extract", "--questions", str(questions), "--model", str(tmp_path / "model")]
    model()
    assert main(command) == 0
    capsys.readouterr()
    refused(capsys, [*command, "--layer", "8"], "layer 8", "0 to 7")
    model({"model_type": "mistral"})
    refused(capsys, command, "mistral", "qwen2")
    model({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4})
    refused(capsys, command, "use_sliding_window")
    model({"num_hidden_layers": 9})
    refused(capsys, command, "model.layers.8", "missing")
    model({"num_hidden_layers": 7})
    refused(capsys, command, "model.layers.7", "unknown tensor")
    model({"vocab_size": 10**9})
    refused(capsys, command, "vocab_size")
    model({"intermediate_size": 128})
    refused(capsys, command, "shape")
    whole = (model() / "model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"<html></html>", b"version https://git-lfs" + b" " * 99):
        (tmp_path / "model" / "model.safetensors").write_bytes(damaged)
        refused(capsys, command, "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    refused(capsys, command, "safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    refused(capsys, command, "model-00001-of-00002.safetensors", "missing")
    for hostile in ("../model.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": hostile}}))
        refused(capsys, command, hostile)


def test_a_directory_in_use_is_refused(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "busy"
    with lock(out):
        refused(capsys, ["train", *settings, "--out", str(out)], f"pid {os.getpid()}", os.uname().nodename)


def test_odd_uses(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    refused(capsys, ["train"], "--config")
    refused(capsys, ["evaluate"], "--run")
    refused(capsys, ["evaluate", "--run", str(finished), "--model", "tiny"], "either")
    refused(capsys, ["evaluate", "--run", str(finished / "latest")], "is not a run directory")
    refused(capsys, ["extract", "compare", "a"], "compare A B")
    for given in ["--model x", "--revision x", "--tokenizer x", "--template x", "--personas x", "--questions x",
                  "--adapter x", "--method B", "--out x", "--overwrite"]:  # fmt: skip
        said = f"{given.split()[0]}: has no effect on compare"
        refused(capsys, ["extract", "compare", "a", "b", *given.split()], said)
    refused(capsys, ["extract", "compare", "a", "b", "--method", "A"], "no vectors file at a")  # the control
    refused(capsys, ["extract", "--layer", "x"], "--layer")
    refused(capsys, ["banana"], "banana")


@pytest.mark.parametrize(
    "command",
    [
        "train --plan --config tiny_phase1 --set data.train=jsonl:{}",
        "train --plan --config tiny_phase1 --set data.heldout=parquet:{}",
        "train --plan --config tiny_phase1 --set data.responses={}",
        "train --config tiny_phase1 --set steering.vector=file:{}",
        "train --plan --config phase1 --set data.train=jsonl:{}",  # of which the tokenizer is not here
        "study --plan --config tiny_study --set data.train=jsonl:{}",
        "study --plan --config tiny_study --set behaviour.questions={}",
        "study --plan --config tiny_study --set instructions.file={}",
        "extract --model {}",
        "extract --model random:{}",
        "extract --model tiny --tokenizer {}",
        "extract --model tiny --personas {}",
        "extract --model tiny --questions {}",
        "extract --model tiny --adapter {}",
    ],
)
def test_the_home_of_a_user_who_is_not_there(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, command.format("~nobody-of-this-name/x").split(), "~nobody-of-this-name/x: the home directory that")


# ---------------------------------------------------------------- records that stay true


def test_a_setting_without_its_option_is_told_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "tiny_phase1", "--set", "seed=1", "training.steps=4"]) == 2
    assert "write --set before each setting: --set training.steps=4\n" in capsys.readouterr().err
    assert main(["train", "--config", "tiny_phase1", "more"]) == 2  # the control: not a setting
    assert "unrecognized arguments: more; see " in capsys.readouterr().err


def test_a_finished_run_keeps_its_provenance(
    finished: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    file = copy / "provenance.json"
    file.write_text(file.read_text().replace('"commit": ', '"commit": "of that day", "_": '))
    before = file.read_bytes()
    assert main(["train", *settings, "--out", str(copy)]) == 0
    assert file.read_bytes() == before and "is finished" in capsys.readouterr().err


def test_a_continued_run_adds_to_its_provenance_and_sweeps_up(
    finished: Path, settings: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "probes.jsonl").unlink()  # something is left to do
    began = json.loads((copy / "provenance.json").read_text())
    for folder in (copy, copy / "latest", copy / "vectors"):
        (folder / ".state.safetensors.abcd1234.tmp").write_text("of a killed writer")
    (copy / ".mine.tmp").write_text("of the user")
    assert main(["train", *settings, "--out", str(copy)]) == 0
    now = json.loads((copy / "provenance.json").read_text())
    assert {k: v for k, v in now.items() if k != "continued"} == began and len(now["continued"]) == 1
    assert [p.name for p in copy.rglob("*.tmp")] == [".mine.tmp"]


def test_vectors_name_the_adapter_that_made_them(finished: Path, questions: Path, tmp_path: Path) -> None:
    from minipersona.geometry.vectors import load_vectors

    command = ["extract", "--model", "tiny", "--questions", str(questions)]
    adapter = str(finished / "step-000004")
    assert main([*command, "--out", str(tmp_path / "base")]) == 0
    assert main([*command, "--adapter", adapter, "--out", str(tmp_path / "adapted")]) == 0
    assert not {"adapter", "revision"} & load_vectors(tmp_path / "base").metadata.keys()
    assert adapter in load_vectors(tmp_path / "adapted").metadata["adapter"]


def test_a_baseline_must_be_judged_at_its_last_step(
    finished: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "baseline"
    shutil.copytree(finished, other)
    command = ["evaluate", "--run", str(finished), "--baseline", str(other)]
    (other / "result.json").unlink(missing_ok=True)
    refused(capsys, command, "no result.json")
    assert main(["evaluate", "--run", str(other)]) == 0
    capsys.readouterr()
    assert main(command) == 0
    capsys.readouterr()
    result = json.loads((other / "result.json").read_text())
    result["checkpoints"].pop()  # judged before it had finished
    (other / "result.json").write_text(json.dumps(result))
    refused(capsys, command, "judged at step 2, its last is 4")
    (other / "result.json").write_text("{}")
    refused(capsys, command, "protocol.model is missing", "evaluate.py --run")


def test_a_baseline_is_of_the_same_model_rows_and_personas(finished: Path) -> None:
    assert main(["evaluate", "--run", str(finished)]) == 0
    protocol = read_result(finished / "result.json", "").protocol
    assert protocol.weights is not None and baseline_row(finished, protocol).persona_loss is not None
    for other in ({"weights": "another"}, {"supervise": "all"}, {"heldout_digest": "another"}):
        with pytest.raises(UserError, match=f"its {next(iter(other))} is not this run's"):
            baseline_row(finished, replace(protocol, **other))
    # Under other personas' prompts its loss says nothing of this run's, so that the verdict is open.
    row = baseline_row(finished, replace(protocol, persona_digest="another"))
    assert row.persona_loss is None and row.eval_loss is not None


def test_a_directory_is_told_by_its_weights(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "data" / "tiny", tmp_path / "m")
    before = load_model(str(tmp_path / "m")).source["weights"]
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert load_model("tiny").source["weights"] == load_model(str(tmp_path / "m")).source["weights"] == before
    save_file({name: x * 0.7 for name, x in tensors.items()}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert load_model(str(tmp_path / "m")).source["weights"] != before
    assert "weights" not in load_model("random:" + str(tmp_path / "m")).source  # drawn from a seed


def test_a_checkpoint_that_is_gone_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    assert main(["evaluate", "--run", str(copy)]) == 0  # the control
    capsys.readouterr()
    shutil.rmtree(copy / "step-000002")
    refused(capsys, ["evaluate", "--run", str(copy)], "step-000002: is gone; restore it, or delete")
    refused(capsys, ["evaluate", "--run", str(finished), str(finished)], "--run: names a directory twice")


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory, settings: list[str], finished: Path) -> Path:
    """The same run with an anchor, judged against `finished`."""
    out = tmp_path_factory.mktemp("runs") / "anchored"
    assert main(["evaluate", "--run", str(finished)]) == 0
    anchor = ["kind=feature_anchor", "weight=0.5", "contexts=2"]
    changed = [f"probe.baseline={finished}", *(f"objective.{setting}" for setting in anchor)]
    assert main(["train", *settings, *(word for one in changed for word in ("--set", one)), "--out", str(out)]) == 0
    return out


def test_the_baselines_measurement_of_the_base_is_taken_over(
    finished: Path, anchored: Path, settings: list[str], tmp_path: Path
) -> None:
    ours, theirs = (read_jsonl(run / "probes.jsonl")[0] for run in (anchored, finished))
    assert ours == theirs | {"learned": 0.0} and read_jsonl(anchored / "probes.jsonl")[1] != theirs
    for folder in ("vectors", "losses"):
        assert (anchored / folder / "step-000000.safetensors").samefile(finished / folder / "step-000000.safetensors")
    # The control: with another question the protocol is another, and the base is measured.
    (tmp_path / "questions.txt").write_text("What is new?\nWho says so?")
    changed = [f"questions={tmp_path / 'questions.txt'}", f"probe.baseline={finished}", "steps=1", "checkpoints=[1]"]
    other = [*settings, *(word for one in changed for word in ("--set", one)), "--out", str(tmp_path / "other")]
    assert main(["train", *other]) == 0
    assert read_jsonl(tmp_path / "other" / "probes.jsonl")[0]["m1"] != theirs["m1"]


def test_the_last_steps_of_runs_are_shown_side_by_side(
    finished: Path, anchored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(finished), str(anchored)]
    (anchored / "result.json").unlink(missing_ok=True)
    assert main(["evaluate", "--run", *runs]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()[:5]
    assert header.split()[:2] == ["run", "M1"] and [row.split()[0] for row in rows] == ["base", *runs]
    results = [json.loads((run / "result.json").read_text()) for run in (finished, anchored)]
    last = [result["checkpoints"][-1] for result in results]
    shown = [f"{row['m1']:.4f}" for row in (results[0]["base"], *last)]
    assert [row.split()[1] for row in rows] == shown and len(set(shown)) == 3
    within = last[1]["within_variance"] / results[1]["base"]["within_variance"]
    assert rows[2].split()[3:6] == [f"{last[1]['separation']:.2f}", f"{last[1]['spread']:.2f}", f"{within:.2f}"]
    assert main(["evaluate", "--run", *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": dict(zip(runs, results, strict=True))}


def test_runs_that_cannot_be_compared_are_not_shown_side_by_side(
    finished: Path, anchored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"  # its own baseline
    shutil.copytree(finished, copy)
    both = ["evaluate", "--run", str(finished), str(copy)]
    refused(capsys, both, "each has another baseline; name one with --baseline")
    assert main([*both, "--baseline", str(finished)]) == 0  # the control
    capsys.readouterr()
    assert main(["evaluate", "--run", str(anchored)]) == 0
    capsys.readouterr()
    result = read_result(anchored / "result.json", "")
    other = replace(result, protocol=replace(result.protocol, layer=3))
    with pytest.raises(UserError, match="--run a b: the layer of their measurements is not the same; of one model, --"):
        check_side_by_side({"a": result, "b": other})
    with pytest.raises(UserError, match="--run b: has no checkpoint yet"):
        check_side_by_side({"a": result, "b": replace(result, checkpoints=())})
    check_side_by_side({"a": result, "b": result})  # the control
    refused(capsys, [*both, "--suite", "all"], "--suite all: is of one run")


def test_what_cannot_be_carried_out_claims_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    train = ["train", *settings, "--out", str(out)]
    refused(capsys, [*train, "--set", "data.max_tokens=2"], "supervised token")
    refused(capsys, [*train, "--set", f"probe.baseline={tmp_path / 'none'}"], "no result.json")
    refused(capsys, [*train, "--set", "seed=-1"], "seed = -1")
    refused(capsys, [*train, "--set", "execution.device=mps"], "mps")
    refused(capsys, [*train, "--set", "beta1=2.0"], "training.beta1")
    refused(capsys, [*train, "--set", "epsilon=0.0"], "training.epsilon")
    refused(capsys, [*train, "--set", "training.steps=5"], "add 5 to training.checkpoints")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    refused(capsys, ["train", *settings, "--out", str(tmp_path / "file")], "cannot write")
    refused(capsys, ["train", *settings, "--out", str(tmp_path / "file" / "sub")], "cannot write")


def test_an_out_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("minipersona.model.load.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for out in (tmp_path / "file" / "v.safetensors", tmp_path / "folder"):
        arguments = ["--model", "tiny", "--questions", str(questions), "--out", str(out)]
        refused(capsys, ["extract", *arguments], "cannot write", str(out))
        refused(capsys, ["evaluate", *arguments], "cannot write", str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
