"""What is minimised. Each objective's equation, gradient and passes through the network are in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from minipersona.chat import Document
from minipersona.config import RunConfig
from minipersona.files import read_json, write_json
from minipersona.model.network import Qwen2
from minipersona.objective.contexts import Contexts
from minipersona.objective.cross_entropy import CrossEntropy
from minipersona.objective.feature_anchor import FeatureAnchor
from minipersona.objective.feature_and_kl import FeatureAndKL
from minipersona.objective.gram_anchor import GramAnchor
from minipersona.objective.head import Objective
from minipersona.objective.kl_on_prompts import KLOnPrompts
from minipersona.objective.kl_to_base import KLToBase, frozen_copy
from minipersona.objective.noise_check import check_first_step
from minipersona.objective.r3f import R3F

OBJECTIVE_CHECK = "objective_check.json"


def check_objective(model: Qwen2, documents: Sequence[Document], config: RunConfig, directory: Path) -> None:
    """What R3F has to know of the base before training: write its `NoiseCheck` into `directory`, once a run.

    One rank calls it, before `make_objective` on every rank.
    """
    file = directory / OBJECTIVE_CHECK
    if config.objective.kind == "r3f" and not file.is_file():
        write_json(file, asdict(check_first_step(model, documents, config)))


def make_objective(
    model: Qwen2, config: RunConfig, directory: Path, compiled: bool, contexts: Contexts | None = None
) -> Objective:
    """The objective of a config. `model` is still the base: no parameter of it has been trained.

    R3F's epsilon and the rows' mean length are those of the check in `directory`, so a run that continues keeps them.
    An anchored objective needs `contexts`.
    """
    section = config.objective
    full = config.training.method == "full"  # so that what is needed of the base has to be copied
    if section.anchored:
        assert contexts is not None, "an anchored objective has contexts"
        head = model.lm_head.weight.detach().clone() if full and section.anchors_predictions else None
        if section.kind == "kl_on_prompts":
            return KLOnPrompts(section.weight, contexts, head)
        if section.kind == "feature_and_kl":
            return FeatureAndKL(section.weight, contexts, head, section.kl_factor)
        return (FeatureAnchor if section.kind == "feature_anchor" else GramAnchor)(section.weight, contexts)
    if section.kind == "kl_to_base":
        return KLToBase(section.weight, section.direction, frozen_copy(model, compiled) if full else None)
    if section.kind == "r3f":
        check = read_json(directory / OBJECTIVE_CHECK)
        weight = section.weight * (check["supervised_per_row"] if section.per_row else 1)
        return R3F(weight, section.noise, check["epsilon"])
    return CrossEntropy()
