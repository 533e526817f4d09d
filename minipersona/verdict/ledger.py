"""What happened in a study: one append-only file a runner, so that no two ever write the same; merged on reading."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minipersona.files import append_jsonl, read_jsonl

Event = Literal["claimed", "done", "failed", "skipped"]
SETTLED = ("done", "failed")


def runner_name() -> str:
    """A name that no other process has had."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Ledger:
    """The ledger of a study as one runner sees it: it writes its own file and reads everybody's."""

    directory: Path
    runner: str

    def note(
        self, cell: str, phase: str, name: str, event: Event, attempt: int = 0, error: str | None = None, **more: Any
    ) -> None:
        """Append a line."""
        line = {"time": time.time(), "runner": self.runner, "cell": cell, "phase": phase, "name": name, "event": event,
                "attempt": attempt, **more}  # fmt: skip
        append_jsonl(self.directory / f"{self.runner}.jsonl", line if error is None else {**line, "error": error})

    def lines(self) -> list[dict[str, Any]]:
        """Every runner's lines, in the order of their times. A torn last line of any is left out."""
        return merged(read_jsonl(path) for path in self.directory.glob("*.jsonl"))

    def failures(self, since: float = 0.0) -> dict[str, str]:
        """The cells whose newest word is that they failed, and failed after `since`: their error."""
        newest = {line["cell"]: line for line in self.lines() if line["event"] in SETTLED}
        return {
            cell: line.get("error", "")
            for cell, line in newest.items()
            if line["event"] == "failed" and line["time"] >= since
        }


def merged(files: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines of several files in one order: by time, then by runner, then as written."""
    lines = [(line["time"], line["runner"], number, line) for rows in files for number, line in enumerate(rows)]
    return [line for *_, line in sorted(lines, key=lambda item: item[:3])]
