"""The engine and its executors: what becomes of a job that fails or whose worker dies, and who works on what."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import study_jobs
import torch
from forking import FORKING
from hypothesis import given
from hypothesis import strategies as st
from small_study import CPU, QUIET, small_study
from study_jobs import FileJob, TalkingJob

from minipersona.config import ObjectiveSection, RunConfig
from minipersona.console import Console
from minipersona.errors import DiskFull, Interrupted, UserError
from minipersona.files import read_jsonl
from minipersona.locks import lock
from minipersona.study import executors
from minipersona.study import worker as worker_module
from minipersona.study.cell import Study, hash_cells
from minipersona.study.engine import ATTEMPTS, Defect, Engine
from minipersona.study.executors import Executor, InProcess, Processes, lines_to
from minipersona.study.jobs import TrainCell
from minipersona.study.recipes import planned
from minipersona.study.worker import Job, Title
from minipersona.training.interruption import Stop, handle_signals
from minipersona.verdict.ledger import LEDGER, LedgerEntry, append, read_entries


@pytest.fixture
def study(tmp_path: Path) -> Study:
    config = small_study(tmp_path)
    directory = Path(config.out)
    directory.mkdir()
    return Study(config, directory, hash_cells(planned(config)))


@pytest.fixture
def here() -> Executor:
    return InProcess(CPU, QUIET)


@pytest.fixture(autouse=True)
def _forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked, not spawned as in `test_study_run.py` and `test_study_command.py`."""
    monkeypatch.setattr(executors, "multiprocessing", SimpleNamespace(get_context=lambda method: FORKING))


@contextlib.contextmanager
def two_processes(console: Console = QUIET) -> Iterator[Processes]:
    with contextlib.closing(Processes(["cpu", "cpu"], console, threads=1)) as executor:
        yield executor


def engine_of(study: Study, executor: Executor, console: Console = QUIET) -> Engine:
    """That of a new command."""
    return Engine(study, executor, console, study.cells)


def events(study: Study) -> list[tuple[str, str, int]]:
    return [(entry.cell, entry.event, entry.attempt) for entry in read_entries(study.directory)]


def raises(error: Exception) -> Callable[[FileJob], None]:
    def work(job: FileJob) -> None:
        raise error

    return work


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------- what becomes of a job


def test_a_failed_job_is_recorded_and_the_rest_goes_on(study: Study, here: Executor) -> None:
    bad = FileJob(study, "bad", raises(UserError("this cannot be done")))
    jobs = [FileJob(study, "one"), bad, FileJob(study, "two")]
    engine = engine_of(study, here)
    engine.complete(jobs)
    engine.complete(jobs)
    assert jobs[0].done() and jobs[2].done() and len(bad.attempts()) == 1
    assert engine.failures == {"bad": "this cannot be done"}
    assert events(study) == [(name, event, 1) for name in ("one", "bad", "two")
                             for event in ("started", "failed" if name == "bad" else "done")]  # fmt: skip
    assert [entry.error for entry in read_entries(study.directory) if entry.error] == ["this cannot be done"]
    again = engine_of(study, here)  # the next command tries it once more
    again.complete(jobs)
    assert len(bad.attempts()) == 2 and events(study)[-1] == ("bad", "failed", 2)


def test_running_out_of_memory_is_a_failure_and_a_defect_is_one_too_but_ends_the_study(
    study: Study, here: Executor
) -> None:
    engine = engine_of(study, here)
    keep = here._worker.resources.keep  # type: ignore[attr-defined]
    kept = keep("states", 1, object)
    engine.complete([FileJob(study, "large", raises(torch.OutOfMemoryError("CUDA"))), FileJob(study, "fine")])
    assert "pack_tokens" in engine.failures["large"] and FileJob(study, "fine").done()
    assert keep("states", 1, object) is not kept  # the device's memory is free for the next job
    with pytest.raises(Defect, match=r"3 defect: ZeroDivisionError: oh\n\nTraceback(.|\n)*in divide\n"):
        engine.complete([FileJob(study, "defect", study_jobs.divide), FileJob(study, "next")])
    assert engine.failures["defect"] == "ZeroDivisionError: oh" and not FileJob(study, "next").done()


def test_a_job_that_leaves_nothing_behind_is_a_defect(study: Study, here: Executor) -> None:
    class Forgetful(FileJob):
        def carry_out(self, worker: object) -> None:
            pass

    with pytest.raises(Defect, match="forgetful left nothing behind"):
        engine_of(study, here).complete([Forgetful(study, "forgetful")])


