"""A study on a Ray cluster: two nodes on this machine, of which one is killed while it works."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_study import run, small_study

from minipersona.console import Console
from minipersona.errors import Interrupted, UserError
from minipersona.files import read_json
from minipersona.records import to_dict
from minipersona.study.search import run_study
from minipersona.study_config import StudyConfig
from minipersona.training.interruption import Stop, handle_signals
from minipersona.verdict.ledger import read_entries

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it sends nothing to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nodes are at 127.0.0.1, where nobody else can reach them
    "RAY_worker_niceness": "0",  # beside other tests, workers that step back get nowhere
}
with pytest.MonkeyPatch.context() as patch:
    for name, value in SETTINGS.items():
        patch.setenv(name, value)  # some are read when Ray is imported
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from minipersona.study.ray_executor import RayExecutor

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")]
STAGES = ("1", "2")
TIMES = ("gpu_hours", "results_digest")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head and a second node, of one core each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        here = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        made = Cluster(initialize_head=True, head_node_args=here)
        made.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            signal.signal(signal.SIGTERM, handler)


def config_in(directory: Path) -> StudyConfig:
    config = small_study(directory)
    training = replace(config.training, learning_rate=1e-5, steps=10, checkpoints=(1, 10))
    return replace(config, training=training, later_checkpoints=(10,))


def timeless(verdict: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in verdict.items() if key not in TIMES}


def at_work(config: StudyConfig, cells: str) -> int:
    """How many of these cells have taken a step."""
    return len(list((Path(config.out) / "cells" / ".attempts").glob(f"{cells}/metrics.jsonl")))


def parent(pid: int) -> int:
    """The process that started another; 0 where that has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


def once(condition: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    """Do something once a condition holds, beside what goes on here."""

    def wait() -> None:
        deadline = time.monotonic() + 200
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_node_that_is_killed_while_it_works_changes_nothing_but_the_time(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minipersona.report.write.draw_all", lambda series: None)
    config = config_in(tmp_path)
    undisturbed = run(replace(config, out=str(tmp_path / "undisturbed")), STAGES)
    said = io.StringIO()
    console = Console(stream=said)
    (second,) = cluster.worker_nodes
    raylet = second.all_processes["raylet"][0].process.pid

    def second_works() -> bool:
        """Whether a cell of phase 2 has taken a step on the second node."""
        begun = re.findall(r", (2[AB]) .*: started on \S+ (\d+)\n", said.getvalue())
        return any(parent(int(pid)) == raylet and at_work(config, f"{phase}-*") for phase, pid in begun)

    with contextlib.closing(RayExecutor(cluster.address, "cpu", console)) as executor:
        assert executor.device_type == "cpu" and len(executor.devices) == 2
        killer = once(second_works, lambda: cluster.remove_node(second, allow_graceful=False))
        verdict = run_study(config, executor, console, stages=STAGES)
        killer.join()
    stored, expected = (read_json(Path(c) / "verdict.json") for c in (config.out, tmp_path / "undisturbed"))
    assert timeless(to_dict(verdict)) == timeless(to_dict(undisturbed))
    assert timeless(stored) == timeless(expected)
    again = [entry for entry in read_entries(Path(config.out)) if entry.event == "started" and entry.attempt == 2]
    assert [entry.phase in ("2A", "2B") for entry in again] == [True]
    lines = said.getvalue().splitlines()
    assert sum("its worker died (" in line for line in lines) == 1
    labels = {line.split("] step 10: M1")[0] for line in lines if "] step 10: M1" in line}
    assert labels and all(label.startswith("[") for label in labels)
    for cell in read_json(Path(config.out) / "plan.json")["cells"][:3]:
        steps = (Path(config.out) / "cells" / cell["cell"] / "metrics.jsonl").read_text().count("\n")
        assert steps == 10


def test_a_signal_to_the_driver_stops_the_workers_after_their_step(cluster: Any, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config = replace(config, training=replace(config.training, steps=2000, checkpoints=(2000,)), later_checkpoints=())
    console, stop = Console(quiet=True), Stop()
    executor = RayExecutor(cluster.address, "cpu", console)
    sender = once(lambda: at_work(config, "1*"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with (
        pytest.raises(Interrupted, match="SIGTERM"),
        handle_signals(stop),
        contextlib.closing(executor),
        stop.at_once(),
    ):
        run_study(config, executor, console, stages=("1",))
    sender.join()
    (state,) = Path(config.out).glob("cells/.attempts/*/latest/state.json")
    steps = (state.parents[1] / "metrics.jsonl").read_text().count("\n")
    assert read_json(state)["step"] == steps < 2000
    assert [entry.event for entry in read_entries(Path(config.out)) if entry.name == "baseline"] == ["started"]


def test_an_address_without_a_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/nonexistent")
    with pytest.raises(UserError, match=r"--ray auto: .*; start a cluster with ray start --head") as refused:
        RayExecutor("auto", "cpu", Console(quiet=True))
    assert "\n" not in str(refused.value)
