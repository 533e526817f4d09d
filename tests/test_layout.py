"""The house rules that no type checker sees: imports go down, nothing is unpickled, nothing names a machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minipersona"

# Lower may not import higher, and folders of one rank do not import each other.
RANK = {
    "model": 0,
    "chat": 0,
    "corpus": 1,
    "objective": 2,
    "training": 3,
    "geometry": 3,
    "behaviour": 4,
    "run": 5,
    "verdict": 6,
    "study": 7,
    "report": 8,
    "tiny": 8,
    "cli": 9,
    "__main__": 10,
}
LEAVES = {
    "behaviour_config",
    "config",
    "console",
    "errors",
    "files",
    "hub",
    "locks",
    "records",
    "settings",
    "significance",
    "study_config",
    "text_rows",
}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the minipersona modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minipersona":
            assert node.level == 0
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "minipersona")


def violations(files: dict[str, list[str]]) -> list[str]:
    """`files` maps "folder/file.py" (or "leaf.py") to what it imports."""
    found = []
    for file, names in files.items():
        here = file.split("/")[0].removesuffix(".py")
        for name in names:
            parts = name.split(".")
            there = parts[1] if len(parts) > 1 else ""
            if there == here or there in LEAVES or not there:
                continue
            if here in LEAVES:
                found.append(f"{file}: a leaf imports {name}")
            elif here in RANK and RANK[there] >= RANK[here]:
                found.append(f"{file}: imports {name}, which is not below it")
    return found


def test_imports_go_down() -> None:
    files = {
        path.relative_to(PACKAGE).as_posix(): list(imports(path))
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE or path.stem not in ("__init__",)
    }
    assert len(files) > 30
    assert {file.split("/")[0].removesuffix(".py") for file in files} <= RANK.keys() | LEAVES
    assert violations(files) == []


def test_control_an_upward_import_is_seen() -> None:
    assert violations({"model/load.py": ["minipersona.corpus.batch"]})
    assert violations({"training/loop.py": ["minipersona.geometry.measures"]})
    assert violations({"files.py": ["minipersona.model.load"]})
    assert violations({"verdict/results.py": ["minipersona.study.recipes"]})
    assert not violations({"run/train.py": ["minipersona.training.loop", "minipersona.errors"]})


def python_files() -> list[Path]:
    return [p for p in ROOT.rglob("*.py") if not {".venv", "build", "dist"} & set(p.relative_to(ROOT).parts)]


# Whatever unpickles: the readers of torch (its distributed checkpoints and its collectives of objects among them),
# numpy and the standard library; and what has a library run code that came with a model.
UNPICKLES = re.compile(
    r"torch\.(jit\.)?load\(|torch\.package|torch\.hub|distributed\.checkpoint|\bdcp\b|_object(_list)?\(|weights_only|"
    r"\b(c?pickle|dill|joblib|shelve|marshal)\b|allow_pickle\s*=|np\.load\(|read_pickle|trust_remote_code"
)


def test_nothing_is_unpickled() -> None:
    files = [path for path in python_files() if path != Path(__file__)]
    assert len(files) > 200 and [path for path in files if UNPICKLES.search(path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    ["torch.load(path)", "torch.jit.load(path)", "import pickle", "from torch.distributed import checkpoint as dcp",
     "import torch.distributed.checkpoint", "dist.all_gather_object(found, mine)", "dist.broadcast_object_list(words)",
     "np.load(file, allow_pickle=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)"],
)  # fmt: skip
def test_control_what_unpickles_is_seen(line: str) -> None:
    assert UNPICKLES.search(line)


def test_home_directories_are_found_in_one_place() -> None:
    """`Path.expanduser` raises RuntimeError for a user who is not there, which `user_path` explains."""
    found = [path.name for path in (ROOT / "minipersona").rglob("*.py") if "expanduser(" in path.read_text()]
    assert found == ["files.py"]


# What torch may move without notice: names with an underscore, its operators, and how it calls a module.
PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-z]|\btorch\.ops\b|\bfrom torch[\w.]* import .*\b_[a-z]|_call_impl\b")


def test_private_interfaces_of_torch_stand_in_one_folder() -> None:
    using = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert {path.parent.as_posix() for path in using} == {"model/acceleration"}
    assert {path.stem for path in using} == {"compiler", "foreach", "token_attention"}


@pytest.mark.parametrize(
    "line",
    ["torch._foreach_mul_(scaled, factor)", "torch.ops.aten.mm(a, b)", "from torch._inductor import config",
     "from torch.nn import functional, _reduction", "torch.utils._pytree.tree_map(f, x)", "block._call_impl(h)"],
)  # fmt: skip
def test_control_a_private_interface_is_seen(line: str) -> None:
    assert PRIVATE.search(line) and not PRIVATE.search("torch.__version__")


@pytest.mark.parametrize("folder", ["minipersona", "configs", "docs", "benchmarks"])
def test_no_file_names_a_machine(folder: str) -> None:
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".md", ".toml", ".json"):
            assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|mnt)/\w", path.read_text()), path


def test_every_public_name_is_documented_and_importable() -> None:
    import minipersona

    for name in minipersona.__all__:
        thing = getattr(minipersona, name)
        assert thing.__doc__ and len(thing.__doc__) > 20, name
    with pytest.raises(AttributeError):
        _ = minipersona.no_such_thing


def loaded_by(*codes: str) -> list[set[str]]:
    """Which of torch and its compiler a process has imported after each of these pieces of code, in turn."""
    report = "print('loaded:', *{'torch', 'torch._dynamo'} & set(sys.modules))"
    command = [sys.executable, "-c", "import sys\n" + "".join(f"{code}\n{report}\n" for code in codes)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [set(line.split()[1:]) for line in said.splitlines() if line.startswith("loaded:")]


def test_what_is_dear_to_import_waits_until_it_is_needed() -> None:
    """--help imports no torch, and neither the library nor a training pass a compiler (1.5 s) where there is no GPU."""
    helps = "from minipersona.cli import main\ntry:\n    main(['study', '--help'])\nexcept SystemExit:\n    pass"
    assert loaded_by(helps) == [set()]
    library = "from minipersona import extract, load_model, m1"
    training = (
        "import torch; from minipersona import apply_lora, load_model; from minipersona.config import LoraConfig\n"
        "apply_lora(load_model('tiny'), LoraConfig()).logits(torch.zeros(1, 2, dtype=torch.long)).sum().backward()"
    )
    compiler = "import torch._dynamo"  # the control
    if not torch.cuda.is_available():
        assert loaded_by(library, training, compiler) == [{"torch"}, {"torch"}, {"torch", "torch._dynamo"}]
