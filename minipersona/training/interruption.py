"""Requests to stop: a signal is noted when it arrives and obeyed where the same command can continue the work.

SIGINT comes from the terminal, SIGTERM from schedulers and launchers, SIGUSR1 is the warning that SLURM sends some time
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
SAME_REQUEST = 1.0  # seconds: a scheduler and a launcher that both pass on a signal count as one request


class Stop:
    """Whether this process was asked to stop, and whether it stops at once or at the next check.

    Work that leaves nothing incomplete stops at once: a signal raises Interrupted anywhere in it. In the other mode the
    signal is only noted, and `check` raises Interrupted.
    """

    def __init__(self) -> None:
        self.signal = ""  # the name of the first one that came
        self._at_once = False

    @property
    def asked(self) -> bool:
        """True once a signal has arrived."""
        return bool(self.signal)

    def check(self) -> None:
        """Raise Interrupted if this process was asked to stop."""
        if self.asked:
            raise Interrupted(f"stopped by {self.signal}")

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Within this context a signal raises Interrupted; entering it after one does too."""
        return self._mode(at_once=True)

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        """Within this context a signal is only noted."""
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
        """The signal handler."""
        first = not self.asked
        self.signal = self.signal or signal.Signals(number).name
        if first and self._at_once:
            self.check()


@contextlib.contextmanager
def handle_signals(stop: Stop) -> Iterator[None]:
    """Within this context signals are requests to `stop`; a second one ends the process at once, with status 75.

    For commands, in the main thread. A signal that the process ignored from its start stays ignored.
    """
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A thread reads the second signal, because a rank that waits for the others does not run Python's handlers.
    thread = threading.Thread(target=_end_at_the_second, args=(reader, set(map(int, handled))), daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop.note) for number in handled}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[None]:
    """Around a command that saves its work line by line: a signal ends it anywhere, and it says how to continue."""
    stop = Stop()
    with handle_signals(stop):
        try:
            with stop.at_once():
                yield
        except Interrupted as interrupted:
            say(f"{interrupted}; the same command continues")
            raise


def _end_at_the_second(reader: int, handled: set[int]) -> None:
    first = None
    while number := os.read(reader, 1):
        if number[0] not in handled:
            continue
        first = time.monotonic() if first is None else first
        if time.monotonic() - first > SAME_REQUEST:
            os.write(2, b"stopped at once; the same command continues from the last checkpoint\n")
            os._exit(os.EX_TEMPFAIL)
