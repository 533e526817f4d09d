"""The search that the shipped config plans is the registered one, line by line, and so is what --plan says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_study import QUIET, small_study
from torch import Tensor

from minipersona.behaviour import voice
from minipersona.behaviour.voice import Responses
from minipersona.chat import Document, load_tokenizer
from minipersona.cli import main
from minipersona.config import ProbeSection, RunConfig
from minipersona.corpus.mixtures import training_personas
from minipersona.errors import UserError
from minipersona.geometry.extraction import render_prompts
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.run.plan import measured_tokens
from minipersona.run.resources import Kind
from minipersona.run.times import Times
from minipersona.run.work import Machine, forward
from minipersona.settings import difference, load_config, override
from minipersona.study import recipes as recipes_module
from minipersona.study.estimate import Comparison, Cost, Estimate
from minipersona.study.plan import compared, passer, wall_seconds
from minipersona.study.recipes import BASELINE_PLACEHOLDER, RESPONSES_PLACEHOLDER, Recipe, check_planned, planned
from minipersona.study_config import STAGES, RecipeSection, StudyConfig, TransferSection, changes

# The registered search, typed from the protocol: phase, name, rank, alpha, learning rate, and what else is varied.
REGISTERED = """
1   baseline                32 64 2e-5
2A  beta=0.001              32 64 2e-5   objective=kl_to_base weight=1e-3
2A  beta=0.01               32 64 2e-5   objective=kl_to_base weight=1e-2
2A  beta=0.1                32 64 2e-5   objective=kl_to_base weight=1e-1
2B  lambda=0.001            32 64 2e-5   objective=r3f weight=1e-3
2B  lambda=0.01             32 64 2e-5   objective=r3f weight=1e-2
2B  lambda=0.1              32 64 2e-5   objective=r3f weight=1e-1
3   r=4_lr=2e-05             4  8 2e-5
3   r=4_lr=5e-05             4  8 5e-5
3   r=4_lr=0.0001            4  8 1e-4
3   r=8_lr=2e-05             8 16 2e-5
3   r=8_lr=5e-05             8 16 5e-5
3   r=8_lr=0.0001            8 16 1e-4
3   r=16_lr=2e-05           16 32 2e-5
3   r=16_lr=5e-05           16 32 5e-5
3   r=16_lr=0.0001          16 32 1e-4
4A  prompts                 32 64 2e-5   system_prompts=training_personas
4B  responses               32 64 2e-5   responses=written
5A  99:1                    32 64 2e-5   broad=fineweb-edu[0:4000] broad_kind=raw_text ratio=99:1
5A  95:5                    32 64 2e-5   broad=fineweb-edu[0:4000] broad_kind=raw_text ratio=95:5
5A  90:10                   32 64 2e-5   broad=fineweb-edu[0:4000] broad_kind=raw_text ratio=90:10
5A  75:25                   32 64 2e-5   broad=fineweb-edu[0:4000] broad_kind=raw_text ratio=75:25
5B  15:1                    32 64 2e-5   broad=tulu broad_kind=rows ratio=15:1
5B  7:1                     32 64 2e-5   broad=tulu broad_kind=rows ratio=7:1
5B  3:1                     32 64 2e-5   broad=tulu broad_kind=rows ratio=3:1
5B  1:1                     32 64 2e-5   broad=tulu broad_kind=rows ratio=1:1
5C  villain_-_assistant     32 64 2e-5   vector=villain_-_assistant coefficient=5 method=B
5C  collapse                32 64 2e-5   vector=collapse coefficient=1 method=A
"""

Row = tuple[str, str, int, float, float, dict[str, str | float]]
STEPS = (10, 25, 50, 100, 200, 375)


def table() -> list[Row]:
    """REGISTERED, read."""
    rows: list[Row] = []
    for line in REGISTERED.strip().splitlines():
        phase, name, rank, alpha, rate, *more = line.split()
        varied: dict[str, str | float] = {}
        for key, _, text in (pair.partition("=") for pair in more):
            number = key in ("weight", "coefficient")
            varied[key] = (
                float(text) if number else text.replace("_-_", " - ").replace("written", RESPONSES_PLACEHOLDER)
            )
        words = name.replace("_-_", " - ").replace("_", " ")
        rows.append((phase, words, int(rank), float(alpha), float(rate), varied))
    return rows


def described(recipe: Recipe) -> Row:
    """A recipe in the table's terms, from its config alone."""
    config = recipe.config
    varied: dict[str, str | float] = {}
    if config.objective.kind != "cross_entropy":
        varied |= {"objective": config.objective.kind, "weight": config.objective.weight}
    for key in ("system_prompts", "responses", "broad", "broad_kind", "ratio"):
        if value := getattr(config.data, key):
            varied[key] = value
    if config.steering.vector:
        varied |= {key: getattr(config.steering, key) for key in ("vector", "coefficient", "method")}
    return recipe.phase, recipe.name, config.lora.rank, config.lora.alpha, config.training.learning_rate, varied


