"""A process that is killed at any moment of a save leaves the old state or the new one, and can be run again.

A child process saves twice: the second save is killed at its first call to the system, at its second, and so on,
until one gets through. Python announces these calls to audit hooks; fsync it does not, so that is wrapped.
"""

from __future__ import annotations

import html
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from forking import run_code

from minipersona import files
from minipersona.files import append_jsonl, read_jsonl, sweep_temporaries, write_atomically, write_directory_atomically

# Forks one child for each call at which to be killed; prints how many calls an undisturbed save makes.
HARNESS = """
import os, shutil, signal, sys, tempfile
from pathlib import Path
SETUP
root, calls, fatal, armed = Path(sys.argv[1]), 0, 0, False
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.scandir")
def called(event, arguments):
    global calls
    if armed and event in EVENTS:
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
real_sync = os.fsync
def sync(descriptor):
    called("open", ())
    real_sync(descriptor)
    called("open", ())
os.fsync = sync
old = Path(tempfile.mkdtemp(dir=root.parent))
save(old, "old")
for fatal in range(1, 200):
    where = root / f"{fatal:03}"
    shutil.copytree(old, where)
    child = os.fork()
    if not child:
        armed = True
        sys.addaudithook(called)
        save(where, "new")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(fatal - 1)
"""

SAVES = {
    "file": """
        from minipersona.files import write_text
        def save(where, what):
            write_text(where / "state", what * 1000)
    """,
    "directory": """
        from minipersona.files import write_directory_atomically
        def save(where, what):
            with write_directory_atomically(where / "state") as folder:
                (folder / "deep").mkdir()
                (folder / what).write_text(what)
                (folder / "deep" / "file").write_text(what)
    """,
    "line": """
        from minipersona.files import append_jsonl
        def save(where, what):
            append_jsonl(where / "state", {"what": what})
    """,
    "adapter": """
        import torch
        from conftest import SIZES
        from minipersona.config import LoraConfig
        from minipersona.model.adapter_files import save_adapter
        from minipersona.model.lora import adapters, apply_lora
        from minipersona.model.network import Qwen2
        config = LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))
        model = apply_lora(Qwen2(SIZES), config)
        def save(where, what):
            with torch.no_grad():
                for adapter in adapters(model).values():
                    adapter.lora_B.fill_(1.0 if what == "old" else 2.0)
            save_adapter(model, where / "state")
    """,
    "vectors": """
        import torch
        from minipersona.geometry.vectors import PersonaVectors
        def save(where, what):
            value = 1.0 if what == "old" else 2.0
            PersonaVectors({6: torch.full((2, 3, 4), value)}, ["a", "b"]).save(where / "state")
    """,
    "checkpoint": """
        import torch
        from minipersona.training.checkpoint import Position, save_state
        from minipersona.training.optimizer import Flat
        from minipersona.training.optimizer import AdamW
        from minipersona.training.distributed import Distributed
        weights = {"w": torch.nn.Parameter(torch.zeros(10, 9))}
        layout, distributed = Flat(list(weights.values())), Distributed(0, 1, torch.device("cpu"))
        def save(where, what):
            with torch.no_grad():
                for tensor in (*layout.weights, *layout.exp_avg, *layout.exp_avg_sq):
                    tensor.fill_(1.0 if what == "old" else 2.0)
            optimizer = AdamW(layout, 0.9, 0.999, 1e-8, 0.0)
            save_state(where / "state", Position(step=1 if what == "old" else 2), weights, optimizer, distributed)
    """,
    "shards": """
        import torch
        from types import SimpleNamespace
        from minipersona.training.checkpoint import Position, save_state
        from minipersona.training.optimizer import AdamW
        from minipersona.training.distributed import Distributed
        Distributed.barrier = lambda self: None  # the ranks come one after the other
        Distributed.broadcast = lambda self, value: 7
        def save(where, what):
            step = 1 if what == "old" else 2
            for rank in (1, 0):
                kept = {name: [torch.full((5, 9), float(step))] for name in ("weights", "exp_avg", "exp_avg_sq")}
                optimizer = AdamW(SimpleNamespace(**kept, saved_rows=lambda index: slice(None)), 0.9, 0.999, 1e-8, 0.0)
                distributed = Distributed(rank, 2, torch.device("cpu"))
                save_state(where / "state", Position(step=step), {"w": None}, optimizer, distributed)
    """,
    "report": """
        from report.conftest import RECIPES, FakeStudy
        from minipersona.report import write
        def save(where, what):
            global armed
            write.draw_all = lambda series: {one.name: f"PNG {what}".encode() for one in series}
            sharp, armed = armed, False  # the report is the save, not what it is about
            study = FakeStudy(where / "state", recipes=RECIPES[:1], with_vectors=False)
            if what == "old":
                study.write()
            data = "[data]\\ntrain = 'tulu[0:6000]'\\nheldout = 'tulu[6000:6500]'\\n"
            (where / "state" / "study.toml").write_text(f"out = '{what}'\\n{data}")
            armed = sharp
            write.write_report(where / "state")
    """,
    "cache": """
        import huggingface_hub.constants
        from minipersona.corpus import cache
        def save(where, what):
            huggingface_hub.constants.HF_HOME = str(where / "state")
            cache.load({"of": what}) or cache.store({"of": what}, "c" * 40, [{"text": what}] * 3)
    """,
}


