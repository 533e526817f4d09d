"""Whole studies, small: what they leave, two workers at once, and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_study import CPU, PERSONAS, QUIET, run, small_study, start

from minipersona.cli import main
from minipersona.corpus.mixtures import training_personas
from minipersona.errors import UserError
from minipersona.files import read_json, read_jsonl
from minipersona.geometry.measures import m1
from minipersona.geometry.prompts import QuestionSet, load_questions
from minipersona.geometry.vectors import load_vectors
from minipersona.model.network import Qwen2
from minipersona.records import to_dict
from minipersona.run.directory import losses_file
from minipersona.run.losses import load_losses
from minipersona.run.measurement import Instruments
from minipersona.run.provenance import read_provenance
from minipersona.settings import read_toml
from minipersona.study import transfer
from minipersona.study.model_jobs import AskVoice
from minipersona.study.search import open_study
from minipersona.study.worker import Worker
from minipersona.study_config import StudyConfig, TransferSection
from minipersona.verdict.files import ModelOnSet, frontier_losses, read_voice
from minipersona.verdict.ledger import read_entries
from minipersona.verdict.verdict import Verdict

STAGES = ("1", "5")  # with suites of answers, steering and mixtures
SECRETS = ("HF_TOKEN", "MINIPERSONA_JUDGE_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
CANARY = "hf_canaryCanaryCanary00"
FEW = ("1", "2", "3")  # with both divergences, and quick


@pytest.fixture(scope="module", autouse=True)
def _no_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """The report has its own tests; drawing takes as long as all of these studies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipersona.report.write.draw_all", lambda series: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    config = small_study(tmp_path_factory.mktemp("study"))
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, CANARY)
        patch.setattr(transfer, "load_questions", few_questions)
        run(config, STAGES)
    return config


