"""The base that an adapter is attached to, and adapters from the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, LoopbackHub, Repository

from minipersona.config import LoraConfig
from minipersona.errors import UserError
from minipersona.model.adapter_files import choose_base, load_adapter, save_adapter
from minipersona.model.load import load_model
from minipersona.model.lora import apply_lora

OTHER = "f" * 40
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))


@pytest.fixture
def adapter(hf_model: Callable[..., Path], tmp_path: Path) -> Path:
    save_adapter(apply_lora(load_model(str(hf_model())), LORA), tmp_path / "adapter")
    return tmp_path / "adapter"


def records(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "recorded, name, revision, chosen, said",
    [
        ((None, None), "tiny", None, ("tiny", None), ""),
        (("tiny", None), None, None, ("tiny", None), ""),
        (("tiny", None), "tiny", None, ("tiny", None), ""),
        (("a/b", COMMIT), "a/b", None, ("a/b", COMMIT), ""),
        (("a/b", COMMIT), "a/b", COMMIT, ("a/b", COMMIT), ""),
        (("a/b", None), "a/b", OTHER, ("a/b", OTHER), ""),
        (("a/b", "main"), "a/b", OTHER, ("a/b", OTHER), f"was made for a/b at main, and is attached to {OTHER}"),
        (("a/b", COMMIT), "tiny", None, ("tiny", None), "was made for a/b, and is attached to tiny"),
        (("a/b", COMMIT), "a/c", OTHER, ("a/c", OTHER), "was made for a/b, and is attached to a/c"),
    ],
)
def test_the_base_is_the_one_asked_for_or_the_one_recorded(
    adapter: Path,
    recorded: tuple[str | None, str | None],
    name: str | None,
    revision: str | None,
    chosen: tuple[str, str | None],
    said: str,
) -> None:
    records(adapter, base_model_name_or_path=recorded[0], revision=recorded[1])
    lines: list[str] = []
    assert choose_base(adapter, name, revision, lines.append) == chosen
    assert "\n".join(lines) == (f"{adapter}: {said}" if said else "")


def test_directories_are_compared_as_resolved_paths(
    adapter: Path, hf_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = hf_model()
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(base.parent)
    lines: list[str] = []
    for name in (str(tmp_path / "link"), base.name, f"./{base.name}/", f"{base}/../{base.name}"):
        assert choose_base(adapter, name, None, lines.append) == (name, None)
    assert lines == []
    choose_base(adapter, str(tmp_path), None, lines.append)  # the control: another directory
    assert len(lines) == 1


def test_another_commit_of_the_base_is_refused(adapter: Path, hf_model: Callable[..., Path]) -> None:
    records(adapter, base_model_name_or_path="a/b", revision=COMMIT)
    with pytest.raises(UserError, match=f"made for a/b at {COMMIT}, and this is {OTHER}"):
        choose_base(adapter, None, OTHER, print)
    model = load_model(str(hf_model()))
    model.source |= {"name": "a/b", "revision": OTHER}
    with pytest.raises(UserError, match=COMMIT):
        load_adapter(model, adapter)
    assert model.lora is None
    for source in ({"revision": COMMIT}, {"revision": None}, {"name": "a/c", "revision": OTHER}):  # the controls
        model.source |= source
        load_adapter(model, adapter)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "home") as hub:
        yield hub


def test_an_adapter_of_the_hub_brings_its_base_at_its_commit(
    hub: LoopbackHub, adapter: Path, hf_model: Callable[..., Path]
) -> None:
    def content(directory: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    records(adapter, base_model_name_or_path="some/base", revision=COMMIT)
    hub.repositories["models/some/base"] = Repository(content(hf_model()))
    hub.repositories["models/some/adapter"] = Repository({**content(adapter), "optimizer.bin": b"0" * 9})
    code = """
    from minipersona.model.adapter_files import choose_base, load_adapter
    from minipersona.model.load import load_model
    name, revision = choose_base("some/adapter", None, None, print)
    model = load_model(name, revision=revision)
    load_adapter(model, "some/adapter")
    result = [model.source, len(model.lora.target_modules)]
    """
    source, targets = hub.run(code)
    assert (source["name"], source["revision"], targets) == ("some/base", COMMIT, 1)
    assert source["adapter"].startswith("some/adapter (sha256 ")
    assert "optimizer.bin" not in hub.served

    shutil.rmtree(hub.home)
    del hub.repositories["models/some/base"]
    error = hub.run(code)["error"]
    assert "its base model is not available (some/base at " in error and "give it with --model" in error
    shutil.rmtree(hub.home)
    del hub.repositories["models/some/adapter"]
    assert "some/adapter: not on the Hub" in hub.run(code)["error"]
