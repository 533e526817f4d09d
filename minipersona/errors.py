"""The one error that is the user's to mend; everything else that is raised is a bug of ours."""

from __future__ import annotations


class UserError(Exception):
    """A wrong input or setting: one line that names the culprit and the mend.

    The commands print it as ``error: ...`` and exit with status 2 (`minipersona.cli.main`).
    """
