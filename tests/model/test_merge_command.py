"""The merge command: transformers loads what it writes, and gets the merged model's logits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minipersona.chat import load_tokenizer
from minipersona.config import LoraConfig
from minipersona.model.__main__ import main
from minipersona.model.adapter_files import load_adapter, save_adapter
from minipersona.model.generation import Request, generate
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora, merge_adapter, merge_and_compare

ROOT = Path(__file__).parents[2]
IDS = torch.randint(0, 160, (2, 17), generator=torch.Generator().manual_seed(3))
LORA = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
IM_END, ENDOFTEXT = 2036, 2034  # of the tiny model
BESIDE = ("tokenizer.json", "tokenizer_config.json")


def their_logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def adapter(hf_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """An adapter directory with random B for the random model of `hf_model`."""

    def make(base: Path) -> Path:
        model = apply_lora(load_model(str(base)), LORA)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.lora_B.normal_(0, 0.1, generator=generator)
        save_adapter(model, tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_gets_the_merged_logits(
    hf_model: Callable[..., Path], adapter: Callable[..., Path], tmp_path: Path, tied: bool, shards: int
) -> None:
    base, out = hf_model(tied), tmp_path / "merged"
    ours = load_model(str(base))
    load_adapter(ours, adapter(base))
    ours = merge_adapter(ours)
    size = sum(p.numel() * 4 for p in ours.parameters())
    gigabytes = 5.0 if shards == 1 else size / 2.5e9
    options = ["--adapter", str(tmp_path / "adapter"), "--dtype", "float32", "--shard-gb", str(gigabytes)]
    assert main(["merge", "--model", str(base), "--out", str(out), *options]) == 0
    assert len(list(out.glob("*.safetensors"))) == shards
    assert (out / "model.safetensors.index.json").exists() == (shards > 1)
    assert (their_logits(out) - ours.logits(IDS)).abs().max() < 1e-4
    assert torch.equal(load_model(str(out)).logits(IDS), ours.logits(IDS))
    # The control: the base, without the adapter, is another function.
    assert (their_logits(base) - ours.logits(IDS)).abs().max() > 1e-2


def test_bfloat16_rounds_once_and_the_adapter_names_its_base(
    hf_model: Callable[..., Path], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base, out = hf_model(), tmp_path / "merged"
    out.mkdir()  # an empty directory will do
    assert main(["merge", "--adapter", str(adapter(base)), "--out", str(out)]) == 0
    half = load_model(str(base), dtype=torch.bfloat16)
    load_adapter(half, tmp_path / "adapter")
    expected = dict(merge_adapter(half).named_parameters())
    stored = load_model(str(out), dtype=torch.bfloat16)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.named_parameters())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def tiny_updates(base: Path, directory: Path, size: float) -> None:
    """An adapter whose updates are about `size`, where weights are about 0.1."""
    model = apply_lora(load_model(str(base)), LORA)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, size, generator=generator)
    save_adapter(model, directory)


def test_what_rounding_takes_from_an_adapter_is_said(
    hf_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The next bf16 number after a weight of 0.1 is 5e-4 away: a smaller update rounds to nothing.
    base = hf_model()
    for size, least, most in ((5e-5, 0.5, 1.5), (0.3, 0.0, 0.05)):
        tiny_updates(base, tmp_path / f"{size}", size)
        half = load_model(str(base), dtype=torch.bfloat16)
        load_adapter(half, tmp_path / f"{size}")
        share = merge_and_compare(half, IDS[:1])
        assert least < share < most, share
        assert half.compute_dtype == torch.bfloat16 and not adapters(half)
        assert main(["merge", "--adapter", str(tmp_path / f"{size}"), "--out", str(tmp_path / f"merged-{size}")]) == 0
        said = next(line for line in capsys.readouterr().err.splitlines() if "rounding to bfloat16" in line)
        assert ("--dtype float32 keeps it" in said) == (size < 0.1)
        found = re.search(r"by (\d+)%", said)
        assert found is not None and round(100 * least) <= int(found[1]) <= 100 * most

    # fp32 keeps the small adapter's effect, as it says.
    whole = load_model(str(base), dtype=torch.float32)
    plain = whole.logits(IDS)
    load_adapter(whole, tmp_path / "5e-05")
    unmerged = whole.logits(IDS)
    command = ["merge", "--adapter", str(tmp_path / "5e-05"), "--out", str(tmp_path / "exact"), "--dtype", "float32"]
    assert main(command) == 0
    assert "rounding to" not in capsys.readouterr().err
    merged = load_model(str(tmp_path / "exact")).logits(IDS)
    assert (merged - unmerged).norm() < 0.01 * (unmerged - plain).norm()


def test_an_adapter_without_an_effect_loses_none(hf_model: Callable[..., Path]) -> None:
    assert merge_and_compare(apply_lora(load_model(str(hf_model()), dtype=torch.bfloat16), LORA), IDS[:1]) == 0.0


def test_the_tokenizer_and_the_generation_settings_come_along(tmp_path: Path) -> None:
    model = apply_lora(load_model("tiny"), LORA)
    save_adapter(model, tmp_path / "adapter")
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", *BESIDE}
    tiny = ROOT / "data" / "tiny"
    for name in (*BESIDE, "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize(
    "config, generation",
    [
        ({}, None),
        ({"eos_token_id": ENDOFTEXT}, None),
        ({"eos_token_id": [ENDOFTEXT, 5]}, {"eos_token_id": ENDOFTEXT, "temperature": 0.5, "top_p": None}),
        ({"eos_token_id": IM_END}, {"do_sample": True}),
    ],
    ids=["nothing", "config.json", "both", "generation_config.json without ids"],
)
def test_transformers_stops_where_the_base_does(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None
) -> None:
    """A base whose files say nothing of the chat turn's end, or only the end of a text: the merged model says both."""
    from transformers import AutoModelForCausalLM

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(ROOT / "data" / "tiny", base)
    (base / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **config}))
    (base / "generation_config.json").unlink()
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    model = apply_lora(load_model(str(base)), LORA)
    save_adapter(model, tmp_path / "adapter")
    options = ["--model", str(base), "--adapter", str(tmp_path / "adapter"), "--dtype", "float32"]
    assert main(["merge", *options, "--out", str(out)]) == 0

    prompt = load_tokenizer("tiny").encode_prompt([{"role": "user", "content": "What is your favourite season?"}]).ids
    said = generate(model, [Request(prompt, 120)], stop=(IM_END, ENDOFTEXT))[0]
    assert said.stopped and 0 < len(said.ids) < 100

    def new_tokens() -> list[int]:
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.from_numpy(prompt)[None].long()
        more = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=False, pad_token_id=0
        )
        return more[0, len(prompt) :].tolist()

    assert new_tokens() == [*said.ids.tolist(), IM_END]
    written = json.loads((out / "generation_config.json").read_text())
    stated = (generation or {}).get("eos_token_id", []), config.get("eos_token_id", [])
    kept = [i for ids in stated for i in (ids if isinstance(ids, list) else [ids])]
    assert written.pop("eos_token_id") == list(dict.fromkeys([*kept, IM_END]))
    others = {key: value for key, value in (generation or {}).items() if key != "eos_token_id" and value is not None}
    assert written == {"do_sample": False, **others}
    assert json.loads((out / "config.json").read_text()).get("eos_token_id") == config.get("eos_token_id")
    # The control: with the ids that the base's config.json states it goes on, unless that states the turn's end.
    (out / "generation_config.json").unlink()
    assert (len(new_tokens()) == 120) == (config.get("eos_token_id") != IM_END)