@pytest.fixture
def shipped() -> StudyConfig:
    return load_config("study", StudyConfig)


def registered(study: StudyConfig) -> list[Recipe]:
    """The planned recipes of the registered search, without what they are compared with and checked by."""
    return [recipe for recipe in planned(study) if recipe.role == "registered"]


def test_the_shipped_study_is_the_registered_search(shipped: StudyConfig) -> None:
    recipes = registered(shipped)
    assert [described(recipe) for recipe in recipes] == table()
    for recipe in recipes:
        config = recipe.config
        assert config.training.checkpoints == STEPS and config.training.steps == 375 and config.training.batch == 16
        assert config.seed == 42 and (config.data.train, config.data.heldout) == ("tulu[0:6000]", "tulu[6000:6500]")
        assert config.probe.layers == (20, 7, 14, 21, 27) and config.probe.questions == "registered"
        assert config.probe.baseline == ("self" if recipe.phase == "1" else BASELINE_PLACEHOLDER)
    assert shipped.stop_rule == "substantive" and not shipped.exhaustive


def test_each_learning_rate_of_the_grid_has_its_reference_at_the_standard_rank(shipped: StudyConfig) -> None:
    references = [described(recipe) for recipe in planned(shipped) if recipe.role == "reference"]
    assert references == [
        ("3", "r=32 lr=5e-05", 32, 64.0, 5e-5, {}),
        ("3", "r=32 lr=0.0001", 32, 64.0, 1e-4, {}),
    ]  # at 2e-5 it is the baseline
    slower = replace(shipped, low_rank=replace(shipped.low_rank, learning_rate=(2e-5,)))
    assert not [recipe for recipe in planned(slower) if recipe.role == "reference"]


def test_controls_and_what_is_beyond_the_registered_stand_beside_it(shipped: StudyConfig) -> None:
    def found(study: StudyConfig) -> list[tuple[str, str, str]]:
        return [(r.phase, r.name, r.role) for r in planned(study) if r.role in ("control", "beyond")]

    controls = [("4B", "shuffled responses", "control"), ("5C", "random", "control")]
    beyond = [("2B", f"lambda={weight} xT", "beyond") for weight in ("0.001", "0.01", "0.1")]
    steered = [("5C", name, "beyond") for name in ("pirate - tour_guide", "collapse (training)")]
    assert found(shipped) == [*beyond, *controls, *steered]
    assert found(replace(shipped, controls=False)) == [*beyond, *steered]
    assert registered(replace(shipped, controls=False)) == registered(shipped)
    assert not load_config("tiny_study", StudyConfig).controls  # which has twelve minutes on two cores
    by_name = {recipe.name: recipe.config for recipe in planned(shipped)}
    assert by_name["random"].steering == replace(
        by_name["villain - assistant"].steering, vector="random:villain - assistant"
    )
    for mine, registered_one in [("pirate - tour_guide", "villain - assistant"),
                                 ("collapse (training)", "collapse")]:  # fmt: skip
        theirs = by_name[registered_one].steering
        vector = theirs.vector if mine.startswith("collapse") else mine
        assert by_name[mine].steering == replace(theirs, vector=vector, persona_set="training")
        assert theirs.leaks and not by_name[mine].steering.leaks
    assert by_name["shuffled responses"].data == replace(shipped.data, shuffle_responses=True)
    assert by_name["lambda=0.1 xT"].objective == replace(by_name["lambda=0.1"].objective, per_row=True)


