"""Reading a study's directory: what is missing is missing, what is wrong is one line, and no flag is trusted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
from synthetic_study import SyntheticStudy, behaviour

from minipersona.errors import UserError
from minipersona.study_config import PHASES, STAGES
from minipersona.verdict import ledger
from minipersona.verdict.cells import CellResult
from minipersona.verdict.ledger import LedgerEntry
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import judge_study


def test_cells_come_in_the_order_of_the_phases_with_what_became_of_them(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path, narrow="em", exhaustive=True)
    study.cell("5A", "95:5", 0.97, 0.9, answers=behaviour(0.0))
    study.event("3", "r=4", "failed", error="loss is not finite")
    study.event("3", "r=8", "started")
    study.missing("2A", "beta=0.1")
    study.baseline()
    results = study.read()
    assert [(cell.id, cell.status) for cell in results.cells] == [
        ("1 baseline", "done"),
        ("2A beta=0.1", "missing"),
        ("3 r=4", "failed"),
        ("3 r=8", "missing"),
        ("5A 95:5", "done"),
    ]
    assert results.cells[2].error == "loss is not finite" and results.cells[2].directory is None
    assert results.cells[4].behaviour is not None and results.base_behaviour is None
    config = results.config
    assert (config.narrow, config.exhaustive, config.stop_rule) == ("em", True, "substantive")
    assert results.of_phase("3") == results.cells[2:4]


def test_every_stage_is_made_of_phases_in_order() -> None:
    assert PHASES[:10] == ("1", "2A", "2B", "3", "4A", "4B", "EM", "5A", "5B", "5C")
    assert PHASES[10:] == tuple(f"6{letter}" for letter in ascii_uppercase)  # beyond the registered ones
    assert "".join(STAGES) == "123456"


def test_rows_are_judged_anew_against_the_study_s_baseline(tmp_path: Path) -> None:
    """The directories of the synthetic study claim learned = 9 and every pass."""
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("2A", "beta=0.1", 0.96, 0.25)
    results = study.read()
    row = results.cells[1].final
    assert row.learned == pytest.approx(0.25)
    assert (row.registered_pass, row.substantive_pass, row.collapsed) == (False, False, False)
    assert results.base is not None and (results.base.step, results.base.learned) == (0, 0.0)
    assert (results.base.registered_pass, results.base.substantive_pass) == (True, False)
    assert results.cells[1].result is not None and results.cells[1].result.best is None
    assert results.baseline is results.cells[0] and results.baseline.final.learned == 1.0


def test_a_cell_is_held_against_the_baseline_of_its_seed_or_else_of_the_first(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("1", "baseline seed=43", 0.98, 2.0, seed=43, less=None)  # learned twice as much
    for seed in (42, 43, 44):
        study.cell("2A", f"beta=0.1 seed={seed}", 0.94, 0.9, seed=seed, less=None)
    learned = [cell.final.learned for cell in study.read().of_phase("2A")]
    assert learned == [pytest.approx(0.9), pytest.approx(0.45), pytest.approx(0.9)]


def test_without_a_baseline_learned_is_undefined(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.cell("2A", "beta=0.1", 0.94, 0.9)
    results = study.read()
    assert results.baseline is None and results.base is not None and results.base.m1 == 0.90
    assert results.cells[0].final.learned is None and results.cells[0].final.registered_pass is None


def test_the_newest_word_on_a_cell_counts(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.event("3", "r=4", "failed", error="first attempt")
    cell = study.plan[0].cell
    ledger.append(tmp_path, LedgerEntry(99, cell, "3", "r=4", "started", 2))
    assert study.read().cells[0].status == "missing"
    ledger.append(tmp_path, LedgerEntry(100, cell, "3", "r=4", "failed", 2, "second attempt"))
    assert (study.read().cells[0].status, study.read().cells[0].error) == ("failed", "second attempt")


def test_a_torn_ledger_line_and_an_attempt_under_way_are_passed_over(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.event("3", "r=4", "failed")
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"time": 5, "cel')
    (tmp_path / "cells" / ".attempts" / "x").mkdir(parents=True)
    assert [cell.status for cell in study.read().cells] == ["done", "failed"]


def test_without_plan_json_what_is_there_is_the_study(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.cell("2A", "beta=0.1")
    study.baseline()
    study.event("3", "r=4", "failed", error="no memory")
    results = read_study(tmp_path)
    assert [(cell.id, cell.status) for cell in results.cells] == [
        ("1 baseline", "done"),
        ("2A beta=0.1", "done"),
        ("3 r=4", "failed"),
    ]


def test_results_of_an_older_code_version_are_not_the_planned_ones(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("2A", "beta=0.1")
    study.plan[1] = replace(study.plan[1], cell="2A-beta-0-1-ffffffffffff")
    assert [cell.status for cell in study.read().cells] == ["done", "missing"]


def test_a_planned_cell_without_an_id_is_missing(tmp_path: Path) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.missing("2A", "beta=0.1")
    study.plan[1] = replace(study.plan[1], cell="")
    assert [(cell.status, cell.hash) for cell in study.read().cells] == [("done", "0" * 12), ("missing", "")]


Damage = Callable[[Path], Any]


def edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(directory: Path) -> None:
        path = next(directory.glob(file))
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


def swap(file: str, old: str, new: str) -> Damage:
    def damage(directory: Path) -> None:
        text = (directory / file).read_text()
        assert old in text
        (directory / file).write_text(text.replace(old, new))

    return damage


CELL = "cells/2A-*"


@pytest.mark.parametrize(
    "damage, culprit",
    [
        (lambda d: (d / "study.toml").unlink(), "no study.toml"),
        (lambda d: (d / "study.toml").write_text("narrow = "), "not valid TOML"),
        (swap("study.toml", 'stop_rule = "substantive"', 'stop_rule = "any"'), "stop_rule = 'any': must be one of"),
        (swap("study.toml", "stop_rule", "stop_rul"), "did you mean stop_rule"),
        (lambda d: (d / "plan.json").write_text("[]"), "plan.json"),
        (edit("plan.json", lambda plan: plan["cells"].append({"phase": "9"})), "plan.json"),
        (edit("plan.json", lambda plan: plan["cells"].append(plan["cells"][0])), "are both 1 baseline"),
        (edit(f"{CELL}/cell.json", lambda cell: cell.update(name="beta=9")), "planned as"),
        (edit(f"{CELL}/cell.json", lambda cell: cell.pop("seed")), "cell.json"),
        (lambda d: next(d.glob(f"{CELL}/result.json")).unlink(), "result.json"),
        (lambda d: next(d.glob(f"{CELL}/result.json")).write_text('{"base": '), "not valid JSON"),
        (edit(f"{CELL}/result.json", lambda r: r.update(checkpoints=[])), "no checkpoints"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].pop("m1")), "m1 is missing"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(m1=float("nan"))), "m1 = nan"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(m1=1.5)), "not a mean cosine"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(m1_ci95=[0.99, 0.98])), "not an interval"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(step=None)), "no step"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(m1s=0.9)), "did you mean"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(eval_loss="low")), "eval_loss"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(m1_ci95=[0.9])), "m1_ci95"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(m1_ci95=[10**400, 10**400])), "m1_ci95"),
        (edit(f"{CELL}/result.json", lambda r: r["checkpoints"][0].update(eval_loss=10**400)), "eval_loss"),
        (edit(f"{CELL}/result.json", lambda r: r.update(protocol=3)), "protocol must be a table"),
        (edit(f"{CELL}/cell.json", lambda cell: cell.update(notes=True)), "notes = True: must be a list"),
        (edit("frontier.json", lambda f: f["points"][0].update(scale=[0])), "frontier.json"),
        (edit("plan.json", lambda plan: plan["cells"][0].update(cell=7)), "plan.json"),
        (edit("plan.json", lambda plan: plan["cells"][0].update(cell="x" * 5000)), "plan.json"),
        (edit(f"{CELL}/result.json", lambda r: r["protocol"].update(question_set="other")), "question_set"),
        (edit(f"{CELL}/behaviour.json", lambda b: b["sets"]["plain"].update(coherent=999)), "behaviour.json"),
        (edit("frontier.json", lambda f: f["points"][0].pop("m1")), "frontier.json"),
        (edit("frontier.json", lambda f: f.pop("points")), "frontier.json"),
        (edit("scaling.json", lambda f: f["one"].update(scales=0.5)), "one.scales"),
        (edit("scaling.json", lambda f: f["one"].update(scales=[])), "must be numbers from 0 to 1, one a block"),
        (edit("scaling.json", lambda f: f["per_block"].update(scales=[5.0, 0.1])), "must be numbers from 0 to 1"),
        (edit("scaling.json", lambda f: f["one"].update(scales=[0.5])), "must have one number a block each"),
        (lambda d: (d / "calibration.json").write_text("3"), "calibration.json"),
        (lambda d: (d / "ledger.jsonl").write_text('{"time": 3}\n'), "ledger.jsonl: line 1 is not a ledger entry"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_culprit_and_a_mend(
    tmp_path: Path, damage: Damage, culprit: str
) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.cell("2A", "beta=0.1", answers=behaviour(0.0))
    study.event("3", "r=4", "failed")
    study.frontier([(0.0, 0.9, 0.0), (1.0, 0.98, 1.0)])
    study.scaling((0.945, 0.6), (0.945, 0.7))
    study.read()  # as it is, it is read
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        read_study(tmp_path)
    message = str(error.value)
    assert culprit in message and "\n" not in message
    assert any(
        mend in message for mend in ("delete", "name one", "must be", "restore", "not valid TOML", "did you mean")
    )


def test_any_part_may_be_missing(tmp_path: Path) -> None:
    """Whatever is removed, the study is read, and its verdict is one that needs less."""
    full = tmp_path / "full"
    study = SyntheticStudy(full)
    study.baseline()
    study.cell("5A", "95:5", 0.94, 0.95, answers=behaviour(0.0))
    study.file("base/behaviour.json", behaviour(0.0))
    study.frontier([(0.0, 0.9, 0.0), (1.0, 0.98, 1.0)])
    study.scaling((0.945, 0.6), (0.945, 0.7))
    study.event("3", "r=4", "failed")
    study.configure("confirmations=0")
    assert judge_study(study.read()).verdict == "unconfirmed"
    parts = [
        *full.glob("*"),
        *full.glob("cells/*"),
        *full.glob("cells/*/vectors"),
        *full.glob("cells/*/losses"),
        *full.glob("cells/5A*/behaviour.json"),
    ]
    verdicts = {}
    for part in parts:
        if part.name != "study.toml":
            copy = tmp_path / part.relative_to(full).as_posix().replace("/", "-")
            shutil.copytree(full, copy)
            target = copy / part.relative_to(full)
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()
            name = re.sub(r"-0{11}[0-9]", "", part.relative_to(full).as_posix())
            verdicts[name] = judge_study(read_study(copy)).verdict
    assert verdicts == {
        "plan.json": "unconfirmed",
        "ledger.jsonl": "incomplete",  # what failed is now merely missing, in a phase before the passer's
        "frontier": "unconfirmed",
        "frontier.json": "unconfirmed",
        "scaling.json": "unconfirmed",
        "base": "incomplete",
        "cells": "incomplete",
        "cells/1-baseline": "incomplete",
        "cells/5A-95-5": "incomplete",
        "cells/1-baseline/vectors": "unconfirmed",
        "cells/5A-95-5/vectors": "unconfirmed",
        "cells/1-baseline/losses": "unconfirmed",
        "cells/5A-95-5/losses": "unconfirmed",
        "matched": "unconfirmed",
        "cells/5A-95-5/behaviour.json": "incomplete",
    }


def test_final_asserts_that_there_is_a_result() -> None:
    with pytest.raises(AssertionError):
        _ = CellResult("1", "baseline", "", 42, {}, "missing").final


@pytest.mark.parametrize(
    "name, content",
    [
        ("calibration.json", []),
        ("base/behaviour.json", {"sets": []}),
        ("base/instructions.json", {}),
        ("frontier.json", {"points": [3]}),
        ("scaling.json", {"baseline": 3}),
    ],
)
def test_a_file_that_can_be_made_again_is_to_be_deleted_alone(tmp_path: Path, name: str, content: Any) -> None:
    study = SyntheticStudy(tmp_path)
    study.baseline()
    study.read()  # control: without the file nothing is amiss
    study.file(name, content)
    with pytest.raises(UserError) as refused:
        study.read()
    assert str(tmp_path / name) in str(refused.value) and "delete the file" in str(refused.value).replace(
        f"delete {tmp_path / name} and", "delete the file and"
    )
