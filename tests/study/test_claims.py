"""Claims: one owner a job, and expired owners are outbid."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

from minipersona.study import claims as module
from minipersona.study.claims import Claims, Lost
from minipersona.study.runner import runner_name


def test_one_of_two_runners_gets_a_job_and_the_other_gets_it_when_it_is_released(tmp_path: Path) -> None:
    mine, theirs = Claims(tmp_path, "a"), Claims(tmp_path, "b")
    with mine.take("job") as first:
        assert first is not None and first.attempt == 1
        with theirs.take("job") as second, theirs.take("another") as other:
            assert second is None and other is not None
        first.check()
    with theirs.take("job") as second:
        assert second is not None and second.attempt == 2


def _take(directory: Path, number: int, wins: Path) -> None:
    with Claims(directory, f"runner-{number}").take("job") as claim:
        if claim is not None:
            (wins / str(number)).touch()
            time.sleep(1.0)  # longer than the others take to look


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    wins = tmp_path / "wins"
    wins.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_take, args=(tmp_path / "claims", n, wins)) for n in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(wins.iterdir())) == 1


def test_an_owner_who_fell_silent_is_outbid_and_learns_it_when_it_wakes_up(tmp_path: Path) -> None:
    sleepy = Claims(tmp_path, "sleepy", beat=60, expires=60)
    patient, impatient = Claims(tmp_path, "patient", expires=60), Claims(tmp_path, "impatient", expires=0.05)
    with sleepy.take("job") as old:
        assert old is not None
        time.sleep(0.1)
        with patient.take("job") as early:
            assert early is None  # control: it has not been silent for long enough
        old.check()
        with impatient.take("job") as new:
            assert new is not None and new.attempt == 2
            new.check()
            with pytest.raises(Lost):
                old.check()
    with patient.take("job") as third:  # the old owner's release gave nothing away, the new one's did
        assert third is not None and third.attempt == 3


def test_a_release_by_a_lost_owner_does_not_free_the_job(tmp_path: Path) -> None:
    sleepy, other = Claims(tmp_path, "sleepy", beat=60), Claims(tmp_path, "other", expires=0.0)
    with sleepy.take("job") as old, other.take("job") as new:
        assert old is not None and new is not None
        old.release()
        with Claims(tmp_path, "third").take("job") as third:
            assert third is None


def test_signs_of_life_keep_a_claim(tmp_path: Path) -> None:
    lively = Claims(tmp_path, "lively", beat=0.05, expires=60)
    with lively.take("job") as claim:
        assert claim is not None
        time.sleep(0.6)
        with Claims(tmp_path, "other", expires=0.4).take("job") as other:
            assert other is None


def test_the_claim_of_a_dead_process_of_this_host_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"runner": "x", "host": socket.gethostname(), "pid": _dead_pid(), "time": time.time()}
    (tmp_path / "job.1").write_text(json.dumps(owner))
    (tmp_path / "far.1").write_text(json.dumps({**owner, "host": "elsewhere"}))
    (tmp_path / "torn.1").write_text('{"runner": "x", "ho')  # killed while it wrote its name
    claims = Claims(tmp_path, "me")
    with claims.take("job") as claim:
        assert claim is not None and claim.attempt == 2
    for name in ("far", "torn"):  # control: of these nobody can know
        with claims.take(name) as claim:
            assert claim is None
    for name, age, held in (("far", module.UNSIGNED + 1, True), ("torn", module.UNSIGNED + 1, False)):
        os.utime(tmp_path / f"{name}.1", (time.time() - age,) * 2)
        with claims.take(name) as claim:
            assert (claim is None) is held
    # In a container the number of a dead process comes round to us.
    (tmp_path / "again.1").write_text(json.dumps({**owner, "pid": os.getpid(), "time": module._STARTED - 1}))
    with claims.take("again") as claim:
        assert claim is not None


def _dead_pid() -> int:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    assert process.pid is not None
    return process.pid


# ---------------------------------------------------------------- names


def test_no_two_runners_have_one_name() -> None:
    assert len({runner_name() for _ in range(50)}) == 50
