"""Processes that are forked from a server, which imports torch and the package once for all of a test run.

A process that is started anew takes three seconds of a core to import them. For tests whose processes are many and
about something else; what a command starts by itself has tests of its own.
"""

from __future__ import annotations

import multiprocessing

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.run", "minipersona.study.executors", "minipersona.training.loop"]
)
