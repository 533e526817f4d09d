"""What a LoRA adapter is, in the terms of PEFT's adapter_config.json: the layers it adapts, their ranks and scales.

Names are matched to layers as peft 0.21 does it (`check_target_module_exists` and `get_pattern_key`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from minipersona.config import LoraConfig
from minipersona.errors import UserError
from minipersona.files import read_json

ALL_LINEAR = "all-linear"
MOST_RANK = 65_536  # beyond any matrix of these models
MOST_ALPHA = 1e6


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter. The fields are PEFT's.

    target_modules       a sequence of full names or endings of names, a regular expression for full names, or
                         "all-linear": every linear layer but the head
    exclude_modules      the same two forms, for layers that are left out
    layers_to_transform  the blocks in which endings of names count; empty: all of them
    layers_pattern       regular expressions for what precedes a block's number; empty: anything
    rank_pattern         regular expression for the end of a name -> rank, in place of `r`; the first that matches
    alpha_pattern        the same for `lora_alpha`
    use_rslora           the scale is alpha / sqrt(r) in place of alpha / r (Kalajdzievski 2023)
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    lora_dropout: float = 0.0
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    @staticmethod
    def of(config: LoraConfig, blocks: int) -> AdapterConfig:
        """The adapter that a run's settings ask for, in a model of so many blocks. UserError where it lacks one."""
        chosen = tuple(config.adapted_blocks(blocks)) if config.blocks else ()
        return AdapterConfig(
            config.rank, config.alpha, tuple(config.targets), config.dropout, layers_to_transform=chosen
        )

    @property
    def all_linear(self) -> bool:
        """Whether the targets are all linear layers but the head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def matches(self, name: str) -> bool:
        """Whether the module of this name is adapted. With "all-linear" it must be known to be a linear layer."""
        if _names(self.exclude_modules, name):
            return False
        if self.all_linear:
            return True
        if not _names(self.target_modules, name):
            return False
        # PEFT restricts endings of names to blocks, and neither full names nor regular expressions.
        unrestricted = not self.layers_to_transform or isinstance(self.target_modules, str)
        return unrestricted or name in self.target_modules or self._block(name) in self.layers_to_transform

    def _block(self, name: str) -> int | None:
        """The number of the block that a layer lies in."""
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (re.match(rf"{pattern}\.(?P<idx>\d+)\.", name) for pattern in patterns)
        return next((int(match["idx"]) for match in found if match), None)

    def rank(self, name: str) -> int:
        """The rank of a layer's adapter."""
        return next((rank for key, rank in self.rank_pattern.items() if _ends(key, name)), self.r)

    def scale(self, name: str) -> float:
        """The factor of B A in a layer's adapter: alpha / r, or alpha / sqrt(r)."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _ends(key, name)), self.lora_alpha)
        return alpha / (math.sqrt(self.rank(name)) if self.use_rslora else self.rank(name))

    def to_json(self) -> dict[str, Any]:
        """PEFT's fields for it; those that say nothing are left out."""
        written = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
        return {key: value for key, value in asdict(self).items() if key in written or value}


def _names(modules: tuple[str, ...] | str, name: str) -> bool:
    """Whether a regular expression, or a sequence of names and endings of names, covers this name."""
    if isinstance(modules, str):
        return bool(modules) and re.fullmatch(modules, name) is not None
    return name in modules or any(name.endswith(f".{ending}") for ending in modules)


def _ends(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


# ---------------------------------------------------------------- reading

# PEFT's options, each with the values at which it changes nothing here. An option that is not listed may be at
# nothing or at false only: it may change the arithmetic in a way that this code has never heard of.
_ANY = object()
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # "pissa", "olora" and the like alter the base's own weights, which the adapter is then relative to.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(AdapterConfig.__dataclass_fields__, (_ANY,)),  # read below
    **dict.fromkeys(("task_type", "inference_mode", "base_model_name_or_path", "revision"), (_ANY,)),  # notes
    **dict.fromkeys(("peft_version", "auto_mapping", "eva_config", "runtime_config"), (_ANY,)),
    # Without Megatron and QALoRA, which are refused, these name nothing.
    **dict.fromkeys(("megatron_core", "qalora_group_size"), (_ANY,)),
}


