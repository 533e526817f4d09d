"""The installed package: built as a wheel, put into an empty environment, run from an empty directory."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    return next(out.glob("*.whl"))


def test_the_wheel_carries_data_and_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = ("data/personas.json", "data/questions.jsonl", "data/tiny/model.safetensors", "data/tiny/tokenizer.json")
    for shipped in (*data, "configs/tiny_phase1.toml"):
        assert f"minipersona/shipped/{shipped}" in names
    assert {f"minipersona/report/page.{kind}" for kind in ("html.j2", "css", "js")} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks")) or "__pycache__" in name]
    assert wheel.stat().st_size < 10_000_000


def test_the_command_works_after_a_plain_install_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    """torch and the other dependencies are borrowed from this environment; the package itself is the wheel's."""
    target = tmp_path / "environment"
    venv.create(target, with_pip=False, symlinks=True)
    library = next(target.glob("lib/python3*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(target / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True, timeout=120)
    borrowed = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    (library / "borrowed.pth").write_text(f"{borrowed}\n")  # after the wheel's own place on the path
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(target / "bin" / "python"), "-m", "minipersona", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=120, env=environment)

    where = subprocess.run(
        [str(target / "bin" / "python"), "-c", "import minipersona; print(minipersona.__file__)"],
        cwd=elsewhere, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(target)), where.stdout
    assert (target / "bin" / "minipersona").exists()
    small = ["--set", "training.steps=1", "--set", "checkpoints=[1]", "--set", "data.heldout=tiny:benign[2000:2004]"]
    (elsewhere / "questions.jsonl").write_text('{"question": "What is sleep?"}\n{"question": "What is work?"}\n')
    done = run("train", "--config", "tiny_phase1", *small, "--set", "questions=questions.jsonl")
    assert done.returncode == 0, done.stderr
    done = run("evaluate", "--run", "runs/tiny_phase1")
    assert done.returncode == 0 and "base" in done.stdout, done.stderr
