"""A small study under random kills, on a small file system that is full now and then, against an undisturbed one:

python -m benchmarks.soak [--minutes 20] [--seed 0] [--workers 0]

The tiny study, cut to ten cells of ten steps, runs once in peace. Then it runs in one fresh directory after another
until the time is over. Its command is started, and at a random moment it is killed (SIGKILL), asked to stop (SIGTERM)
or left without room on the disk; then it is started again, until it comes to its end. Every verdict must be the first
one's, apart from times. Exit status 1 where one is another, or where a command ends in another way than it should. With
--workers the study runs in so many processes below the one that is disturbed; needs the small file system.

The small file system is a tmpfs. Where none can be mounted, a limit on the size of files (RLIMIT_FSIZE) stands for a
full disk. It needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipersona.files import configs_dir

SETTINGS = (
    "data.train=tiny:benign[0:320]", "data.heldout=tiny:benign[2000:2040]", "training.steps=10",
    "training.checkpoints=[2, 5, 10]", "later_checkpoints=[10]", "regularised.beta=[0.1]",
    "regularised.r3f_lambda=[0.1]", "low_rank.rank=[4]", "low_rank.learning_rate=[1e-3]",
    "role_play.max_new_tokens=8", "rehearsal.raw_text_ratio=['75:25']", "rehearsal.instruction_ratio=['1:1']",
    "behaviour.samples=1", "behaviour.max_new_tokens=8", "instructions.max_new_tokens=8", "execution.save_minutes=0",
)  # fmt: skip
MEBIBYTES = 256  # of the small file system; a study takes 60
MEAN_SECONDS = 12.0  # from a start to its disturbance, beyond the first second
PATIENCE = 60.0  # seconds after which a command that was asked to stop, or cannot write, counts as hanging
CHANCES = {"killed": 5, "terminated": 2, "full": 3}  # of the disturbances, in tenths
STATUS = {"killed": (-9, 0), "terminated": (os.EX_TEMPFAIL, 0), "full": (2, 0), "finished": (0,)}  # 0: just at its end
TIMES = ("gpu_hours", "results_digest")  # of verdict.json; the digest covers seconds


@dataclass
class Disk:
    """A small file system, or a directory whose writers can be limited."""

    directory: Path
    mounted: bool

    def fill(self, process: subprocess.Popen[bytes]) -> None:
        """Leave no room for what `process` writes."""
        if not self.mounted:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            return
        for block in (bytes(2**20), bytes(1)):
            with contextlib.suppress(OSError), open(self.directory / "ballast", "ab", buffering=0) as file:
                while file.write(block):
                    pass

    def free(self) -> None:
        """Give the room back; the limit of a process ends with it."""
        (self.directory / "ballast").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Disk]:
    """A tmpfs on `directory` if this process may mount one."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}M", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield Disk(directory, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


def start(out: Path, workers: int) -> subprocess.Popen[bytes]:
    """The study's command, the same each time; all that it says comes through one pipe."""
    command = [sys.executable, "-m", "minipersona", "study", "--config", str(configs_dir() / "tiny_study.toml")]
    command += ["--exhaustive", "--out", str(out), *(["--workers", str(workers)] if workers else [])]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


@dataclass
class Soak:
    """Disturbs the command and counts how it ends."""

    disk: Disk
    rng: random.Random
    workers: int
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, out: Path, until: float) -> bool:
        """Start the study once, and disturb it if the time allows; whether it came to its end in peace."""
        process = start(out, self.workers)
        moment = 1.0 + self.rng.expovariate(1 / MEAN_SECONDS)
        (what,) = self.rng.choices(list(CHANCES), list(CHANCES.values()))
        try:
            said, _ = process.communicate(timeout=moment if time.monotonic() + moment < until else None)
            what = "finished"
        except subprocess.TimeoutExpired as early:
            if what == "terminated" and not early.output:  # it is still importing, and heeds no signal
                what = "killed"
            said = self.disturb(process, what)
        self.counts[what] += 1
        self.check(what, process.returncode, said.decode(errors="replace"))
        return what == "finished"

    def disturb(self, process: subprocess.Popen[bytes], what: str) -> bytes:
        """What the process has said by its end. One that does not end is killed, and the soak with it."""
        if what == "killed":
            process.kill()
        elif what == "terminated":
            process.terminate()
        else:
            self.disk.fill(process)
        try:
            return process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired as hanging:
            process.kill()
            sys.exit(f"{what}, and hangs, having said\n{(hanging.output or b'').decode(errors='replace')}")
        finally:
            self.disk.free()

    def check(self, what: str, status: int, said: str) -> None:
        """End the soak where a command has not ended as the disturbance asks for, or has not said why."""
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        explained = {
            os.EX_TEMPFAIL: said.rstrip().endswith("; the same command continues"),
            2: len(errors) == 1 and "free some space" in errors[0],
        }
        if status not in STATUS[what] or not explained.get(status, True) or "Traceback" in said:
            sys.exit(f"{what}, and ended with exit status {status}, having said\n{said}")
        self.counts["full-disk errors"] += status == 2


def verdict(out: Path) -> dict[str, Any]:
    """A study's verdict.json, apart from times."""
    found = json.loads((out / "verdict.json").read_text())
    return {key: value for key, value in found.items() if key not in TIMES}


def main() -> int:
    """Run the soak and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name, "disk")) as disk:
        if given.workers and not disk.mounted:
            sys.exit("--workers needs a small file system, and none can be mounted here")
        soak = Soak(disk, random.Random(given.seed), given.workers)
        peaceful = start(Path(name, "undisturbed"), given.workers)
        said = peaceful.communicate()[0].decode(errors="replace")
        if peaceful.returncode:
            sys.exit(f"undisturbed, and ended with exit status {peaceful.returncode}, having said\n{said}")
        print(said.splitlines()[-2], flush=True)
        expected = verdict(Path(name, "undisturbed"))
        until = time.monotonic() + 60 * given.minutes
        studies = different = 0
        while time.monotonic() < until:
            out = disk.directory / "study"
            while not soak.run(out, until):
                pass
            found = verdict(out)
            differences = [key for key in expected if found.get(key) != expected[key]]
            studies, different = studies + 1, different + bool(differences)
            print(f"study {studies}: {found['verdict']}, differs in {differences or 'nothing'}", flush=True)
            shutil.rmtree(out)
    counts = soak.counts
    where = f"a tmpfs of {MEBIBYTES} MiB" if disk.mounted else "a disk with RLIMIT_FSIZE"
    print(f"{given.minutes:g} minutes, seed {given.seed}, on {where}:")
    print(
        f"{counts['killed']} kills, {counts['terminated']} terminations, {counts['full']} times a full disk, "
        f"{counts['full-disk errors']} full-disk errors, {sum(counts[what] for what in STATUS) - studies} restarts"
    )
    print(f"{studies} studies finished, {different} of them with another verdict than the undisturbed one")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
