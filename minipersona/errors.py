"""What ends a command early: the one error that is the user's to mend, and a request to stop; what no line may show.

Everything else that is raised is a bug of ours.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.parse


class UserError(Exception):
    """A wrong input or setting: one line that names the culprit and the mend.

    The commands print it as ``error: ...`` and exit with status 2 (`minipersona.cli.main`).
    """

    def __init__(self, line: str) -> None:
        super().__init__(line.replace("\n", "\\n"))  # a name out of a file may hold line ends; one line it stays


class Unreachable(UserError):
    """What is needed is not on this machine, and the network that has it cannot be reached. A plan goes on without."""


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


# ---------------------------------------------------------------- secrets


def redact(text: str) -> str:
    """`text` without what is secret in it: a server may say back what it was sent, and an address may hold a password.

    Left out are values of environment variables whose name says that they are secret, names and passwords in
    addresses, and what looks like either.
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value.strip()) >= 8:
            text = text.replace(value.strip(), "***")
        elif "://" in value and "@" in value:  # a proxy's address, say, or HF_ENDPOINT
            with contextlib.suppress(ValueError):
                account = urllib.parse.urlsplit(value.strip()).netloc.rpartition("@")[0]
                for part in (account, account.partition(":")[2]):
                    text = text.replace(part, "***") if len(part) >= 4 else text
    return _SECRET.sub("***", text)


_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|_KEY$", re.IGNORECASE)

# What looks like a token, a password in an address, the signature in its query.
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|(?<=Bearer )\S+|(?<=Basic )\S+|(?<=://)[^/@\s]+(?=@)|(?<=\?)[^\s'\"]+"
)
