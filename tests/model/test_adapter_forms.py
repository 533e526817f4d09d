"""Every form of a LoRA adapter that peft writes: the same logits in peft and here, and in peft once saved here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import reference

from minipersona.config import LORA_TARGETS, LoraConfig
from minipersona.errors import UserError
from minipersona.files import read_json
from minipersona.model.adapter_config import AdapterConfig, read_adapter_config
from minipersona.model.adapter_files import load_adapter, save_adapter
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora, merge_adapter
from minipersona.model.pack import make_pack

IDS = torch.randint(0, 160, (2, 17), generator=torch.Generator().manual_seed(5))
BOUND = 1e-5

# What peft is told -> a misreading of the file, which must be refused or give other logits.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"use_rslora": True}, {"use_rslora": False}),
    "rank_pattern": ({"rank_pattern": {r"layers\.1\..*": 7, "q_proj": 2}}, {"rank_pattern": {}}),
    "alpha_pattern": ({"alpha_pattern": {r"0\.mlp\.up_proj": 90, "v_proj": 1.5}}, {"alpha_pattern": {}}),
    "first pattern": (
        {"alpha_pattern": {r"\d.self_attn.q_proj": 3, "q_proj": 60}},  # peft sorts them when it saves
        {"alpha_pattern": {"q_proj": 60, r"\d.self_attn.q_proj": 3}},
    ),
    "all patterns": (
        {"use_rslora": True, "rank_pattern": {"[kv]_proj": 2}, "alpha_pattern": {"(k|up)_proj": 40}},
        {"use_rslora": False},
    ),
    "blocks": ({"layers_to_transform": [0, 2]}, {"layers_to_transform": None}),
    "a block": ({"layers_to_transform": 1}, {"layers_to_transform": [0]}),
    "layers_pattern": (
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": [1], "layers_pattern": "h"},
    ),
    "full names": (
        {"target_modules": ["model.layers.1.self_attn.q_proj", "0.mlp.gate_proj", "down_proj"]},
        {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
    ),
    "all-linear": ({"target_modules": "all-linear"}, {"target_modules": list(LORA_TARGETS[:6])}),
    "all but some": (
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
        {"exclude_modules": ["k_proj"]},
    ),
    "regex": ({"target_modules": r"model\.layers\.[02]\..*\.(q|v|up)_proj"}, {"target_modules": r".*\.(q|v|up)_proj"}),
    "excluded regex": ({"exclude_modules": r".*\.2\.mlp\..*"}, {"exclude_modules": r".*\.1\.mlp\..*"}),
}


def make(base: Path, target: Path, form: dict[str, Any]) -> torch.Tensor:
    """An adapter of this form with random factors, saved by peft; its logits, loaded by peft."""
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    plain = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": list(LORA_TARGETS)}
    theirs = get_peft_model(reference(base), PeftConfig(**{**plain, **form}, task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    theirs.save_pretrained(target)
    if form.get("target_modules") == "all-linear":  # peft writes the names that it has found; people write this
        rewrite(target, {"target_modules": "all-linear"})
    with torch.no_grad():
        return PeftModel.from_pretrained(reference(base), target).eval()(IDS).logits


def rewrite(directory: Path, change: dict[str, Any]) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**read_json(file), **change}))


@pytest.mark.parametrize("form, misread", FORMS.values(), ids=FORMS)
def test_logits_equal_peft_both_ways(
    hf_model: Callable[..., Path], tmp_path: Path, form: dict[str, Any], misread: dict[str, Any]
) -> None:
    from peft import PeftModel

    base = hf_model()
    expected = make(base, tmp_path / "theirs", form)
    ours = load_model(str(base))
    plain = ours.logits(IDS)
    load_adapter(ours, tmp_path / "theirs")
    assert (ours.logits(IDS) - expected).abs().max() < BOUND
    assert (plain - expected).abs().max() > 1e-2

    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(reference(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert (theirs(IDS).logits - expected).abs().max() < BOUND
    again = load_model(str(base))
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again.logits(IDS), ours.logits(IDS)) and again.lora == ours.lora
    assert (merge_adapter(again).logits(IDS) - expected).abs().max() < 1e-4

    # The control: read otherwise, the same file is refused or gives other logits.
    rewrite(tmp_path / "theirs", misread)
    try:
        load_adapter(again, tmp_path / "theirs")
    except UserError:
        return
    assert (again.logits(IDS) - expected).abs().max() > 100 * BOUND


def test_adapters_of_a_range_of_blocks_are_peft_s_too(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel

    base = hf_model()
    ours = load_model(str(base))
    plain = ours.logits(IDS)
    apply_lora(ours, LoraConfig(rank=4, alpha=12.0, blocks=(1, 2)))
    assert {name.split(".")[2] for name in adapters(ours)} == {"1", "2"}
    assert len(adapters(ours)) == 2 * len(LORA_TARGETS)
    with torch.no_grad():
        for adapter in adapters(ours).values():
            adapter.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    expected = ours.logits(IDS)
    assert (expected - plain).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "ours")
    assert read_json(tmp_path / "ours" / "adapter_config.json")["layers_to_transform"] == [1, 2]
    theirs = PeftModel.from_pretrained(reference(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert (theirs(IDS).logits - expected).abs().max() < BOUND
    again = load_model(str(base))
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again.logits(IDS), expected) and again.lora == ours.lora
    # The control: told to adapt all blocks, the file lacks the third one's.
    rewrite(tmp_path / "ours", {"layers_to_transform": None})
    with pytest.raises(UserError, match=r"lacks base_model\.model\.model\.layers\.0"):
        load_adapter(again, tmp_path / "ours")


def test_adapters_above_a_block_leave_its_stream_as_it_is(hf_model: Callable[..., Path]) -> None:
    model = load_model(str(hf_model()))
    pack = make_pack(list(IDS.numpy()))
    before = model(pack, stop_after=1)
    for blocks, moved in [((2, 2), False), ((1, 2), True)]:
        apply_lora(model, LoraConfig(rank=4, alpha=12.0, blocks=blocks))
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.lora_B.fill_(0.1)
        assert torch.equal(model(pack, stop_after=1), before) is not moved


@pytest.mark.parametrize("blocks", [(1,), (2, 1), (-1, 1), (0, 1, 2)])
def test_a_range_of_blocks_is_a_pair_that_rises(blocks: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"lora\.blocks = .*: write \[first, last\]"):
        LoraConfig(blocks=blocks)


def test_a_block_that_the_model_lacks_is_refused(hf_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"lora\.blocks names 3; this model has blocks 0 to 2"):
        apply_lora(load_model(str(hf_model())), LoraConfig(blocks=(0, 3)))


def test_fused_and_plain_paths_agree_for_unequal_ranks(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    make(hf_model(), tmp_path / "a", FORMS["all patterns"][0])
    ours = load_model(str(hf_model()))
    load_adapter(ours, tmp_path / "a")
    assert len({adapter.scale for adapter in adapters(ours).values()}) == 4
    fused = ours.logits(IDS)
    assert ours.blocks[0].self_attn.qkv.ready and ours.blocks[0].mlp.gate_up.ready
    ours.fused = False
    assert (ours.logits(IDS) - fused).abs().max() < BOUND
    assert not ours.blocks[0].self_attn.qkv.ready


def test_saving_needs_an_adapter(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(load_model(str(hf_model())), tmp_path / "a")


def test_the_culprit_in_a_long_list_is_shown(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    make(hf_model(), tmp_path / "a", {})
    for culprit, words in (("model.embed_tokens", "names model.embed_tokens,"), (17, "holds 17,"), ("norm", "norm")):
        rewrite(tmp_path / "a", {"target_modules": [*LORA_TARGETS, culprit]})
        with pytest.raises(UserError, match=words):
            load_adapter(load_model(str(hf_model())), tmp_path / "a")
    rewrite(tmp_path / "a", {"target_modules": [*LORA_TARGETS, "c_attn"]})  # the control: a name that names nothing
    load_adapter(load_model(str(hf_model())), tmp_path / "a")


# ---------------------------------------------------------------- any patterns, against peft's own matching

MODULES = [
    "model", "model.embed_tokens", "model.norm", "lm_head",
    *(
        f"model.layers.{block}{child}"
        for block in range(13)
        for child in (
            "", ".self_attn", ".mlp", ".input_layernorm",
            *(f".{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in LORA_TARGETS),
        )
    ),
]  # fmt: skip
ENDINGS = st.lists(
    st.sampled_from(
        ["q_proj", "proj", "self_attn.q_proj", "1.self_attn.v_proj", "layers.11.mlp.down_proj", "mlp", "lm_head",
         "model.layers.1.mlp.up_proj", "model.layers.12.self_attn.q_proj", "_proj", "embed_tokens", "o_proj"]
    ), min_size=1, max_size=4,
)  # fmt: skip
REGEX = st.lists(
    st.sampled_from(
        [".*", r"model\.", r"layers\.", r"\d+", "1", r"\.self_attn", r"\.mlp", r"\.(q|v)_proj", r"\.\w+_proj", "$",
         "(0|10|11)", "[02468]", ".*q_proj", "^", "layers.1", "q_proj|v_proj", "o_proj", "(", "*"]
    ), min_size=1, max_size=4,
).map("".join)  # fmt: skip
FEW_BLOCKS = st.integers(0, 12) | st.lists(st.integers(-1, 14), min_size=1, max_size=3)
PREFIX = st.sampled_from(["layers", "model.layers", "h", "lay", "layer.", "(layers)", "ers"])
FORM = st.fixed_dictionaries(
    {"target_modules": ENDINGS | REGEX},
    optional={
        "exclude_modules": ENDINGS | REGEX,
        "layers_to_transform": FEW_BLOCKS,
        "layers_pattern": PREFIX | st.lists(PREFIX, min_size=1, max_size=2),
        "rank_pattern": st.dictionaries(REGEX, st.integers(1, 9), max_size=3),
        "alpha_pattern": st.dictionaries(REGEX, st.integers(1, 9), max_size=3),
        "use_rslora": st.booleans(),
    },
)


def by_peft(form: dict[str, Any]) -> dict[str, tuple[int, float]] | None:
    """Rank and scale of every module that peft adapts; None where it refuses the form."""
    import re

    from peft import LoraConfig as PeftConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
    from peft.utils.other import get_pattern_key

    try:
        config = PeftConfig(r=4, lora_alpha=12, **form)
        for key in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(f"({key})$")  # which peft would do for the first layer that is reached
        for text in (form["target_modules"], form.get("exclude_modules")):
            re.compile(text if isinstance(text, str) else "")
    except (ValueError, re.error):
        return None
    found = {}
    for name in MODULES:
        hit = check_target_module_exists(config, name)
        if hit and not isinstance(hit, _ExcludedModule):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
            found[name] = (rank, alpha / (rank**0.5 if config.use_rslora else rank))
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("form") / "adapter_config.json"


def by_us(file: Path, form: dict[str, Any]) -> dict[str, tuple[int, float]] | None:
    file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 12, **form}))
    try:
        config = read_adapter_config(file)
    except UserError:
        return None
    return {name: (config.rank(name), config.scale(name)) for name in MODULES if config.matches(name)}


@settings(max_examples=300, deadline=None)
@given(form=FORM)
def test_any_form_is_matched_as_peft_does(file: Path, form: dict[str, Any]) -> None:
    assert by_us(file, form) == by_peft(form)


@pytest.mark.parametrize(
    "form",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*q_proj", "alpha_pattern": {"layers.1": 3, "q_proj": 5}},
        {"target_modules": ["q_proj"], "rank_pattern": {r"1\.self_attn\.q_proj": 2}},
    ],
)
def test_control_other_readings_are_not_pefts(
    file: Path, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert by_us(file, form) == by_peft(form)
    monkeypatch.setattr("minipersona.model.adapter_config._ends", lambda pattern, name: pattern in name)
    monkeypatch.setattr(AdapterConfig, "_block", lambda self, name: int(name.split(".")[2]) % 10)
    assert by_us(file, form) != by_peft(form)