def test_a_full_disk_is_no_verdict_on_a_job_and_the_next_command_does_it(study: Study, here: Executor) -> None:
    engine = engine_of(study, here)
    full = FileJob(study, "large", raises(DiskFull("cannot write x: No space left on device")))
    with pytest.raises(DiskFull, match="No space left on device"):
        engine.complete([full, FileJob(study, "next")])
    assert engine.failures == {} and not FileJob(study, "next").done()
    engine_of(study, here).complete([FileJob(study, "large"), FileJob(study, "next")])
    assert events(study) == [("large", "started", 1), ("large", "started", 2), ("large", "done", 2),
                             ("next", "started", 1), ("next", "done", 1)]  # fmt: skip


# ---------------------------------------------------------------- workers that die


def test_a_job_whose_worker_is_killed_is_done_again_and_no_other_notices(study: Study) -> None:
    jobs = [FileJob(study, "killed", study_jobs.die_once), *(FileJob(study, f"job-{n}") for n in range(4))]
    with two_processes() as executor:
        engine = engine_of(study, executor)
        engine.complete(jobs)
    assert all(job.done() for job in jobs) and engine.failures == {}
    assert len(jobs[0].attempts()) == 2 and [len(job.attempts()) for job in jobs[1:]] == [1] * 4
    assert [entry for entry in events(study) if entry[0] == "killed"] == [
        ("killed", "started", 1), ("killed", "started", 2), ("killed", "done", 2),
    ]  # fmt: skip


def test_a_worker_that_dies_without_a_job_is_replaced(study: Study) -> None:
    jobs = [FileJob(study, name) for name in ("before", "after")]
    with two_processes() as executor:
        engine = engine_of(study, executor)
        engine.complete(jobs[:1])
        (pid,) = jobs[0].attempts()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid))
        time.sleep(0.5)  # the pool notices, or does not yet
        engine.complete(jobs[1:])
    assert jobs[1].done() and engine.failures == {} and pid not in jobs[1].attempts()


def test_a_job_that_kills_every_worker_fails_with_that_reason_and_the_rest_goes_on(study: Study) -> None:
    deadly, stopped, fine = (
        FileJob(study, "deadly", study_jobs.die),
        FileJob(study, "stopped", study_jobs.stopped_once),  # by a signal to its process alone
        FileJob(study, "fine"),
    )
    with two_processes() as executor:
        engine = engine_of(study, executor)
        engine.complete([deadly, stopped, fine])
    assert fine.done() and stopped.done() and len(stopped.attempts()) == 2
    assert len(set(deadly.attempts())) == ATTEMPTS == 3
    assert set(engine.failures) == {"deadly"} and engine.failures["deadly"].startswith(
        "its worker died (BrokenProcessPool), 3 times;"
    )


def test_a_defect_in_a_process_ends_the_study_with_its_traceback_and_stops_the_other_job(study: Study) -> None:
    long, defect = FileJob(study, "long", study_jobs.last_long), FileJob(study, "defect", study_jobs.divide)
    began = time.monotonic()
    with two_processes() as executor:
        engine = engine_of(study, executor)
        engine.complete([FileJob(study, "first"), FileJob(study, "second")])
        with pytest.raises(Defect, match=r"ZeroDivisionError: oh\n\nTraceback(.|\n)*study_jobs.py(.|\n)*in divide\n"):
            engine.complete([long, defect])
    assert time.monotonic() - began < 50
    assert long.attempts() == [] or long.path.with_suffix(".interrupted").exists()
    assert ("defect", "failed", 1) in events(study) and ("long", "failed", 1) not in events(study)


