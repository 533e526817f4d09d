"""Requests to stop: signals are noted when they come and obeyed where the same command can take the work up again.

SIGINT is the terminal's, SIGTERM that of schedulers and launchers, SIGUSR1 the warning that SLURM gives some time
before the end (`#SBATCH --signal=USR1@120`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from minipersona.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 1.0  # seconds: a scheduler and a launcher that both pass a signal on have asked once


class Stop:
    """Whether this process was asked to stop, and whether it does so wherever it is or where it looks.

    Work that leaves nothing half done behind is left at once: a signal raises Interrupted in the midst of it. In the
    other mode it is noted only, and `check` raises it.
    """

    def __init__(self) -> None:
        self.signal = ""  # the name of the first one that came
        self._at_once = False

    @property
    def asked(self) -> bool:
        """True once a signal has come."""
        return bool(self.signal)

    def check(self) -> None:
        """Raise Interrupted where it was asked for."""
        if self.asked:
            raise Interrupted(f"stopped by {self.signal}")

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Within this context a signal raises Interrupted; so does entering it after one."""
        return self._mode(at_once=True)

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        """Within this context a signal is noted only."""
        return self._mode(at_once=False)

    @contextlib.contextmanager
    def _mode(self, at_once: bool) -> Iterator[None]:
        before, self._at_once = self._at_once, at_once
        try:
            if at_once:
                self.check()
            yield
        finally:
            self._at_once = before
        if before:
            self.check()

    def note(self, number: int, frame: object = None) -> None:
        """The handler of the signals."""
        first = not self.asked
        self.signal = self.signal or signal.Signals(number).name
        if first and self._at_once:
            self.check()


@contextlib.contextmanager
def heed_signals(stop: Stop) -> Iterator[None]:
    """Within this context signals are requests to `stop`, and a second one ends the process at once, with status 75.

    For commands, in the main thread. A signal that the process was started to ignore stays ignored.
    """
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A thread watches for the second signal, since a rank that waits for the others runs no handler.
    watcher = threading.Thread(target=_end_at_the_second, args=(reader, set(map(int, heeded))), daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop.note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        watcher.join()
        os.close(reader)


@contextlib.contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[None]:
    """Around a command whose work is kept line by line: a signal ends it wherever it is, and it says how to go on."""
    stop = Stop()
    with heed_signals(stop):
        try:
            with stop.at_once():
                yield
        except Interrupted as interrupted:
            say(f"{interrupted}; the same command continues")
            raise


def _end_at_the_second(reader: int, heeded: set[int]) -> None:
    first = None
    while number := os.read(reader, 1):
        if number[0] not in heeded:
            continue
        first = time.monotonic() if first is None else first
        if time.monotonic() - first > SAME_REQUEST:
            os.write(2, b"stopped at once; the same command continues from the last checkpoint\n")
            os._exit(os.EX_TEMPFAIL)
