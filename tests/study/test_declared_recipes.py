"""Recipes as data: a `[[recipe]]` table of a study's TOML is a cell, and what is wrong with one is one line."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_study import QUIET, run, small_study
from synthetic_study import SyntheticStudy

from minipersona.cli import main
from minipersona.config import ObjectiveSection
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.files import configs_dir, read_json, write_json
from minipersona.run import null_space, steering
from minipersona.run.anchors import anchor_sets
from minipersona.settings import difference, load_config, to_toml
from minipersona.study import scaling
from minipersona.study.recipes import Recipe, check_planned, planned, standard_config
from minipersona.study.search import open_study
from minipersona.study_config import RecipeSection, StudyConfig, changes
from minipersona.verdict.decision import decide
from minipersona.verdict.results import read_study

TABLE = """
[[recipe]]
phase = "6Z"
name = "fast and small"
set = {"training.learning_rate" = 7e-4, "lora.rank" = 2, "lora.alpha" = 4}
"""
NESTED = """
[[recipe]]
phase = "6Z"
name = "fast and small"
[recipe.set]
training.learning_rate = 7e-4
lora = {rank = 2, alpha = 4}
"""


def study_with(text: str, directory: Path) -> StudyConfig:
    """The tiny study with these tables below it."""
    file = directory / "study.toml"
    file.write_text((configs_dir() / "tiny_study.toml").read_text() + text)
    return load_config(str(file), StudyConfig)


def declared(study: StudyConfig) -> list[Recipe]:
    return [recipe for recipe in planned(study) if recipe.phase.startswith("6")]


@pytest.mark.parametrize("text", [TABLE, NESTED])
def test_a_table_is_the_standard_recipe_but_for_what_it_sets(text: str, tmp_path: Path) -> None:
    study = study_with(text, tmp_path)
    (recipe,) = declared(study)
    assert (recipe.phase, recipe.name, recipe.role) == ("6Z", "fast and small", "beyond")
    changed = difference(recipe.config, standard_config(study, 42))
    assert changed == ["lora.rank: 32 -> 2", "lora.alpha: 64.0 -> 4.0", "training.learning_rate: 0.001 -> 0.0007"]
    assert recipe.knobs == {"training.learning_rate": 7e-4, "lora.rank": 2, "lora.alpha": 4}
    assert planned(study) == [*planned(replace(study, recipe=())), recipe]  # it comes last and changes no other


def test_a_study_with_tables_reads_back_equal(tmp_path: Path) -> None:
    study = study_with(TABLE + "reference = true\n" + NESTED.replace("small", "nested"), tmp_path)
    (tmp_path / "again.toml").write_text(to_toml(study))
    assert load_config(str(tmp_path / "again.toml"), StudyConfig) == study


def test_marks_are_roles_and_every_seed_has_the_recipe(tmp_path: Path) -> None:
    control = RecipeSection("6A", "c", {"lora.rank": 1}, control=True)
    settings = {"data": {"shuffle_responses": True}, "lora.targets": ["q_proj"]}
    reference = RecipeSection("6B", "r", settings, reference=True)
    study = replace(study_with("", tmp_path), recipe=(reference, control), seeds=(42, 43))
    found = [(recipe.phase, recipe.name, recipe.config.seed, recipe.role) for recipe in declared(study)]
    assert found == [
        ("6A", "c", 42, "control"),
        ("6B", "r", 42, "reference"),
        ("6A", "c seed=43", 43, "control"),
        ("6B", "r seed=43", 43, "reference"),
    ]
    assert declared(study)[1].knobs == {"data.shuffle_responses": "True", "lora.targets": "['q_proj']"}


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"set": {"training.learning_rat": 1e-3}}, "unknown config key training.learning_rat; did you mean "
                                                   "training.learning_rate?"),
        ({"set": {"lora": {"rnk": 2}}}, "unknown config key lora.rnk; did you mean lora.rank?"),
        ({"set": {"lora": 2}}, "unknown config key lora; "),
        ({"set": {"lora.rank": "two"}}, "lora.rank = 'two': must be a whole number"),
        ({"set": {"lora.rank": True}}, "lora.rank = True: must be a whole number"),
        ({"set": {"lora.rank": 0}}, "lora.rank = 0: must be at least 1"),
        ({"set": {"training.steps": 30}}, "training.checkpoints: step 40 is outside 1 to 30"),
        ({"set": {"training.checkpoints": [10]}}, "every cell is judged at its last step; add 40"),
        ({"set": {"probe.layers": [1]}}, "probe.layers is the same in the whole study; set it there"),
        ({"set": {"seed": 1}}, "seed is the same in the whole study; set it there"),
        ({"set": {}}, "sets nothing in which it departs from the standard recipe"),
        ({"set": {"lora.rank": 32}}, "sets nothing in which it departs from the standard recipe"),
        ({"set": {"objective": {"kind": "kl_to_base", "weight": 0.01}}}, "is the same as 2A beta=0.01; remove one"),
        ({"phase": "3"}, "phase must be 6 and a capital letter, such as 6A"),
        ({"phase": "6"}, "phase must be 6 and a capital letter, such as 6A"),
        ({"phase": "6D"}, "6D is the baseline's update, scaled, which a study measures beside its recipes"),
        ({"name": " "}, "give it a name"),
        ({"name": "mine seed=43"}, "must not end like one of several seeds"),
        ({"reference": True, "control": True}, "is a reference or a control, not both"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_one_line_that_names_it(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"phase": "6A", "name": "mine", "set": {"lora.rank": 2}, **changed}
    study = study_with("", tmp_path)
    with pytest.raises(UserError) as refused:
        planned(replace(study, recipe=(RecipeSection(**values),)))
    error = str(refused.value)
    assert error.startswith(f"recipe {values['phase']} {values['name']!r}: ") and said in error and "\n" not in error


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    one, other = (RecipeSection("6A", "mine", {"lora.rank": rank}) for rank in (1, 2))
    study = study_with("", tmp_path)
    with pytest.raises(UserError, match="phase 6A: mine is planned 2 times"):
        planned(replace(study, recipe=(one, other)))
    planned(replace(study, recipe=(one, replace(other, phase="6B"))))
    with pytest.raises(UserError, match="recipe 6B 'mine': is the same as 6A mine; remove one"):
        planned(replace(study, recipe=(one, replace(one, phase="6B"))))


def test_a_plan_lists_them_with_their_departures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.toml").write_text(
        to_toml(small_study(tmp_path)).replace("recipe = []\n", "") + TABLE + "control = true\n"
    )
    assert main(["study", "--config", str(tmp_path / "study.toml"), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("# phase 6: 1 cell, ") for line in lines)
    (line,) = (line for line in lines if line.startswith("#   6Z fast and small "))
    assert line.endswith("control: lora.rank = 2, lora.alpha = 4.0, training.learning_rate = 0.0007")
    assert (
        sum(line.startswith("# scales chosen on training personas, in 27 small measurements: ") for line in lines) == 1
    )
    assert main(["study", "--config", str(tmp_path / "study.toml"), "--plan", "--phases", "1"]) == 0
    assert "scales chosen" not in capsys.readouterr().out  # the control: they are chosen where phase 6 is run


# ---------------------------------------------------------------- the shipped ones


def test_the_shipped_study_with_phase_6_is_the_registered_one_beside_it() -> None:
    shipped, beyond = (load_config(name, StudyConfig) for name in ("study", "beyond"))
    plain = replace(beyond, recipe=())
    assert changes(plain, shipped) == [] and planned(plain) == planned(shipped)
    assert planned(beyond)[: len(planned(shipped))] == planned(shipped)
    found = declared(beyond)
    assert sorted({recipe.phase for recipe in found}) == [f"6{letter}" for letter in "ABCEFGHIJK"]
    assert [recipe.name for recipe in found if recipe.role != "beyond"] == ["blocks 21 to 27"]
    check_planned(beyond)


def test_the_real_model_s_recipes_are_the_same_at_its_own_layers() -> None:
    beyond, real, voice = (load_config(name, StudyConfig) for name in ("beyond", "smollm2_beyond", "smollm2_voice"))
    layers = {(7, 14, 20, 21, 27): (10, 15, 20, 25, 29), (4, 9, 14, 20, 23, 27): (5, 10, 15, 20, 25, 29), (): (29,)}
    both = [*declared(real), *declared(voice)]  # some of them at further strengths
    own = {(recipe.phase, recipe.name.replace("e-4", "e-5")): recipe for recipe in both}  # ten times the rates
    for theirs in declared(beyond):
        if theirs.phase == "6I":  # the blocks of another model
            continue
        expected = theirs.config.objective
        if expected.anchors_features or expected.kind == "gram_anchor":
            expected = replace(expected, anchor_layers=layers[expected.anchor_layers])
        mine = own[theirs.phase, theirs.name]
        assert mine.config.objective == expected
        assert (mine.config.data, mine.config.lora) == (theirs.config.data, theirs.config.lora)
    registered = load_config("study", StudyConfig)
    assert [rate / 10 for rate in real.low_rank.learning_rate] == pytest.approx(registered.low_rank.learning_rate)
    assert real.training == replace(registered.training, learning_rate=2e-4)


# ---------------------------------------------------------------- in a study's directory


@pytest.mark.slow
def test_every_kind_of_cell_beyond_the_registered_ones_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(null_space, "CONTEXTS", 40)
    sets = anchor_sets(ObjectiveSection())
    fewer = sets[0], replace(sets[1], questions=sets[1].questions[:2])
    monkeypatch.setattr(steering, "anchor_sets", lambda section: fewer)
    monkeypatch.setattr(scaling, "anchor_sets", lambda section: fewer)
    plain = small_study(tmp_path)
    tables = {
        "anchor": {"objective": {"kind": "feature_anchor", "weight": 1.0, "contexts": 4}},
        "responses": {"objective": {"kind": "kl_on_prompts", "weight": 1.0, "contexts": 4, "anchor_responses": 8}},
        "persona": {"data.system_prompts": "training_personas", "data.responses": "study:role_play",
                    "data.persona_share": 0.5},
        "rewritten": {"data.responses": "study:rewritten"},
        "rewritten, rank 2": {"data.responses": "study:rewritten", "lora.rank": 2},
        "null space": {"lora.null_space": 4},
        "blocks": {"lora.blocks": [7, 7]},  # above the measured layer, 6
    }  # fmt: skip
    config = replace(
        plain,
        recipe=tuple(RecipeSection("6A", name, table) for name, table in tables.items()),
        controls=True,
        suites=(),
        role_play=replace(plain.role_play, max_new_tokens=64),
        regularised=replace(plain.regularised, beta=(), r3f_lambda=(), r3f_lambda_per_row=(0.1,)),
        rehearsal=replace(
            plain.rehearsal, raw_text_ratio=(), instruction_ratio=(), training_steering="pirate - tour_guide"
        ),
    )
    verdict = run(config, ("2", "4", "5", "6"))
    results = read_study(tmp_path / "study")
    done = {cell.name: cell for cell in results.cells if cell.status == "done"}
    assert [cell.error for cell in results.cells if cell.status == "failed"] == [] and not verdict.failed
    assert set(tables) < set(done) and {"shuffled responses", "random", "lambda=0.1 xT", "collapse (training)"} < set(
        done
    )
    base, baseline = results.base, results.baseline
    assert base is not None and baseline is not None
    assert done["blocks"].final.m1 == base.m1 and baseline.final.m1 != base.m1  # what the control shows
    m1 = {name: cell.final.m1 for name, cell in done.items()}
    assert len(set(m1.values())) == len(m1)  # every one did something of its own
    roles = {name: cell.role for name, cell in done.items()}
    assert (roles["random"], roles["null space"], roles["villain - assistant"]) == ("control", "beyond", "registered")
    assert done["villain - assistant"].labels == ("leaks",) and done["collapse (training)"].labels == ()
    report = (tmp_path / "study" / "report.md").read_text()
    assert all(name in report for name in tables)
    assert set(verdict.scaling) == {"6D one scale", "6D a scale a block"} and "| a scale a block | 6D |" in report


def test_a_recipe_may_be_added_to_a_study_and_taken_from_it(tmp_path: Path) -> None:
    plain = small_study(tmp_path)
    before = open_study(plain, "cpu", QUIET)
    study = open_study(replace(plain, recipe=(RecipeSection("6A", "mine", {"lora.rank": 2}),)), "cpu", QUIET)
    assert study.cells[:-1] == before.cells and study.cells[-1].recipe.name == "mine"
    row = read_json(study.directory / "plan.json")["cells"][-1]
    assert row["role"] == "beyond" and row["knobs"] == {"lora.rank": 2}
    study.cell_directory(study.cells[-1]).mkdir(parents=True)
    said = io.StringIO()
    open_study(plain, "cpu", Console(stream=said))
    assert said.getvalue() == ""  # its cell is not of another version of the code: nobody asks for it any more


def test_a_role_is_read_back_and_only_registered_cells_are_evidence(tmp_path: Path) -> None:
    """A cell beyond the registered search that passes changes nothing of that search's verdict."""
    study = SyntheticStudy(tmp_path / "study")
    study.baseline()
    study.cell("2A", "beta=0.1", 0.98, 0.95)
    whole = study.read()
    assert [cell.role for cell in whole.cells] == ["registered", "registered"]  # directories without roles read as such
    assert "role" not in (tmp_path / "study" / "plan.json").read_text()
    study.cell("6A", "anchor", 0.92, 0.95, role="beyond")
    results = study.read()
    assert results.cells[-1].role == "beyond" and results.registered() == whole.cells
    assert decide(whole).verdict == decide(results).verdict == "inconclusive"
    study.missing("6B", "another", role="beyond")  # nor does the registered verdict wait for one
    assert decide(study.read()).verdict == "inconclusive"
    control = SyntheticStudy(tmp_path / "control")
    control.baseline()
    control.cell("6A", "anchor", 0.92, 0.95)  # as a registered one it passes
    assert decide(control.read()).verdict == "unconfirmed"
    plan = read_json(tmp_path / "study" / "plan.json")
    plan["cells"][-1]["role"] = "best"
    write_json(tmp_path / "study" / "plan.json", plan)
    with pytest.raises(UserError, match="must be one of 'registered', 'reference', 'control', 'beyond'"):
        read_study(tmp_path / "study")
    plan["cells"][-1]["role"] = "beyond"
    plan["cells"][-2]["role"] = "registered"  # cell.json says another
    write_json(tmp_path / "study" / "plan.json", plan)
    with pytest.raises(UserError, match=r"is 6A anchor \(beyond\), but was planned as 6A anchor \(registered\)"):
        read_study(tmp_path / "study")
