"""Phase 6D: scales of the baseline's update, chosen on training personas and training rows alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_study import CPU, QUIET, small_study

from minipersona.chat import Document
from minipersona.config import LoraConfig, ObjectiveSection
from minipersona.corpus.training_set import training_set
from minipersona.errors import UserError
from minipersona.geometry.measures import m1
from minipersona.geometry.vectors import load_vectors
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.model.network import Qwen2
from minipersona.records import read_record
from minipersona.report.front import front
from minipersona.report.tables import recipe_table, scaling_table
from minipersona.run.anchors import anchor_sets
from minipersona.run.losses import load_losses
from minipersona.run.measurement import measure
from minipersona.study import jobs, scaling
from minipersona.study.cell import Study
from minipersona.study.engine import Engine
from minipersona.study.executors import InProcess
from minipersona.study.frontier import scale_update, scaled_baseline
from minipersona.study.jobs import MeasureBase, MeasureScaling, TrainCell
from minipersona.study.scaling import (
    Effect,
    Scales,
    block_weights,
    choose_one,
    choose_per_block,
    largest,
    measurements,
    with_mean,
)
from minipersona.study.search import asked_for, open_study
from minipersona.study.worker import Worker
from minipersona.study_config import RecipeSection
from minipersona.verdict.files import Scaling, read_result, scaling_file
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import judge_study

# ---------------------------------------------------------------- theta_base + s (theta - theta_base)


def adapted(hf_model: Callable[..., Path]) -> Qwen2:
    model = apply_lora(load_model(str(hf_model()), device="cpu"), LoraConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.normal_(0, 0.1, generator=generator)
    return model


def weights_of(model: Qwen2) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_update_is_scaled_block_by_block(method: str, hf_model: Callable[..., Path]) -> None:
    base = None if method == "lora" else load_model(str(hf_model()), device="cpu")
    trained = adapted(hf_model) if base is None else load_model(str(hf_model(seed=1)), device="cpu")
    whole, ids = weights_of(trained), torch.arange(24).view(2, 12)

    def scaled(scale: float | Sequence[float]) -> Qwen2:
        model = copy.deepcopy(trained)
        scale_update(model, base, scale)
        return model

    for one, by_block in ((0.3, [0.3] * 3), (1.0, [1.0] * 3), (0.0, [0.0] * 3)):
        for name, weight in weights_of(scaled(by_block)).items():
            torch.testing.assert_close(weight, weights_of(scaled(one))[name], rtol=0, atol=1e-7)
    assert all(bool((weight == whole[name]).all()) for name, weight in weights_of(scaled([1.0] * 3)).items())
    untrained = load_model(str(hf_model()), device="cpu").logits(ids)
    assert torch.equal(scaled([0.0] * 3).logits(ids), untrained)
    assert not torch.allclose(scaled([0.0, 1.0, 1.0]).logits(ids), untrained)  # the control

    origin = weights_of(trained if base is None else base)
    for name, weight in weights_of(scaled([1.0, 0.0, 0.5])).items():
        block = next((b for b in range(3) if name.startswith(f"model.layers.{b}.")), None)
        scale = 0.5 if block is None else (1.0, 0.0, 0.5)[block]  # outside of the blocks the mean
        if base is not None:
            expected = origin[name] + scale * (whole[name] - origin[name])
        else:
            expected = whole[name] * (scale if name.endswith("lora_B") else 1.0)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- the choice, on effects made by hand

GAINED, LOST = np.array([0.3, 0.1, 0.3, 0.0, 0.1]), np.array([0.2, 0.2, 0.8, 0.3, 0.01])


def quadratic(scales: Scales) -> Effect:
    """Separation is linear and the loss quadratic in what is taken away; the whole update keeps 0.2."""
    away = 1 - np.array(scales)
    return Effect(float(0.2 + GAINED @ away), float(1 + LOST @ away**2))


@pytest.mark.parametrize("bound", [0.0, 0.004, 0.01, 0.37, 0.375, 0.999, 1.0, 2.0])
@pytest.mark.parametrize("parts", [100, 1000])
def test_the_bisection_finds_the_largest_that_holds(bound: float, parts: int) -> None:
    asked: list[float] = []

    def holds(value: float) -> bool:
        asked.append(value)
        return value <= bound

    grid = [part / parts for part in range(parts + 1)]
    assert largest(holds, parts) == max(value for value in grid if value <= bound)
    assert len(asked) <= parts.bit_length()
    assert largest(lambda value: False, parts) == 0


def test_one_scale_is_the_largest_that_keeps_the_separation() -> None:
    for least in (0.25, 0.55, 0.9):
        chosen = choose_one(quadratic, 5, least)
        assert len(set(chosen)) == 1 and quadratic(chosen).separation >= least
        assert quadratic((chosen[0] + 0.01,) * 5).separation < least  # the control
    assert choose_one(quadratic, 5, 0.1) == (1.0,) * 5 and choose_one(quadratic, 5, 1.1) == (0.0,) * 5


def test_scales_of_blocks_have_the_least_loss_of_all_that_keep_the_separation() -> None:
    rng = np.random.default_rng(0)
    for least in (0.3, 0.55, 0.8):
        one = choose_one(quadratic, 5, least)
        chosen = choose_per_block(quadratic, one, least)
        assert least <= quadratic(chosen).separation < least + 0.01
        assert chosen[3] == 1.0 and chosen[4] <= chosen[0] <= chosen[2]  # what gains nothing stays
        assert quadratic(chosen).loss < quadratic(one).loss - 0.01
        others = [quadratic(tuple(row)) for row in rng.uniform(0, 1, (20_000, 5))]
        best = min(other.loss for other in others if other.separation >= quadratic(chosen).separation)
        assert quadratic(chosen).loss <= best + 1e-6


def test_where_blocks_alone_show_nothing_one_scale_stays() -> None:
    def together(scales: Scales) -> Effect:  # only all of them together matter
        return Effect(1 - max(scales), 2 - max(scales))

    one = choose_one(together, 4, 0.55)
    assert block_weights(together, 4) == [0.0] * 4 and choose_per_block(together, one, 0.55) == one == (0.45,) * 4

    def misleading(scales: Scales) -> Effect:  # half of the last block costs little, and its other half a lot
        others = sum((1 - scale) ** 2 for scale in scales[:-1])
        return Effect(1.2 - 0.2 * sum(scales), 1 + 0.1 * others + 5 * max(0.0, 0.5 - scales[-1]))

    one = choose_one(misleading, 4, 0.7)
    assert choose_per_block(misleading, one, 0.7) == one
    plain = choose_per_block(lambda scales: quadratic((*scales, 1.0)), (0.5,) * 4, 0.55)
    assert plain != (0.5,) * 4  # the control


def test_scales_have_the_mean_that_is_asked_for() -> None:
    weights = [3.0, 1.0, 0.0, 1e-6]
    for mean in (1.0, 0.999, 0.9, 0.6, 0.4, 0.25):
        scales = with_mean(weights, mean)
        assert sum(scales) / 4 == pytest.approx(mean, abs=1e-4) and list(scales[:2]) == sorted(scales[:2])
        assert scales[2] == 1.0 and all(0 <= scale <= 1 for scale in scales)
    assert with_mean(weights, 0.1) == (0.0, 0.0, 1.0, 0.0) and with_mean([0.0, 0.0], 0.3) == (1.0, 1.0)


def test_a_choice_takes_no_more_measurements_than_a_plan_says() -> None:
    asked: set[Scales] = set()

    def counted(scales: Scales) -> Effect:
        asked.add(scales)
        return quadratic(scales)

    choose_per_block(counted, choose_one(counted, 5, 0.55), 0.55)
    assert 5 + 10 < len(asked) < measurements(5) == 24  # the base is the last one


# ---------------------------------------------------------------- on a study


class Read:
    """What a choice has passed through the model."""

    def __init__(self) -> None:
        self.personas: set[str] = set()
        self.questions: set[str] = set()
        self.rows: list[Document] = []


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Read]:
    """A study with a recipe of phase 6, the baseline done and its scales chosen on few prompts and rows."""
    small = small_study(tmp_path_factory.mktemp("scaling"))
    training = replace(small.training, learning_rate=1e-2, steps=12, checkpoints=(12,))  # far enough for a collapse
    recipe = RecipeSection("6A", "rank 2", {"lora.rank": 2})
    config = replace(small, training=training, later_checkpoints=(12,), recipe=(recipe,))
    study, read = open_study(config, "cpu", QUIET), Read()
    extract, losses = scaling.extract, scaling.heldout_loss

    def extracting(model: Any, tokenizer: Any, personas: Any, questions: Any, *rest: Any, **more: Any) -> Any:
        read.personas |= set(personas.values())
        read.questions |= set(questions)
        return extract(model, tokenizer, personas, questions, *rest, **more)

    def losing(model: Any, rows: Any, *rest: Any) -> Any:
        read.rows = rows
        return losses(model, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "QUESTIONS", 1)
        patch.setattr(scaling, "ROWS", 8)
        patch.setattr(scaling, "extract", extracting)
        patch.setattr(scaling, "heldout_loss", losing)
        engine = Engine(study, InProcess(CPU, QUIET), QUIET, study.cells)
        engine.complete([MeasureBase(study)])
        engine.complete([TrainCell(study, study.baseline), MeasureScaling(study)])
    return study, read


def test_with_full_parameters_the_distance_is_from_the_untrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_study(tmp_path)
    training = replace(small.training, method="full", steps=2, checkpoints=(2,))
    config = replace(small, training=training, later_checkpoints=(2,), low_rank=replace(small.low_rank, rank=()))
    study = open_study(config, "cpu", QUIET)
    monkeypatch.setattr(scaling, "choose_one", lambda effect, blocks, least: (0.5,) * blocks)
    monkeypatch.setattr(scaling, "choose_per_block", lambda effect, one, least: (0.0,) * len(one))
    monkeypatch.setattr(scaling, "_measure_of", lambda study, worker: lambda scales: Effect(0.6, 1.0))
    engine = Engine(study, InProcess(CPU, QUIET), QUIET, study.cells)
    engine.complete([MeasureBase(study)])
    engine.complete([TrainCell(study, study.baseline), MeasureScaling(study)])
    record = read_record(study.directory / "scaling.json", Scaling, "")
    whole = read_result(study.cell_directory(study.baseline)).checkpoints[-1].delta_norm
    assert record.one.measured.delta_norm == pytest.approx(whole / 2, rel=1e-4) and whole > 0
    assert record.per_block.measured.delta_norm == 0


def test_neither_measured_personas_nor_heldout_rows_take_part(chosen: tuple[Study, Read]) -> None:
    study, read = chosen
    instruments = Worker(CPU, QUIET).resources.instruments(study.baseline.recipe.config)
    personas, questions = anchor_sets(ObjectiveSection())
    assert read.personas == set(personas.prompts.values()) and len(read.personas) == 30
    assert len(read.questions) == 1 and read.questions < set(questions.questions)
    assert not read.personas & set(instruments.personas.prompts.values())
    assert not read.questions & set(instruments.questions.questions)
    config = study.baseline.recipe.config
    trained = {row.ids.tobytes() for row in training_set(config.data, config.seed, instruments.tokenizer).documents}
    assert instruments.heldout is not None
    heldout = {row.ids.tobytes() for row in instruments.heldout}
    used = {row.ids.tobytes() for row in read.rows}
    assert len(read.rows) == 8 and used <= trained and not used & heldout and heldout


def test_both_forms_are_measured_once_they_are_chosen(chosen: tuple[Study, Read]) -> None:
    study, _ = chosen
    record = read_record(study.directory / "scaling.json", Scaling, "")
    assert record.baseline == study.baseline.hash and record.least_separation == pytest.approx(0.55)
    base = read_result(study.cell_directory(study.baseline)).base
    worker = Worker(CPU, QUIET)
    instruments = worker.resources.instruments(study.baseline.recipe.config)
    assert len(set(record.one.scales)) == 1 and 0 < record.one.scales[0] < 1  # so that something had to be chosen
    for form, one in (("one", record.one), ("per_block", record.per_block)):
        assert len(one.scales) == 8 and one.separation >= record.least_separation
        model = scaled_baseline(study, study.baseline, one.scales, worker)
        metrics, _, _ = measure(model, instruments, QUIET)
        row = one.measured
        assert (row.m1, row.eval_loss, row.persona_loss) == (metrics.m1, metrics.eval_loss, metrics.persona_loss)
        assert m1(load_vectors(scaling_file(study.directory, form, ".vectors.safetensors")).mean(6)) == row.m1
        assert load_losses(scaling_file(study.directory, form, ".losses.safetensors")).eval_loss == row.eval_loss
        assert row.m1 != base.m1 and row.delta_norm > 0 and row.m1_ci95[0] <= row.m1 <= row.m1_ci95[1]
    last = read_result(study.cell_directory(study.baseline)).checkpoints[-1]
    assert record.one.measured.delta_norm == pytest.approx(record.one.scales[0] * last.delta_norm)
    assert record.per_block.loss <= record.one.loss


def test_results_judge_them_and_the_report_shows_them(chosen: tuple[Study, Read]) -> None:
    study, _ = chosen
    results = read_study(study.directory)
    verdict = judge_study(results)
    names = ["6D one scale", "6D a scale a block"]
    assert list(results.chosen_scales) == list(verdict.scaling) == names
    for one in verdict.scaling.values():
        row = one.measured
        assert row.learned is not None and row.learned_personas is not None and row.discriminability is not None
        assert row.separation == pytest.approx((1 - row.m1) / (1 - results.base.m1))  # type: ignore[union-attr]
        assert row.substantive_pass is not None and (row.substantive_pass or row.shortfalls)
    shown = [[cell.text for cell in row] for row in recipe_table(results, verdict).rows]
    assert [row[:2] for row in shown if row[1] == "6D"] == [["one scale", "6D"], ["a scale a block", "6D"]]
    table = scaling_table(results)
    assert table is not None and [row[0].text for row in table.rows] == names
    assert [point.recipe for point in front(results, []).rows if point.phase == "6D"] == [
        "one scale",
        "a scale a block",
    ]


def test_it_is_due_where_a_recipe_beyond_the_registered_ones_is_done(
    chosen: tuple[Study, Read], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = chosen
    (beyond,) = (cell for cell in study.cells if cell.recipe.phase == "6A")
    job = MeasureScaling(study)
    assert job.done() and job not in asked_for(study)  # 6A is not done yet
    published = Study.published
    monkeypatch.setattr(Study, "published", lambda self, cell: cell == beyond or published(self, cell))
    assert job in asked_for(study)
    monkeypatch.setattr(
        jobs, "anchor_digests", lambda study: ("0" * 64, "0" * 64)
    )  # they were chosen on other personas
    assert not job.done()


def test_anchors_that_are_measured_are_refused(chosen: tuple[Study, Read]) -> None:
    study, _ = chosen
    worker = Worker(CPU, QUIET)
    instruments = worker.resources.instruments(study.baseline.recipe.config)
    asked = anchor_sets(ObjectiveSection())[1].questions[0]
    measured = replace(instruments, questions=replace(instruments.questions, questions=[asked]))
    worker.resources.instruments = lambda config: measured  # type: ignore[method-assign]
    with pytest.raises(UserError, match="is also measured"):
        scaling._measure_of(study, worker)