def found_text(where: Path) -> str:
    text = (where / "state").read_text()
    return text[:3] if text == text[:3] * 1000 else "torn"


def found_folder(where: Path) -> str:
    inner = {path.name: path.read_text() for path in (where / "state").iterdir() if path.is_file()}
    [(name, text)] = inner.items()
    return name if name == text == (where / "state" / "deep" / "file").read_text() else "torn"


def found_line(where: Path) -> str:
    return str([row["what"] for row in read_jsonl(where / "state")][-1])


def found_adapter(where: Path) -> str:
    from conftest import SIZES

    from minipersona.model.adapter_files import load_adapter
    from minipersona.model.lora import adapters
    from minipersona.model.network import Qwen2

    model = Qwen2(SIZES)
    load_adapter(model, where / "state")
    [value] = {float(x) for adapter in adapters(model).values() for x in adapter.lora_B.detach().unique()}
    return {1.0: "old", 2.0: "new"}[value]


def found_vectors(where: Path) -> str:
    from minipersona.geometry.vectors import load_vectors

    return {1.0: "old", 2.0: "new"}[float(load_vectors(where / "state").mean(6)[0, 0])]


def found_checkpoint(where: Path) -> str:
    from torch import nn, zeros

    from minipersona.training.checkpoint import load_state
    from minipersona.training.optimizer import AdamW, Flat

    weights = {"w": nn.Parameter(zeros(10, 9))}
    layout = Flat(list(weights.values()))
    step = load_state(where / "state", weights, AdamW(layout, 0.9, 0.999, 1e-8, 0.0)).step
    tensors = (*layout.weights, *layout.exp_avg, *layout.exp_avg_sq)
    assert {float(value) for tensor in tensors for value in tensor.detach().unique()} == {float(step)}
    return {1: "old", 2: "new"}[step]


def found_report(where: Path) -> str:
    """Its files are replaced one by one, the page last: each is whole, the old one or the new one."""
    folder = where / "state"
    pictures = list((folder / "figures").glob("*.png"))
    assert len(pictures) >= 2 and {picture.read_bytes() for picture in pictures} <= {b"PNG old", b"PNG new"}
    assert all(file.read_text().endswith("\n") for file in (folder / "report.md", *folder.glob("figures/*.csv")))
    page = (folder / "report.html").read_text()
    assert page.endswith("</html>\n")
    return "new" if "out = 'new'" in html.unescape(page) else "old"


def found_cache(where: Path) -> str:
    import huggingface_hub.constants

    from minipersona.corpus import cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(where / "state"))
        old, new = (cache.load({"of": what}) for what in ("old", "new"))
    assert old is not None and old.rows == [{"text": "old"}] * 3
    return "old" if new is None else "new"


FOUND: dict[str, Callable[[Path], str]] = {
    "file": found_text,
    "directory": found_folder,
    "line": found_line,
    "adapter": found_adapter,
    "vectors": found_vectors,
    "checkpoint": found_checkpoint,
    "shards": found_checkpoint,
    "report": found_report,
    "cache": found_cache,
}