def test_refusals_are_one_line(
    hf_model: Callable[..., Path],
    adapter: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = adapter(hf_model())
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    unnamed = tmp_path / "unnamed"
    unnamed.mkdir()
    (unnamed / "adapter_config.json").write_text(json.dumps({"r": 1}))
    new = ["--out", str(tmp_path / "new")]
    for options, words in {
        ("merge", "--adapter", str(good), "--out", str(full)): "exists already; name a new directory",
        ("merge", "--adapter", str(good), "--out", str(full / "kept.txt")): "exists already",
        ("merge", "--adapter", str(full), *new): "no adapter_config.json; name a directory that holds a PEFT adapter",
        ("merge", "--adapter", str(hf_model()), *new): "it holds a whole model, name it with --model",
        ("merge", "--adapter", str(unnamed), *new): "give it with --model",
        ("merge", "--adapter", str(good), "--model", "tiny", *new): "was the adapter made for this model",
        ("merge", "--adapter", str(good), "--model", "no-such", *new): "no such directory",
        ("merge", "--adapter", str(good), "--shard-gb", "0", *new): "'0' is not a positive number",
        ("merge", "--adapter", str(good), "--shard-gb", "nan", *new): "'nan' is not a positive number",
        ("merge", "--adapter", str(good), "--dtype", "float16", *new): "invalid choice",
        ("merge", *new): "--adapter",
        ("split",): "invalid choice",
    }.items():
        assert main(list(options)) == 2, options
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error, error
    assert not (tmp_path / "new").exists()
    assert [path.name for path in full.iterdir()] == ["kept.txt"]


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from minipersona.model.__main__ import main\n"
        "assert main([]) == 0 and 'torch' not in sys.modules\n"
        "main(['merge', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("example:") == 2 and "--shard-gb" in done.stdout