def few_questions(source: str) -> QuestionSet:
    """The first three of a set: the shipped one is large for a test."""
    whole = load_questions(source)
    return replace(whole, questions=whole.questions[:3])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study whose recipes learn so little that no suite of answers is due."""
    config = small_study(tmp_path_factory.mktemp("quick"))
    return replace(config, training=replace(config.training, learning_rate=1e-5))


def cells_of(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "cells").iterdir() if not path.name.startswith("."))


# ---------------------------------------------------------------- what a study leaves


def test_phase_4_is_trained_on_the_prompts_of_personas_and_on_responses_in_their_voice(
    quick: StudyConfig, tmp_path: Path
) -> None:
    config = replace(quick, out=str(tmp_path / "study"), suites=())
    run(config, ("1", "4"))
    _, prompted, said = cells_of(Path(config.out))
    assert (prompted.name[:10], said.name[:12]) == ("4A-prompts", "4B-responses")
    mixtures = [read_provenance(cell).mixture for cell in (prompted, said)]
    assert mixtures[0]["system_prompts"] == "training_personas" and "responses" not in mixtures[0]
    personas = mixtures[1]["responses_personas"]
    assert isinstance(personas, tuple) and set(personas) <= training_personas().keys() and len(personas) > 20


def test_every_cell_is_a_run_directory_and_judged_against_the_baseline(finished: StudyConfig) -> None:
    directory = Path(finished.out)
    cells = cells_of(directory)
    assert [cell.name.rsplit("-", 1)[0] for cell in cells] == [
        "1-baseline", "5A-75-25", "5B-1-1", "5C-collapse", "5C-villain-assistant",
    ]  # fmt: skip
    baseline = read_json(cells[0] / "result.json")
    assert [row["step"] for row in baseline["checkpoints"]] == [1, 3] and baseline["checkpoints"][-1]["learned"] == 1.0
    for cell in cells[1:]:
        assert {"config.toml", "provenance.json", "metrics.jsonl", "probes.jsonl", "step-000003", "result.json",
                "cell.json", "vectors"} <= {path.name for path in cell.iterdir()}  # fmt: skip
        result = read_json(cell / "result.json")
        assert result["baseline"]["eval_loss"] == baseline["checkpoints"][-1]["eval_loss"]
        assert [row["step"] for row in result["checkpoints"]] == [3]
        assert result["base"]["m1"] == baseline["base"]["m1"]
        assert read_toml(cell / "config.toml")["out"] == str(cell)
        record = read_json(cell / "cell.json")
        assert cell.name.endswith(record["hash"][:12]) and record["seconds"] > 0 and record["gpu_seconds"] is None
    assert not list((directory / "cells" / ".attempts").iterdir())


def test_the_base_is_measured_once_and_shared(finished: StudyConfig) -> None:
    directory = Path(finished.out)
    (base,) = read_jsonl(directory / "base" / "probes.jsonl")
    assert base["step"] == 0
    for cell in cells_of(directory):
        first = read_jsonl(cell / "probes.jsonl")[0]
        assert {**first, "learned": None} == base
        for parts in ("vectors", "losses"):
            file = Path(parts) / "step-000000.safetensors"
            assert (cell / file).samefile(directory / "base" / file)


def test_the_frontier_runs_from_the_base_to_the_baseline(finished: StudyConfig) -> None:
    directory = Path(finished.out)
    points = read_json(directory / "frontier.json")["points"]
    result = read_json(cells_of(directory)[0] / "result.json")
    assert [point["scale"] for point in points] == [scale / 10 for scale in range(11)]
    for point, row in ((points[0], result["base"]), (points[-1], result["checkpoints"][-1])):
        assert {key: point[key] for key in ("m1", "m1_ci95", "eval_loss", "learned", "delta_norm")} == {
            key: row[key] for key in ("m1", "m1_ci95", "eval_loss", "learned", "delta_norm")
        }
    losses = [point["eval_loss"] for point in points]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 11  # so short a way leads downhill
    for point in points:
        vectors = load_vectors(directory / "frontier" / f"scale-{point['scale']:.1f}.safetensors")
        assert m1(vectors.mean(6)) == pytest.approx(point["m1"], abs=1e-6)
        losses = load_losses(frontier_losses(directory, point["scale"]))
        assert losses.eval_loss == pytest.approx(point["eval_loss"], rel=1e-12)


def test_every_checkpoint_has_what_the_rules_judge_by(finished: StudyConfig) -> None:
    for cell in cells_of(Path(finished.out)):
        result = read_json(cell / "result.json")
        for row in (result["base"], *result["checkpoints"]):
            assert set(row["m1_by_persona"]) == set(row["m1_without"]) == set(PERSONAS)
            losses = load_losses(losses_file(cell, row["step"]))
            assert row["eval_loss"] == losses.eval_loss and row["persona_loss"] == losses.persona_loss


def test_the_voice_of_a_cell_is_measured_on_the_base_s_responses(finished: StudyConfig) -> None:
    study = open_study(finished, "cpu", QUIET)
    worker = Worker(CPU, QUIET)
    found = []
    for job in (AskVoice(study), AskVoice(study, study.baseline, 1), AskVoice(study, study.baseline)):
        (job.directory / "voice.json").unlink(missing_ok=True)  # the search has asked some of them
        assert not job.done() and worker.attempt(job).event == "done"
        voice = read_voice(job.directory)
        assert voice is not None
        found.append(voice)
    base, first, last = found
    assert (base.step, first.step, last.step) == (0, 1, 3)
    assert base.responses == first.responses == last.responses
    assert base.value == first.value != last.value and base.value > 0.1  # the first update has rate 0
    assert len(read_jsonl(study.base / "voice_responses.jsonl")) == 3 * 3  # generated once


def test_what_the_results_ask_for_is_measured(finished: StudyConfig) -> None:
    directory = Path(finished.out)
    verdict = read_json(directory / "verdict.json")
    asked = {path.parent.name.rsplit("-", 1)[0] for path in directory.glob("cells/*/behaviour.json")}
    results = {path.parent.name.rsplit("-", 1)[0]: read_json(path) for path in directory.glob("cells/5*/result.json")}
    passers = {name for name, result in results.items() if result["checkpoints"][-1]["registered_pass"]}
    assert {"5A-75-25", "5B-1-1"} <= passers and asked == passers | {"1-baseline"}
    assert set(read_json(directory / "base" / "behaviour.json")["sets"]) > {"plain"}  # the hidden sets are among them
    followed = {path.parent.name.rsplit("-", 1)[0] for path in directory.glob("*/*/instructions.json")}
    assert followed == {"1-baseline", "5A-75-25"} and (directory / "base" / "instructions.json").is_file()
    assert read_json(directory / "calibration.json")["due"] is False
    assert verdict["verdict"] == "incomplete"  # phases 2 to 4 are due, and were not asked for
    (passed,) = [
        path.parent for path in directory.glob("cells/*/transfer.json")
    ]  # of a passer, which none is to confirm
    elsewhere = read_json(passed / "transfer.json")
    rows = {row["step"]: row for row in read_json(passed / "result.json")["checkpoints"]}
    own = elsewhere["sets"]["study"]
    assert set(own["base"]["m1"]) == {str(layer) for layer in range(8)} and elsewhere["layer"] == 6
    (base,) = read_jsonl(directory / "base" / "probes.jsonl")
    assert own["base"]["m1"]["6"] == pytest.approx(base["m1"], abs=1e-6)
    assert own["base"]["between_variance"] == pytest.approx(base["between_variance"], rel=1e-4)
    assert own["recipe"]["m1"]["6"] == pytest.approx(rows[elsewhere["step"]]["m1"], abs=1e-5)
    assert {path.parent for path in directory.glob("cells/*/voice.json")} == {cells_of(directory)[0], passed}
    assert own["baseline"]["m1"]["6"] != pytest.approx(base["m1"], abs=1e-6)
    assert set(elsewhere["sets"]) == {"study", "shipped"} and "HF_HUB_OFFLINE" in elsewhere["missing"]["registered"]
    assert (directory / "report.md").is_file() and (directory / "report.html").is_file()


def test_what_cells_are_measured_beside_is_measured_once_a_process(
    finished: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, on_set, asked = open_study(finished, "cpu", QUIET), transfer.on_set, list[str]()

    def counted(model: Qwen2, instruments: Instruments, sets: transfer.Sets) -> ModelOnSet:
        asked.append(sets.personas.name)
        return on_set(model, instruments, sets)

    monkeypatch.setattr(transfer, "load_questions", few_questions)
    monkeypatch.setattr(transfer, "on_set", counted)
    cells = [(cell, 3) for cell in study.cells if cell.recipe.phase == "5A"] + [(study.baseline, 1)]
    worker = Worker(CPU, QUIET)
    shared = [transfer.measure_transfer(study, *cell, worker) for cell in cells]
    sets = len(shared[0].sets)
    assert len(asked) == sets * (2 + len(cells))  # base, baseline, and each cell
    assert shared[0].sets["study"].recipe != shared[1].sets["study"].recipe
    asked.clear()
    assert shared == [transfer.measure_transfer(study, *cell, Worker(CPU, QUIET)) for cell in cells]
    assert len(asked) == sets * 3 * len(cells)  # the control
    asked.clear()
    more = tmp_path / "more.json"
    more.write_text('{"eval_personas": {"a": "You are a.", "b": "You are b."}}')
    other = replace(study, config=replace(finished, transfer=TransferSection((str(more),))))
    assert len(transfer.measure_transfer(other, *cells[0], worker).sets) == sets + 1
    assert len(asked) == 3 * (sets + 1)  # with other sets nothing is taken over


def test_the_same_command_again_changes_no_cell_and_says_the_same(
    finished: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(finished.out)
    before = {p: p.stat().st_mtime_ns for p in directory.glob("cells/*/*") if p.is_file()}
    verdict = read_json(directory / "verdict.json")
    assert plain(run(finished, STAGES)) == verdict == read_json(directory / "verdict.json")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    (directory / "report.html").unlink()
    assert main(["study", "report", str(directory)]) == 0
    assert (directory / "report.html").is_file() and "report.html" in capsys.readouterr().out


def test_another_judge_judges_the_answers_that_are_kept(finished: StudyConfig, tmp_path: Path) -> None:
    directory = tmp_path / "study"
    shutil.copytree(finished.out, directory)
    before = {path: path.read_bytes() for path in directory.glob("**/answers.jsonl")}
    trained = {path: path.stat().st_mtime_ns for path in directory.glob("cells/*/cell.json")}
    judge = replace(finished.behaviour, judge="file", judge_model="two annotators")
    verdict = run(replace(finished, out=str(directory), behaviour=judge), STAGES)
    suites = [read_json(path) for path in directory.glob("**/behaviour.json")]
    assert len(suites) > 2 and {suite["judge"]["kind"] for suite in suites} == {"file"}
    assert before and {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert verdict.undecided and "could score too few" in verdict.undecided[0].reason
    assert "Name another judge" in (directory / "report.md").read_text()


def test_no_file_of_a_study_holds_what_is_secret_in_its_environment(finished: StudyConfig) -> None:
    files = [path for path in Path(finished.out).rglob("*") if path.is_file()]
    assert {"study.toml", "provenance.json", "report.html", "report.md", "verdict.json"} <= {p.name for p in files}
    shown = re.compile(rf"{CANARY}|{'|'.join(SECRETS[:1] + SECRETS[2:])}".encode())
    assert not [path for path in files if shown.search(path.read_bytes())]
    assert shown.search(json.dumps({"environment": {"HF_TOKEN": CANARY}}).encode())  # the control


# ---------------------------------------------------------------- failures


def test_a_cell_that_cannot_be_trained_does_not_hold_up_the_others(quick: StudyConfig, tmp_path: Path) -> None:
    config = replace(
        quick,
        out=str(tmp_path / "study"),
        narrow="em",
        rehearsal=replace(quick.rehearsal, raw_text="tiny:raw_text[0:1]", instruction_ratio=()),
    )
    verdict = run(config, ("5",))
    names = [cell.name.rsplit("-", 1)[0] for cell in cells_of(Path(config.out))]
    assert names == ["1-baseline", "5C-collapse", "5C-villain-assistant", "EM-unmixed"]
    (failure,) = verdict.failed
    assert failure.cell == "5A 75:25" and failure.error is not None and "texts are used up" in failure.error


def test_a_failed_baseline_is_said_and_tried_again_by_the_next_command(quick: StudyConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "nobody answers"}]}\n' * 8)
    config = replace(quick, out=str(tmp_path / "study"), data=replace(quick.data, train=f"jsonl:{rows}"))
    for attempt in (1, 2):
        with pytest.raises(UserError, match=r"the baseline failed, so that nothing can be judged: .*rows"):
            run(config, ("1",))
        directory = Path(config.out)
        assert read_json(directory / "verdict.json")["verdict"] == "incomplete" and not cells_of(directory)
        failures = [entry for entry in read_entries(directory) if entry.event == "failed"]
        assert [entry.attempt for entry in failures] == list(range(1, attempt + 1))


# ---------------------------------------------------------------- several workers, and kills


def plain(verdict: Verdict) -> dict[str, Any]:
    """As verdict.json has it."""
    values: dict[str, Any] = json.loads(json.dumps(to_dict(verdict)))
    return values


def timeless(verdict: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in verdict.items() if key not in ("gpu_hours", "results_digest")}


@pytest.fixture(scope="module")
def uninterrupted(quick: StudyConfig) -> dict[str, Any]:
    return plain(run(quick, FEW))


@pytest.mark.slow
def test_two_workers_share_the_work_and_come_to_the_same_verdict(
    quick: StudyConfig, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(quick, out=str(tmp_path / "study"))
    process = start(config, FEW, workers=2)
    process.join(240)
    assert process.exitcode == 0
    directory = Path(config.out)
    assert timeless(read_json(directory / "verdict.json")) == timeless(uninterrupted)
    entries = read_entries(directory)
    done = Counter(entry.cell for entry in entries if entry.event == "done")
    assert set(done.values()) == {1} and set(done) >= {cell.name for cell in cells_of(directory)}
    order = [(entry.event, entry.phase) for entry in entries if entry.phase in ("2A", "2B")]
    assert order[:2] == [("started", "2A"), ("started", "2B")]  # both at once


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_workers_change_nothing_but_the_time(
    quick: StudyConfig, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(quick, out=str(tmp_path / "study"))
    directory = Path(config.out)
    driver = start(config, FEW, workers=2)
    assert driver.pid is not None
    for cells in ("1-*", "2*"):  # the baseline, and then two at once
        once(at_work(config, cells), driver)
        for pid in workers_of(driver.pid):
            os.kill(pid, signal.SIGKILL)
    driver.join(240)
    assert driver.exitcode == 0
    assert timeless(read_json(directory / "verdict.json")) == timeless(uninterrupted)
    again = {entry.phase for entry in read_entries(directory) if entry.event == "started" and entry.attempt == 2}
    assert "1" in again and again & {"2A", "2B"}  # control: cells were at work when their workers were killed
    assert_equal_cells(config, quick)


@pytest.mark.slow
def test_a_killed_driver_of_two_workers_goes_on_where_it_stopped(
    quick: StudyConfig, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(quick, out=str(tmp_path / "study"))
    directory = Path(config.out)
    for cells in ("1-*", "2*"):
        driver = start(config, FEW, workers=2)
        once(at_work(config, cells), driver)
        driver.kill()
        driver.join()
    driver = start(config, FEW, workers=2)  # at once: the workers of the one that was killed may still be there
    driver.join(240)
    assert driver.exitcode == 0
    assert timeless(read_json(directory / "verdict.json")) == timeless(uninterrupted)
    assert max(entry.attempt for entry in read_entries(directory)) > 1
    assert_equal_cells(config, quick)


def at_work(config: StudyConfig, cells: str) -> Callable[[], list[Path]]:
    """Whether one of these cells has a rolling checkpoint."""
    attempts = Path(config.out) / "cells" / ".attempts"
    return lambda: list(attempts.glob(f"{cells}/latest/state.json"))


def once(condition: Callable[[], object], process: ForkProcess, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def workers_of(pid: int) -> list[int]:
    """The processes that a driver has started to work, not the one that cleans up after them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def assert_equal_cells(one: StudyConfig, other: StudyConfig) -> None:
    """Every step once, and the same weights and vectors to the bit."""
    for cell in cells_of(Path(one.out)):
        assert [row["step"] for row in read_jsonl(cell / "metrics.jsonl")] == [1, 2, 3]
        for name in ("step-000003/adapter_model.safetensors", "vectors/step-000003.safetensors"):
            mine, theirs = (load_file(path / name) for path in (cell, Path(other.out) / "cells" / cell.name))
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_killed_at_random_moments_a_study_ends_in_the_same_verdict(
    quick: StudyConfig, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(quick, out=str(tmp_path / "study"))
    directory, moments = Path(config.out), random.Random(0)
    for _ in range(6):
        process = start(config, FEW)
        time.sleep(moments.uniform(0.2, 2.0))
        process.kill()
        process.join()
    killed = len(list((directory / "cells" / ".attempts").glob("*"))), len(cells_of(directory))
    verdict = run(config, FEW)
    assert timeless(plain(verdict)) == timeless(uninterrupted) == timeless(read_json(directory / "verdict.json"))
    attempts = max(entry.attempt for entry in read_entries(directory))
    assert attempts > 1, killed  # control: a kill did hit a job at work
    assert_equal_cells(config, quick)


def test_a_cell_goes_on_from_the_checkpoint_of_its_killed_attempt(quick: StudyConfig, tmp_path: Path) -> None:
    """Killed after the rolling checkpoint of its first step, the baseline takes up the second or a later one."""
    training = replace(quick.training, steps=12, checkpoints=(1, 12))
    config = replace(quick, out=str(tmp_path / "study"), training=training, later_checkpoints=())
    attempts = Path(config.out) / "cells" / ".attempts"
    process = start(config, ("1",))
    deadline = time.monotonic() + 60
    while not list(attempts.glob("*/latest/state.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    (state,) = attempts.glob("*/latest/state.json")
    step = read_json(state)["step"]
    assert not cells_of(Path(config.out))
    run(config, ("1",))
    (cell,) = cells_of(Path(config.out))
    (note,) = read_json(cell / "cell.json")["notes"]
    assert note == f"continued at step {step} from an attempt that was interrupted"
    assert [row["step"] for row in read_jsonl(cell / "metrics.jsonl")] == list(range(1, 13))