def killed_everywhere(save: str, root: Path) -> int:
    code = HARNESS.replace("SETUP", textwrap.dedent(save))
    done = run_code(code, str(root))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("kind", SAVES)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_state(kind: str, tmp_path: Path) -> None:
    calls = killed_everywhere(SAVES[kind], tmp_path)
    assert calls >= 4
    found = []
    for where in sorted(tmp_path.iterdir()):
        sweep_temporaries(where)  # as the next command does
        found.append(FOUND[kind](where))
        assert not list(where.glob(".*.????????.*"))
    assert len(found) == calls + 1
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}  # once new, always new


CARELESS = """
    import shutil
    def save(where, what):
        shutil.rmtree(where / "state", ignore_errors=True)
        (where / "state" / "deep").mkdir(parents=True)
        for name in (what, "deep/file"):
            (where / "state" / name).write_text(what)
"""


def test_control_a_save_in_place_is_caught(tmp_path: Path) -> None:
    killed_everywhere(CARELESS, tmp_path)
    with pytest.raises((FileNotFoundError, ValueError)):
        for where in sorted(tmp_path.iterdir()):
            sweep_temporaries(where)
            assert FOUND["directory"](where) != "torn"


def test_what_was_moved_aside_is_put_back_by_the_next_write(tmp_path: Path) -> None:
    killed_everywhere(SAVES["directory"], tmp_path)
    between = [where for where in sorted(tmp_path.iterdir()) if not (where / "state").exists()]
    assert between  # some kill did fall between the two moves
    for where in between:
        with pytest.raises(ZeroDivisionError), write_directory_atomically(where / "state"):
            _ = 1 / 0
        assert found_folder(where) == "old"
        with write_directory_atomically(where / "state") as folder:
            (folder / "deep").mkdir()
            (folder / "third").write_text("third")
            (folder / "deep" / "file").write_text("third")
        assert found_folder(where) == "third"
        assert [path.name for path in where.glob(".*.old")] == []


def test_a_directory_that_cannot_take_its_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with write_directory_atomically(tmp_path / "d") as folder:
        (folder / "old").write_text("old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(files.UserError, match="cannot write"), write_directory_atomically(tmp_path / "d") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["old"]


def test_everything_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that a loss of power asks for: contents, nested ones too; then the name; then the name's folder."""
    order: list[tuple[str, str]] = []
    sync, replace, rename = os.fsync, os.replace, os.rename

    def noted_sync(descriptor: int) -> None:
        order.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("name", Path(b).name)), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(("name", Path(b).name)), rename(a, b)))
    with write_directory_atomically(tmp_path / "d") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "deep").write_text("x")
        (folder / "file").write_text("y")
        temporary = folder.name
    named = order.index(("name", "d"))
    assert {("sync", name) for name in ("deep", "inner", "file", temporary)} == set(order[:named])
    assert order.index(("sync", "deep")) < order.index(("sync", "inner"))
    assert order[named + 1 :] == [("sync", tmp_path.name)]
    order.clear()
    with write_atomically(tmp_path / "f") as temporary_file:
        temporary_file.write_text("z")
        name = temporary_file.name
    assert order == [("sync", name), ("name", "f"), ("sync", tmp_path.name)]
    order.clear()
    append_jsonl(tmp_path / "log", {"a": 1})
    assert order == [("sync", "log"), ("sync", tmp_path.name)]


def test_a_line_without_its_end_does_not_count(tmp_path: Path) -> None:
    """The next append drops it. Counted before that, a measurement would be skipped and then lost."""
    path = tmp_path / "log"
    append_jsonl(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2}')  # whole but for the line end
    assert read_jsonl(path) == [{"step": 1}]
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]
    assert read_jsonl(path, torn=False) == read_jsonl(path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_sweep_with_an_age_spares_who_is_still_writing(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "f") as temporary:
        sweep_temporaries(tmp_path, older_than=60)
        assert temporary.exists()
        sweep_temporaries(tmp_path)
        assert not temporary.exists()
        temporary.write_text("x")
