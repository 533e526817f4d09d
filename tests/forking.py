"""Processes that are forked from a server, which imports torch and the package once for all of a test run.

A process that is started anew takes three seconds of a core to import them. For tests whose processes are many and
about something else; what a command starts by itself has tests of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.run", "minipersona.study.executors", "minipersona.training.loop"]
)


def run_code(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """As ``python -c CODE ARGUMENTS``, in the repository's root, with the environment given or this process's."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        given = dict(os.environ if environment is None else environment)
        process = FORKING.Process(target=_run, args=(code, arguments, given, *map(str, streams)))
        process.start()
        process.join(120)
        try:
            assert process.exitcode is not None, f"the code runs for more than two minutes:\n{code}"
            return CompletedProcess([code, *arguments], process.exitcode, *(path.read_text() for path in streams))
        finally:
            process.kill()
            process.join()


def _run(code: str, arguments: tuple[str, ...], environment: dict[str, str], out: str, err: str) -> None:
    assert "huggingface_hub" not in sys.modules  # it reads its environment once, when it is imported
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(Path(__file__).parents[1])
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