def test_control_another_number_is_not_the_registered_search(shipped: StudyConfig) -> None:
    for section, key, value in [
        ("regularised", "beta", (1e-3, 1e-2, 2e-1)),
        ("low_rank", "rank", (4, 8, 24)),
        ("rehearsal", "steering_coefficient", 4.0),
        ("rehearsal", "raw_text_ratio", ("99:1", "95:5", "90:10", "74:26")),
    ]:
        other = replace(shipped, **{section: replace(getattr(shipped, section), **{key: value})})
        assert [described(recipe) for recipe in registered(other)] != table(), key
        assert len(changes(other, shipped)) == 1


def test_a_recipe_that_trains_what_the_baseline_does_is_refused(shipped: StudyConfig) -> None:
    ranks = replace(shipped, low_rank=replace(shipped.low_rank, rank=(4, shipped.lora.rank)))
    with pytest.raises(UserError, match="recipe 3 'r=32 lr=2e-05': is the same as 1 baseline; remove one"):
        planned(ranks)


def test_a_value_that_is_written_twice_is_refused(shipped: StudyConfig) -> None:
    for values in ((0.1, 0.1), (0.1, 0.1 + 1e-12)):  # the second would be another cell of the same name
        with pytest.raises(UserError, match=r"phase 2A: beta=0\.1 is planned 2 times; write each value once"):
            planned(replace(shipped, regularised=replace(shipped.regularised, beta=values)))


def test_the_defaults_are_the_shipped_study(shipped: StudyConfig) -> None:
    assert changes(StudyConfig(data=shipped.data, probe=shipped.probe), shipped) == []


def test_phase_1_alone_is_the_run_config_of_phase_1(shipped: StudyConfig) -> None:
    assert difference(planned(shipped)[0].config, load_config("phase1", RunConfig)) == []


@pytest.mark.parametrize(
    "name, phase, cell",
    [("phase2a", "2A", "beta=0.01"), ("phase2b", "2B", "lambda=0.01"), ("phase4b", "4B", "responses"),
     ("phase5c", "5C", "villain - assistant"), ("phase3", "3", "r=4 lr=2e-05"), ("phase4a", "4A", "prompts"),
     ("phase5a", "5A", "95:5"), ("phase5b", "5B", "7:1")],
)  # fmt: skip
def test_a_run_config_of_a_phase_is_a_cell_of_the_study(shipped: StudyConfig, name: str, phase: str, cell: str) -> None:
    recipe = next(r for r in planned(shipped) if (r.phase, r.name) == (phase, cell))
    changed = {line.split(":")[0] for line in difference(recipe.config, load_config(name, RunConfig))}
    assert changed <= {"probe.baseline", "data.responses"}


def test_with_em_only_the_narrow_data_of_phase_5_is_another(shipped: StudyConfig) -> None:
    em = replace(shipped, narrow="em", rehearsal=replace(shipped.rehearsal, em="jsonl:bad_legal_advice_6k.jsonl"))
    recipes = registered(em)
    unmixed = [r for r in recipes if r.phase == "EM"]
    assert [r.name for r in unmixed] == ["unmixed"] and recipes.index(unmixed[0]) == 18  # before all of phase 5
    assert [described(r) for r in recipes if r.phase != "EM"] == table()
    for recipe in recipes:
        narrow = recipe.phase in STAGES["5"]
        assert recipe.config.data.train == ("jsonl:bad_legal_advice_6k.jsonl" if narrow else "tulu[0:6000]")
        assert recipe.config.data.heldout == "tulu[6000:6500]"
    with pytest.raises(UserError, match=r"rehearsal\.em is missing"):
        replace(shipped, narrow="em")


def test_several_seeds_share_the_first_seed_s_baseline(shipped: StudyConfig) -> None:
    recipes = registered(replace(shipped, seeds=(42, 43)))
    assert len(recipes) == 2 * len(table()) and len({(r.phase, r.name) for r in recipes}) == len(recipes)
    own = [r for r in recipes if r.config.probe.baseline == "self"]
    assert [(r.phase, r.name) for r in own] == [("1", "baseline")]
    again = next(r for r in recipes if r.name == "beta=0.01 seed=43")
    assert again.config.seed == 43 and again.config.objective.weight == 0.01