@pytest.mark.parametrize("stops", [True, False])
def test_a_worker_that_hangs_when_it_is_asked_to_stop_is_ended(stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen from the thread that obeys; one whose driver says nothing waits for as long as it takes."""
    done: list[str] = []
    monkeypatch.setattr(executors, "PATIENCE", 0.05)
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append(f"{number.name} {pid == os.getpid()}"))
    monkeypatch.setattr(os, "_exit", lambda status: done.append(f"ended with {status}"))
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=executors._obey, args=(theirs,))
    thread.start()
    if stops:
        ours.send_bytes(b"stop")
        thread.join(10)
        assert done == ["SIGTERM True", f"ended with {os.EX_TEMPFAIL}"]
    else:
        thread.join(0.5)
        assert thread.is_alive() and done == []
        ours.close()  # the driver has ended
        thread.join(10)
        assert done == [f"ended with {os.EX_TEMPFAIL}"]


def test_a_signal_to_the_driver_stops_the_jobs_of_its_processes(study: Study) -> None:
    jobs = [FileJob(study, name, study_jobs.last_long) for name in ("left", "right")]
    stop = Stop()

    def signalled() -> None:
        until(lambda: all(job.attempts() for job in jobs))
        os.kill(os.getpid(), signal.SIGTERM)

    sender, said = threading.Thread(target=signalled), io.StringIO()
    with two_processes() as executor, handle_signals(stop):
        sender.start()
        with pytest.raises(Interrupted, match="SIGTERM"), stop.at_once():
            engine_of(study, executor, Console(stream=said)).complete(jobs)
    sender.join()
    assert "waiting until the jobs at work have ended their step: " in said.getvalue()
    assert all(job.path.with_suffix(".interrupted").exists() for job in jobs)
    assert {event for _, event, _ in events(study)} == {"started"}


def _drive(study: Study) -> None:
    with two_processes() as executor:
        engine_of(study, executor).complete([FileJob(study, "long", study_jobs.last_long)])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # nobody may be there to reap it
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or before it is read
        return False


def free(directory: Path) -> bool:
    try:
        with lock(directory):
            return True
    except UserError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_ends_with_its_driver_and_lets_go_of_its_job(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "multiprocessing", multiprocessing)  # the server is no child of a forked driver
    driver = multiprocessing.get_context("fork").Process(target=_drive, args=(study,))
    driver.start()
    job = FileJob(study, "long", study_jobs.last_long)
    until(job.attempts)
    (pid,) = job.attempts()
    assert alive(pid)
    driver.kill()
    driver.join()
    until(lambda: not alive(pid), seconds=10)
    until(lambda: free(study.attempts / "long.lock"), seconds=10)  # its last thread may take a moment longer


# ---------------------------------------------------------------- one worker a job


def test_a_job_that_another_process_has_is_waited_for_and_not_done_twice(study: Study, here: Executor) -> None:
    """As after a kill of the driver alone: a worker is about to finish its job when the next command comes to it."""
    job = FileJob(study, "job")
    said = io.StringIO()
    held, over = threading.Event(), threading.Event()

    def other() -> None:
        with lock(study.attempts / "job.lock"):
            held.set()
            over.wait()
            job.path.touch()

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    threading.Timer(1.0, over.set).start()
    engine_of(study, InProcess(CPU, Console(stream=said))).complete([job])
    thread.join()
    assert job.done() and job.attempts() == []
    assert f"job.lock is in use by pid {os.getpid()} on" in said.getvalue() and said.getvalue().count("waiting") == 1
    assert events(study)[-1] == ("job", "done", 1)


def test_a_lock_that_is_never_given_back_fails_the_job(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "PATIENCE", 0.2)
    engine = engine_of(study, InProcess(CPU, QUIET))
    with lock(study.attempts / "job.lock"):
        engine.complete([FileJob(study, "job")])
    assert "is in use by pid" in engine.failures["job"]


# ---------------------------------------------------------------- what is said


def test_every_line_of_a_worker_arrives_with_its_label(study: Study) -> None:
    said = io.StringIO()
    console = Console(stream=said)
    jobs = [FileJob(study, f"job-{n}", study_jobs.die_once) for n in range(3)]  # killed right after they spoke
    with two_processes(console) as executor:
        engine_of(study, executor, console).complete(jobs)
    lines = said.getvalue().splitlines()
    for job in jobs:
        heard = [line for line in lines if line.endswith(f"{job.file} is at work")]
        assert len(heard) == 2 and all(line.startswith(("[cpu (1)] ", "[cpu (2)] ")) for line in heard)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_worker_is_heard_out_where_its_words_cannot_be_said(study: Study) -> None:
    """Its pipe would fill up otherwise, and hold it up."""
    with open("/dev/full", "w") as full, two_processes(Console(stream=full)) as executor:
        engine_of(study, executor).complete([TalkingJob(study, "talks")])
    assert FileJob(study, "talks").done()


@dataclass(frozen=True)
class KindJob(FileJob):
    @property
    def kind(self) -> str:
        return self.file[0].strip("-")


def test_a_device_goes_on_with_the_kind_that_it_began(study: Study, here: Executor) -> None:
    """Four seeds of two recipes, as fresh seeds fall due, and a job of no kind: none waits for a device in vain."""
    engine = Engine(study, here, QUIET, [])
    waiting: deque[Job] = deque(KindJob(study, name) for name in ("A1", "A2", "A3", "B1", "B2", "-1"))
    devices = {label: SimpleNamespace(label=label) for label in "abc"}
    taken = [(label, engine._next(waiting, devices[label]).id) for label in "abaabc" if waiting]  # type: ignore[arg-type]
    assert taken == [("a", "A1"), ("b", "B1"), ("a", "A2"), ("a", "A3"), ("b", "B2"), ("c", "-1")]
    waiting.extend(KindJob(study, name) for name in ("A4", "A5"))
    assert engine._next(waiting, devices["c"]).id == "A4"  # type: ignore[arg-type]  # rather than be idle


def test_what_shares_graphs_is_of_one_kind(study: Study) -> None:
    """Seeds, learning rates and strengths of an anchor do; ranks and strengths of KL to the base do not."""
    kinds = {cell.recipe.name: TrainCell(study, cell).kind for cell in study.cells}
    config = study.baseline.recipe.config
    faster = replace(config, seed=43, training=replace(config.training, learning_rate=1.0))

    def kind(config: RunConfig) -> str:
        return TrainCell(study, replace(study.baseline, recipe=replace(study.baseline.recipe, config=config))).kind

    assert kind(faster) == kinds["baseline"]
    anchors = [
        ObjectiveSection("feature_anchor", w, anchor_layers=layers) for w, layers in ((1, (2,)), (3, (2,)), (1, ()))
    ]
    weak, strong, elsewhere = (kind(replace(config, objective=anchor)) for anchor in anchors)
    assert weak == strong != elsewhere and weak != kinds["baseline"]
    strengths = [kind for name, kind in kinds.items() if name.startswith("beta=")]
    assert len({kinds["baseline"], *strengths}) == 1 + len(strengths) > 1


def test_a_line_says_which_cell_it_is_and_what_is_left(study: Study) -> None:
    said = io.StringIO()
    console = Console(stream=said)

    class Renamed(FileJob):
        @property
        def title(self) -> Title:
            return Title(study.cells[1].id, "3", self.file)

        @property
        def path(self) -> Path:
            return study.cell_directory(study.cells[1]) / "cell.json"

    study.cell_directory(study.cells[1]).mkdir(parents=True)
    engine_of(study, InProcess(CPU, QUIET), console).complete([Renamed(study, "beta=0.1"), FileJob(study, "frontier")])
    count = len(study.cells)
    assert said.getvalue().splitlines() == [
        f"cell 2 of {count}, 3 beta=0.1: started on cpu",
        f"cell 2 of {count}, 3 beta=0.1: done in 0 seconds; 1 of {count} cells done, {count - 1} left, about 0 seconds",
        "frontier: started on cpu",
        f"frontier: done in 0 seconds; 1 of {count} cells done, {count - 1} left, about 0 seconds",
    ]


def test_a_stream_of_lines_is_no_terminal_and_goes_on_in_silence() -> None:
    heard: list[str] = []
    console = Console(stream=lines_to(heard.append))
    console.say("one")
    with console.progress("training", 3, "steps") as progress:
        progress.advance(1)
    assert heard == ["one\n"]

    def gone(line: str) -> None:
        raise BrokenPipeError

    Console(stream=lines_to(gone)).say("nobody hears this")


# ---------------------------------------------------------------- the ledger


@given(cut=st.integers(1, 200))
def test_a_torn_last_line_of_the_ledger_is_left_out(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("ledger")
    entries = [LedgerEntry(float(n), f"cell-{n}", "3", "é", "started", 1) for n in range(3)]
    for entry in entries:
        append(directory, entry)
    file = directory / LEDGER
    before = file.read_bytes()
    after = before[: max(0, len(before) - cut)]
    file.write_bytes(after)
    assert read_entries(directory) == entries[: after.count(b"\n")]
    append(directory, entries[0])  # and the next line does not run into it
    assert read_entries(directory) == [*entries[: after.count(b"\n")], entries[0]]


def test_a_ledger_line_has_the_keys_of_an_entry(tmp_path: Path) -> None:
    append(tmp_path, LedgerEntry(1.0, "1-x", "1", "x", "failed", 2, "no luck \ud800"))
    assert read_jsonl(tmp_path / LEDGER) == [
        {"time": 1.0, "cell": "1-x", "phase": "1", "name": "x", "event": "failed", "attempt": 2,
         "error": "no luck \ud800"},
    ]  # fmt: skip
