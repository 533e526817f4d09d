"""Where jobs are carried out on several machines: by Ray, an actor a device, which keeps its model between jobs.

Ray watches the nodes and starts an actor whose node died anew, where there is room for it. The job that it had goes to
the next free device: the actor's own place may not come back, and Ray would hand a call that it repeats to nobody else.

The study's directory, and the one that the study is started in, have to be on a file system that all nodes see.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minipersona.console import Console
from minipersona.errors import Interrupted, UserError
from minipersona.study.executors import Device, lines_to
from minipersona.study.worker import Job, Outcome, Worker
from minipersona.training.distributed import join_process_group
from minipersona.training.interruption import Stop

STOP_SECONDS = 10.0  # in which an actor that lives answers
INHERITED = ("OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # as the commands set them


class RayExecutor:
    """The devices of the cluster at `address` (what ``ray.init`` takes; "auto" is the one of this machine).

    GPUs where the cluster has any and `device` is not "cpu", else CPU cores. Make it before signal handlers are set,
    since Ray sets its own.
    """

    def __init__(self, address: str, device: str, console: Console) -> None:
        try:
            ray.init(address, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"--ray {address}: {first}; start a cluster with ray start --head") from None
        resources = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
        count = gpus or int(resources.get("CPU", 0))
        if not count or (device.startswith("cuda") and not gpus):
            raise UserError(f"--ray {address}: the cluster has no {'GPU' if device.startswith('cuda') else 'CPU'}")
        self.device_type = "cuda" if gpus else "cpu"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._lines = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        self._reader = threading.Thread(target=_pass_on, args=(self._lines, console))
        self._reader.start()
        variables = {name: os.environ[name] for name in INHERITED if name in os.environ}
        actor = ray.remote(max_restarts=-1, concurrency_groups={"control": 1})(_Actor).options(
            num_gpus=1 if gpus else 0, num_cpus=0 if gpus else 1, runtime_env={"env_vars": variables}
        )
        self._devices = [_Seat(actor.remote(os.getcwd(), self.device_type), self._lines) for _ in range(count)]

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    def stop(self) -> None:
        asked = {seat.actor.stop.remote(): seat.actor for seat in self._devices}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=STOP_SECONDS)
        for reference in answered:
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(reference):  # between training steps nothing is lost
                    ray.kill(asked[reference])

    def close(self) -> None:
        for seat in self._devices:
            ray.kill(seat.actor)
        self._lines.put(None)
        self._reader.join()
        ray.shutdown()


class _Seat:
    """The place of an actor, as the driver sees it."""

    def __init__(self, actor: Any, lines: Queue) -> None:
        self.actor, self.label, self._lines = actor, "a node", lines
        self.renew()

    def submit(self, job: Job) -> Future[Outcome]:
        outcome: Future[Outcome] = self.actor.attempt.remote(job, self._lines).future()
        return outcome

    def renew(self) -> None:
        """`ready` is done when Ray has found room for the actor."""
        self.ready: Future[object] = Future()
        self.actor.label.remote().future().add_done_callback(self._arrived)

    def _arrived(self, call: Future[str]) -> None:
        try:
            self.label = call.result()
            self.ready.set_result(None)
        except Exception as error:
            self.ready.set_exception(UserError(f"a worker could not start: {str(error).rstrip().splitlines()[-1]}"))


def _pass_on(lines: Queue, console: Console) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        while (line := lines.get()) is not None:
            console.say(line)


# ---------------------------------------------------------------- within an actor's process


class _Actor:
    """A worker. What comes from the driver while a job is at work is answered in a thread of the control group."""

    def __init__(self, directory: str, device: str) -> None:
        if not os.path.isdir(directory):
            raise UserError(f"{socket.gethostname()} does not see {directory}; start the study in a shared directory")
        os.chdir(directory)
        self._label = f"{socket.gethostname()} {', '.join(map(str, ray.get_gpu_ids())) or os.getpid()}"
        self._stop = Stop()
        self._worker = Worker(join_process_group(device, stop=self._stop), Console(stream=lines_to(self._send)))

    def attempt(self, job: Job, lines: Queue) -> Outcome:
        """Do a job; what is said goes to `lines`."""
        self._lines = lines
        try:
            with self._stop.at_once():
                return self._worker.attempt(job)
        except Interrupted as interrupted:
            return Outcome("interrupted", str(interrupted))

    @ray.method(concurrency_group="control", max_task_retries=-1)
    def label(self) -> str:
        """What the driver calls this worker."""
        return self._label

    @ray.method(concurrency_group="control")
    def stop(self) -> bool:
        """Stop after the training step that is at work; True where none is, so that this process may be killed."""
        try:
            self._stop.note(signal.SIGTERM)
        except Interrupted:
            return True
        return False

    def _send(self, line: str) -> None:
        try:
            self._lines.put(f"[{self._label}] {line.rstrip()}")
        except ray.exceptions.RayError as error:  # the driver has ended; a Console goes on in silence
            raise OSError(str(error)) from None