def read_adapter_config(path: Path) -> AdapterConfig:
    """A PEFT adapter_config.json. What this implementation lacks is refused, and nothing is guessed."""
    raw = read_json(path)
    if not isinstance(raw, dict) or "peft_type" not in raw:
        raise UserError(f"{path}: not a PEFT adapter config; name the adapter's directory")
    for key, value in raw.items():
        allowed = _PLAIN.get(key, (None, False, [], {}))
        if _ANY not in allowed and value not in allowed:
            raise UserError(
                f"{path}: {key[:80]} = {brief(value)} is not supported; train a plain LoRA adapter, or merge it"
            )
    read = _Reader(path, raw)
    config = AdapterConfig(
        r=read.number("r", raw.get("r"), _is_rank, f"a whole number from 1 to {MOST_RANK:,}"),
        lora_alpha=float(read.number("lora_alpha", raw.get("lora_alpha"), _is_alpha, "a positive number")),
        target_modules=read.modules("target_modules"),
        lora_dropout=float(read.number("lora_dropout", raw.get("lora_dropout", 0.0), _is_share, "in [0, 1)")),
        exclude_modules=read.modules("exclude_modules"),
        layers_to_transform=read.blocks(),
        layers_pattern=read.patterns("layers_pattern"),
        rank_pattern=read.pattern("rank_pattern", _is_rank, f"a whole number from 1 to {MOST_RANK:,}"),
        alpha_pattern=read.pattern("alpha_pattern", _is_alpha, "a positive number"),
        use_rslora=read.flag("use_rslora"),
    )
    if not config.target_modules:
        raise UserError(f"{path}: target_modules = {brief(raw.get('target_modules'))} names no layer; name some")
    if isinstance(config.target_modules, str) and (config.layers_to_transform or config.layers_pattern):
        raise UserError(
            f"{path}: target_modules = {brief(config.target_modules)} and layers_to_transform exclude each other, as "
            "in PEFT; name the blocks in the regular expression"
        )
    if config.layers_pattern and not config.layers_to_transform:
        raise UserError(f"{path}: layers_pattern needs layers_to_transform, as in PEFT; remove it or name the blocks")
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < MOST_ALPHA


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


@dataclass(frozen=True)
class _Reader:
    """The values of adapter_config.json, checked; an error names the file, the key and the value at fault."""

    path: Path
    raw: dict[str, Any]

    def number(self, key: str, value: Any, valid: Callable[[Any], bool], wanted: str) -> Any:
        if not valid(value):
            raise UserError(f"{self.path}: {key} = {brief(value)} must be {wanted}; is the file damaged?")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.path}: {key} = {brief(value)} must be true or false; is the file damaged?")
        return bool(value)

    def modules(self, key: str) -> tuple[str, ...] | str:
        """A regular expression, or a list of names."""
        value = self.raw.get(key)
        if isinstance(value, str):
            return self._compiled(key, value) if value.lower() != ALL_LINEAR else value
        return self._strings(key, value)

    def patterns(self, key: str) -> tuple[str, ...]:
        """One regular expression, or a list of them."""
        value = self.raw.get(key)
        texts = (value,) if isinstance(value, str) and value else self._strings(key, value or None)
        for text in texts:
            self._compiled(key, rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", text)
        return texts

    def pattern(self, key: str, valid: Callable[[Any], bool], wanted: str) -> dict[str, Any]:
        """A mapping from regular expressions to numbers."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {key} = {brief(value)} must map names to numbers; is the file damaged?")
        for text, number in value.items():
            self._compiled(key, rf"(.*\.)?({text})$", text)
            self.number(f"{key}[{text[:200]!r}]", number, valid, wanted)
        return value

    def blocks(self) -> tuple[int, ...]:
        value = self.raw.get("layers_to_transform")
        numbers = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        for number in numbers:
            if type(number) is not int:
                raise UserError(f"{self.path}: layers_to_transform holds {brief(number)}; blocks are whole numbers")
        return numbers

    def _strings(self, key: str, value: Any) -> tuple[str, ...]:
        if value is not None and not isinstance(value, list):
            raise UserError(f"{self.path}: {key} = {brief(value)} must be a list of names or a regular expression")
        for entry in value or ():
            if not isinstance(entry, str) or not entry:
                raise UserError(f"{self.path}: {key} holds {brief(entry)}, which is not a name; remove it")
        return tuple(value or ())

    def _compiled(self, key: str, whole: str, text: str | None = None) -> str:
        """`whole`, if it is a regular expression; `text` is the part of it that the file holds."""
        try:
            with warnings.catch_warnings(action="ignore"):  # of what a later Python will read differently
                re.compile(whole)
        except (re.error, OverflowError, RecursionError) as error:
            shown = (whole if text is None else text)[:200]
            raise UserError(f"{self.path}: {key}: {shown!r} is not a regular expression ({error})") from None
        return whole