def test_the_tiny_study_keeps_the_registered_ratios(shipped: StudyConfig) -> None:
    tiny = load_config("tiny_study", StudyConfig)
    rates = tiny.low_rank.learning_rate
    ratios = [rate / shipped.training.learning_rate for rate in shipped.low_rank.learning_rate]
    assert [rate / tiny.training.learning_rate for rate in rates] == pytest.approx(ratios)
    elsewhere = [(recipe.phase, recipe.name) for recipe in registered(tiny) if recipe.phase != "3"]
    assert elsewhere == [row[:2] for row in table() if row[0] != "3"]
    assert replace(tiny.regularised, r3f_lambda_per_row=shipped.regularised.r3f_lambda_per_row) == shipped.regularised
    assert tiny.low_rank.rank == shipped.low_rank.rank


# ---------------------------------------------------------------- what would fail at the end is said at the beginning

LARGER = ["model.name=random:Qwen/Qwen2.5-3B", "probe.questions=shipped", "probe.personas=shipped"]  # 36 blocks
MEASURED = "probe.layers=[29, 10, 15, 20, 25]"  # without the model's own layer, 26, where phase 5C steers


def refused(*settings: str) -> str:
    """What `check_planned` says of the shipped study with these settings."""
    with pytest.raises(UserError) as error:
        check_planned(override(load_config("study", StudyConfig), [*LARGER, *settings]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_study_of_the_real_model_is_the_registered_one_at_ten_times_the_rates(shipped: StudyConfig) -> None:
    real = load_config("smollm2_study", StudyConfig)
    check_planned(real)
    theirs, ours = planned(shipped), planned(real)
    assert [recipe.phase for recipe in ours] == [recipe.phase for recipe in theirs]
    for mine, registered in zip(ours, theirs, strict=True):
        assert mine.config.training.learning_rate == pytest.approx(10 * registered.config.training.learning_rate)
        changed = {line.split(":")[0] for line in difference(mine.config, registered.config)}
        assert changed == {"model.name", "training.learning_rate", "probe.layers"}, mine.name
    assert real.probe.layers[0] == 29 and set(real.probe.layers) >= {10, 15, 20, 25}


def test_a_layer_that_the_baseline_does_not_measure_is_refused_before_it_is_steered(shipped: StudyConfig) -> None:
    said = refused(MEASURED)
    assert said.startswith("phase 5C collapse: steers layer 26 ") and said.endswith("add 26 to probe.layers")
    for layers in ("[29, 10, 26]", "[]"):  # the control: measured, named or as the model's own
        check_planned(override(shipped, [*LARGER, f"probe.layers={layers}"]))
    check_planned(shipped)


def test_every_block_has_to_be_measured_where_every_block_is_steered(
    shipped: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = next(recipe for recipe in planned(shipped) if recipe.name == "collapse")
    everywhere = replace(
        recipe, config=replace(recipe.config, steering=replace(recipe.config.steering, all_layers=True))
    )
    monkeypatch.setattr(recipes_module, "planned", lambda study: [everywhere])
    with pytest.raises(UserError, match=r"phase 5C collapse: steers layer 0 .* add 0 to probe\.layers"):
        check_planned(shipped)
    probe = replace(recipe.config.probe, layers=tuple(range(28)))
    all_measured = replace(everywhere, config=replace(everywhere.config, probe=probe))
    monkeypatch.setattr(recipes_module, "planned", lambda study: [all_measured])
    check_planned(shipped)


def test_a_layer_that_the_model_does_not_have_is_refused(shipped: StudyConfig) -> None:
    assert refused("probe.layers=[26, 36]").startswith(
        "phase 1 baseline: probe.layers names 36; this model has blocks 0 "
    )
    check_planned(override(shipped, [*LARGER, "probe.layers=[26, 35]"]))


@pytest.mark.parametrize("key, suite", [("instructions.file", "behaviour"), ("behaviour.questions", "instructions")])
def test_a_file_of_a_suite_that_is_not_there_is_refused_unless_the_suite_is_off(key: str, suite: str) -> None:
    assert refused(f"{key}=gone.jsonl").startswith("gone.jsonl: no such file")
    shipped = load_config("study", StudyConfig)
    check_planned(override(shipped, [f"{key}=gone.jsonl", f'suites=["{suite}"]']))  # the control


@pytest.mark.parametrize("plan", [["--plan"], []])
def test_plan_and_study_both_refuse_it_and_write_nothing(
    plan: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    assert main(["study", "--config", "tiny_study", "--set", "probe.layers=[0]", "--out", str(out), *plan]) == 2
    assert "phase 5C collapse: steers layer " in capsys.readouterr().err
    assert not out.exists()


def test_a_plan_shows_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Also with nothing of the 7B at hand, as in these tests."""
    assert main(["study", "--config", "study", "--plan", "--phases", "1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for phase, name, rank, _, rate, varied in table():
        line = next(line for line in lines if line.startswith(f"#   {phase:<2} {name} "))
        assert "2.70 M tokens" in line and " GiB" in line  # 6,000 rows of 450 tokens
        assert (rank == 32) == ("lora.rank" not in line) and (rate == 2e-5) == ("learning_rate" not in line)
        assert all(f"{value:g}" in line if isinstance(value, float) else value in line
                   for key, value in varied.items() if key not in ("coefficient", "method"))  # fmt: skip
    assert any("tokens are an estimate, 450 a row" in line for line in lines)
    assert any("at the one with the loss of each of 14 recipes" in line for line in lines)  # 9 cells and 5 early steps
    assert any(line.startswith("# confirmation of a passer: 3 seeds of it and of the baseline, ") for line in lines)
    assert sum("not asked for by --phases" in line for line in lines) == 3


def line_of(text: str, beginning: str) -> str:
    """The line of a plan that begins so; empty where none does."""
    return next((line for line in text.splitlines() if line.startswith(f"# {beginning}")), "")


def test_a_plan_counts_the_answers_that_fall_due(capsys: pytest.CaptureFixture[str]) -> None:
    """Two models' behaviour where a recipe passes; instructions of base, baseline and the 75:25 cell."""

    def plan(*settings: str) -> str:
        assert main(["study", "--config", "study", "--plan", "--set", "behaviour.samples=2", *settings]) == 0
        return capsys.readouterr().out

    every = plan()
    behaviour, instructions = line_of(every, "behaviour of "), line_of(every, "instructions of ")
    assert behaviour.startswith("# behaviour of 2 models where a recipe passes, ") and " estimated for " in behaviour
    assert " 224 answers, 448 judgements by the base model; " in behaviour  # 56 prompts, twice, of two models
    assert instructions.startswith("# instructions of 3 models, ") and " 753 answers; " in instructions
    assert "0 seconds of them for answers" not in line_of(every, "in all ")
    seeds = plan("--phases", "1,2", "--set", "seeds=[42, 43]")  # no raw text; a recipe is a cell a seed
    assert "behaviour of 3 models" in seeds and not line_of(seeds, "instructions of ")
    served = plan("--set", "behaviour.judge=endpoint", "--set", "behaviour.endpoint=http://127.0.0.1:9",
                  "--set", "behaviour.judge_model=M")  # fmt: skip
    assert "judgements by M; " in served
    tokens = [float(line.split(" M tokens")[0].rsplit(" ", 1)[1]) for line in (behaviour, line_of(served, "behaviour"))]
    assert tokens[1] < tokens[0] / 2  # a server's tokens take no time of ours
    without = plan("--set", "suites=[]")  # the control
    assert "0 seconds of them for answers" in line_of(without, "in all ") and " answers, " not in without


def test_a_plan_counts_what_recipes_are_compared_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minipersona.study.estimate.measure_machine", lambda *given: Machine("cpu", 1e12))

    def plan(*settings: str) -> tuple[str, float, float, str]:
        """The line of what is compared, its hours and those in all, and what is said of a passer."""
        assert main(["study", "--config", "study", "--plan", "--phases", "1,2", *settings]) == 0
        text = capsys.readouterr().out
        asked, total = line_of(text, "voice"), line_of(text, "in all ")
        hours = [float(line.split(" hours")[0].rsplit(" ", 1)[1]) for line in (asked, total)]
        return asked, *hours, line_of(text, "confirmation of a passer") or line_of(text, "a passer")

    without, few, total, passed = plan()
    assert without.startswith("# voice of base and baseline: ")
    assert re.search(r" more, and \S+ hours for voice and M1 on every persona set$", passed)
    named, more, larger, _ = plan("--set", 'transfer.recipes=["2A beta=0.1", "3 r=4 lr=2e-05"]')  # of which one is run
    assert named.startswith("# voice, and M1 on every persona set, of base, baseline and 1 cell of transfer.recipes: ")
    assert more > few and larger - total == pytest.approx(more - few, abs=0.2)
    passed = plan("--set", "confirmations=0")[-1]
    assert passed.startswith("# a passer: ") and passed.endswith(" more for voice and M1 on every persona set")


def test_what_a_plan_has_in_all_is_the_sum_of_its_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minipersona.study.estimate.measure_machine", lambda *given: Machine("cpu", 1e11))
    assert main(["study", "--config", "study", "--plan", "--phases", "1", "--set", "suites=[]"]) == 0
    text = capsys.readouterr().out
    parts = [line_of(text, part) for part in ("the base, ", "phase 1: ", "doing less: ", "voice of ")]
    base, *others = [float(line.split(" hours")[0].rsplit(" ", 1)[1]) for line in parts]
    total = float(line_of(text, "in all ").split(" hours")[0].rsplit(" ", 1)[1])
    assert base > 1 and total == pytest.approx(base + sum(others), abs=0.3)


def test_each_model_is_compared_once() -> None:
    study = load_config("study", StudyConfig)
    each = Comparison(responding=1, voice=10, transfer=1000)
    cell = Times(
        starting=0, loading=0, compiling=0, recording=0, reading=0, anchoring=0, training=10800, measurements=1,
        measurement=0, writing=0, device=0, step=0,
    )  # fmt: skip

    def seconds(study: StudyConfig) -> float:
        return compared(study, planned(study), each)[1]

    def passes(study: StudyConfig) -> str:
        return passer(study, planned(study), [Cost(0, 0, cell)], each)

    assert seconds(study) == 1 + 2 * 10  # base and baseline
    named = replace(study, transfer=TransferSection(recipes=("2A beta=0.1", "3 r=4 lr=2e-05")))
    assert seconds(named) == 1 + 4 * 10 + 4 * 1000  # base, baseline and two recipes
    seeds = replace(named, seeds=(42, 43))
    assert seconds(seeds) == 1 + 7 * 10 + 7 * 1000  # base, two baselines and two recipes twice
    assert passes(replace(study, confirmations=0)).startswith("# a passer: 50 minutes more ")  # it, base and baseline
    assert passes(replace(named, confirmations=0)).startswith("# a passer: 17 minutes more ")  # it alone
    # With three fresh seeds four cells of it and three baselines, beside the base and the first baseline.
    assert "3 seeds of it and of the baseline, 18.0 hours more, and 2.5 hours for " in passes(study)  # 9,070 s
    assert "3 seeds of it and of the baseline, 18.0 hours more, and 2.0 hours for " in passes(named)  # 7,070 s


def test_the_tokens_of_a_comparison_are_those_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of voice, the documents that it passes; of a persona set, each persona's beginning once."""
    study = small_study(tmp_path)
    baseline, tokenizer = planned(study)[0].config, load_tokenizer("tiny")
    estimate = Estimate(study, baseline, "cpu")
    estimate.machine = Machine("cpu", 1.0)  # so that seconds are operations
    monkeypatch.setattr("minipersona.study.estimate.MOST_TOKENS", 7)  # fewer than the rows' responses have
    each = estimate.comparison(study, baseline)

    read = np.zeros(2, int)  # tokens, and those of responses

    def losses(model: object, documents: Sequence[Document], pack_tokens: int) -> list[Tensor]:
        read[:] += sum(map(len, documents)), sum(int(document.supervised.sum()) for document in documents)
        return [torch.ones(int(document.supervised.sum())) for document in documents]

    monkeypatch.setattr(voice, "supervised_losses", losses)
    personas, questions = load_personas(baseline.probe.personas), load_questions(baseline.probe.questions)
    prompts = [prompt.ids for prompt in render_prompts(tokenizer, personas.prompts, questions.questions)]
    said = Responses(tuple(personas.prompts), prompts, [np.zeros(7, np.int32)] * len(prompts))
    voice.measure_voice(None, said, QUIET)  # type: ignore[arg-type]
    assert each.voice == pytest.approx(forward(estimate.sizes, *read).products)
    assert each.responding == pytest.approx(2 * 7 * len(prompts) * estimate.sizes.matmul_parameters)

    own, _ = measured_tokens(baseline, tokenizer)
    shipped, _ = measured_tokens(replace(baseline, probe=ProbeSection()), tokenizer)
    assert each.transfer == pytest.approx(forward(estimate.sizes, own + shipped, 0).products)
    assert own < shipped / 100


def test_processes_that_share_a_gpu_wait_for_what_it_computes() -> None:
    cell = Times(
        starting=10, loading=1, compiling=20, recording=10, reading=2, anchoring=0, training=8, measurements=2,
        measurement=10, writing=5, device=9, step=0.02,
    )  # fmt: skip
    assert cell.each == 25  # its base is measured once a study
    start, new = 10 + 1, 20 + 10

    def wall(devices: str, *phases: str) -> float:
        """Of phases whose cells are named by their kinds."""
        return wall_seconds([[(Kind(kind, kind), cell) for kind in phase] for phase in phases], devices.split())

    answered, a = replace(cell, anchoring=7), Kind("a", "a")
    assert wall_seconds([[(a, answered), (a, answered)]], ["0"]) == start + new + 7 + 2 * 25  # once a process
    strengths = [(Kind("a", strength), cell) for strength in (1, 2, 1)]  # of what is compiled once, and recorded each
    assert wall_seconds([strengths], ["0"]) == start + new + 10 + 3 * 25
    assert wall_seconds([strengths[:2]], ["0", "1"]) == start + new + 25

    many = "a" * 40
    assert wall("", many) == wall("0", many) == start + new + 40 * 25
    assert wall("0 1", many) == start + new + 40 * 25 / 2
    assert wall("0 0", many) == start + new + 40 * 25 / 2  # the host's part is longer than the device's
    assert wall("0 0 0 0 0", many) == start + new + 40 * 9  # all wait for the device
    assert wall("0 0 0 0 0 1 1 1 1 1", many) == start + new + 40 * 9 / 2
    assert wall("0", "aabbc") == start + 3 * new + 5 * 25
    assert wall("0 1", "ab") == start + new + 25  # a process has one cell, so one kind
    assert wall("0 1", "a", "aab") == start + 2 * new + 25 + 3 * 25 / 2  # a phase waits for the one before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--config is missing"),
        (["report"], "write study.py report DIR"),
        (["rapport", "x"], "write study.py report DIR"),
        *(
            (["report", "no_study", *given.split()], f"{given.split()[0]}: has no effect on report")
            for given in ("--config study", "--out x", "--set seed=1", "--exhaustive", "--phases 9", "--plan",
                          "--gpus all", "--workers 0", "--ray auto")
        ),
        (["report", "no_study", "--phases", ""], "no_study"),  # the control: as if it were left out
        (["--config", "study", "--phases", "1,7", "--plan"], "'7' is none of 1, 2, 3, 4, 5, 6"),
        (["--config", "study", "--cell", "3/2"], "unrecognized arguments: --cell"),
        (["--config", "study", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--config", "study", "--set", "probe.baseline=x"], "probe.baseline: a study has its own"),
        (["--config", "study", "--set", "training.checkpoints=[10]"], "every cell is judged at its last step; add 375"),
        (["--config", "study", "--set", "probe.layers=[20]", "--out", "x"], "probe.layers lacks 7"),
        (["--config", "study", "--set", "narow=em"], "did you mean narrow?"),
    ],
)  # fmt: skip
def test_a_wrong_use_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_study_config_file_reads_back_equal(shipped: StudyConfig, tmp_path: Path) -> None:
    from minipersona.settings import to_toml

    (tmp_path / "study.toml").write_text(to_toml(shipped))
    assert load_config(str(tmp_path / "study.toml"), StudyConfig) == shipped


@pytest.mark.parametrize("key", ["data.responses", "steering.vector"])
def test_a_file_that_a_recipe_names_is_looked_for_before_the_first_cell(tmp_path: Path, key: str) -> None:
    file = tmp_path / "named"
    study = load_config("tiny_study", StudyConfig)
    recipe = RecipeSection("6Z", "mine", {key: str(file) if key == "data.responses" else f"file:{file}"})
    with pytest.raises(UserError, match=f"phase 6Z mine: {key}: {file}: no such file; check its path"):
        check_planned(replace(study, recipe=(recipe,)))
    file.touch()
    check_planned(replace(study, recipe=(recipe,)))


def test_what_is_measured_on_other_personas_is_checked_before_the_first_cell(tmp_path: Path) -> None:
    more = tmp_path / "more.json"
    more.write_text('{"eval_personas": {"a": "You are a.", "b": "You are b."}}')
    study = load_config("tiny_study", StudyConfig)
    check_planned(replace(study, transfer=TransferSection((str(more),), ("2A beta=0.1", "3 r=4 lr=0.001"))))
    with pytest.raises(UserError, match=r"transfer.recipes: '2A beta=0.5' is not a recipe of this study; --plan lists"):
        check_planned(replace(study, transfer=TransferSection(recipes=("2A beta=0.5",))))
    # What recipes are judged against is measured beside them, and a recipe is measured with all of its seeds.
    for name in ("1 baseline", "2A beta=0.1 seed=43"):
        with pytest.raises(UserError, match=f"transfer.recipes: '{name}' is not a recipe of this study; .* the seed,"):
            check_planned(replace(study, seeds=(42, 43), transfer=TransferSection(recipes=(name,))))
    with pytest.raises(UserError, match=r"transfer.personas: two sets would be called 'more'; rename a file"):
        TransferSection(("a/more.json", "b/more.json"))
    with pytest.raises(UserError, match=r"none\.json"):
        check_planned(replace(study, transfer=TransferSection(personas=(str(tmp_path / "none.json"),))))


def test_what_a_recipe_is_anchored_to_does_not_show_what_it_keeps_of_others(tmp_path: Path) -> None:
    name, prompt = next(iter(training_personas().items()))
    personas = tmp_path / "mine.json"
    anchor = RecipeSection("6A", "anchor", {"objective.kind": "feature_anchor", "objective.weight": 1.0})
    study = replace(small_study(tmp_path), recipe=(anchor,), transfer=TransferSection((str(personas),)))
    personas.write_text(json.dumps({"eval_personas": {"mine": prompt.upper(), "yours": "You are a poet."}}))
    with pytest.raises(UserError, match=rf"phase 6A anchor: .*persona '{name}' is also measured \(transfer.personas\)"):
        check_planned(study)
    check_planned(replace(study, recipe=()))  # the controls: no anchor, and other personas
    personas.write_text(json.dumps({"eval_personas": {"mine": "You are me.", "yours": "You are a poet."}}))
    check_planned(study)
    # Nor do the shipped questions, at which every recipe that is compared is measured.
    (tmp_path / "q.txt").write_text("\n".join(load_questions().questions[-2:]))
    asked = replace(anchor, set={**anchor.set, "objective.anchor_questions": str(tmp_path / "q.txt")})
    with pytest.raises(UserError, match=r"is also measured \(transfer.questions\)"):
        check_planned(replace(study, recipe=(asked,)))


@pytest.mark.parametrize("data", [{"responses": "r.jsonl"}, {"shuffle_responses": True}])
def test_the_baseline_is_trained_on_plain_rows(data: dict[str, Any], tmp_path: Path) -> None:
    study = small_study(tmp_path)
    with pytest.raises(UserError, match="phase 1 is trained on plain rows"):
        replace(study, data=replace(study.data, **data))
