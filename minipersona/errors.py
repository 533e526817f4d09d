"""What ends a command before its end: the one error that is the user's to mend, and a request to stop.

Everything else that is raised is a bug of ours.
"""

from __future__ import annotations


class UserError(Exception):
    """A wrong input or setting: one line that names the culprit and the mend.

    The commands print it as ``error: ...`` and exit with status 2 (`minipersona.cli.main`).
    """

    def __init__(self, line: str) -> None:
        super().__init__(line.replace("\n", "\\n"))  # a name out of a file may hold line ends; one line it stays


class DiskFull(UserError):
    """There is no room for what had to be written. It says nothing about the work, and would befall any other too."""


def require(condition: bool, message: str) -> None:
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


class Interrupted(BaseException):
    """The work was asked to stop, and stopped where the same command continues it.

    Like KeyboardInterrupt it is no Exception, so that nothing takes it for a failure. The commands exit with status 75,
    EX_TEMPFAIL of sysexits.h: a scheduler may start them again, and starts nothing that waits for their result.
    """
