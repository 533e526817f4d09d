"""What a command says while it works: a bar on a terminal, plain lines elsewhere. And how it fails: in one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from minipersona.errors import Interrupted, UserError
from minipersona.files import FULL

LINE_SECONDS = 10.0  # between plain progress lines
MOST = 10**12  # of anything that an option counts
Number = TypeVar("Number", int, float)


def printable(text: str) -> str:
    """`text` with control characters escaped, so that what came from a file cannot steer a terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else f"\\x{ord(c):02x}" for c in text
    )


def command_line(name: str, *arguments: object) -> str:
    """The line that runs a command (evaluate) or a module (minipersona.behaviour) as this process can run it.

    For a shell in the current directory; arguments are quoted. A script of the checkout is named only in the checkout,
    and `python` and `minipersona` only where PATH has this environment's; else the interpreter is named by its path.
    """
    script = Path(f"{name}.py")
    found = _beside_interpreter("python")
    python = "python" if found and found.samefile(sys.executable) else sys.executable
    if name.startswith("minipersona."):
        words = [python, "-m", name]
    elif script.is_file() and script.resolve() == Path(__file__).resolve().parents[1] / script:
        words = [python, str(script)]
    else:
        words = ["minipersona", name] if _beside_interpreter("minipersona") else [python, "-m", "minipersona", name]
    return shlex.join([*words, *map(str, arguments)])


def _beside_interpreter(program: str) -> Path | None:
    """PATH's `program` where it lies in this interpreter's environment."""
    found = shutil.which(program)
    return Path(found) if found and Path(found).absolute().parent == Path(sys.executable).parent else None


class Console:
    """Progress and remarks on stderr; results are the caller's, on stdout."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream or sys.stderr

    def say(self, text: str) -> None:
        """One line. Where it cannot be said, the work goes on in silence: a remark is not worth it."""
        if not self.quiet:
            try:
                self.stream.write(printable(text) + "\n")  # at once, since several threads may say something
                self.stream.flush()
            except OSError:  # the log's disk is full, or its reader has gone
                self.quiet = True
                _mute(self.stream)

    def progress(self, title: str, total: int, unit: str) -> Progress:
        """A counter from 0 to `total`; use it as a context."""
        return Progress(self, title, total, unit)


class Progress:
    """Counts work done. `advance` takes how many are done in all and a note to show beside them."""

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._bar = None
        self._spoken = time.monotonic()
        if not console.quiet and console.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit=f" {unit}", file=console.stream, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are done."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif not self._console.quiet and time.monotonic() - self._spoken > LINE_SECONDS:
            self._spoken = time.monotonic()
            self._console.say(f"{self._title}: {done:,} of {self._total:,} {self._unit} {note}".rstrip())


# ---------------------------------------------------------------- small commands: python -m minipersona.<folder>


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # a help text that cannot be written fails here, where `answer` handles it
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        if setting := re.fullmatch(r"unrecognized arguments: (\w+(?:\.\w+)*=.*)", message):
            raise UserError(f"{message}; write --set before each setting: --set {setting[1]}")
        raise UserError(f"{message}; see {self.prog} --help")


def subcommand(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """Add a command to what `add_subparsers` returned: its summary, and the examples below its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """The type of an option that takes a positive number, whole ones only where `kind` is int."""
    name = "whole number" if kind is int else "number"

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {name}")
        return value

    return parse


def dispatch(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Run the command that the arguments choose, as `set_defaults(command=...)` names it; print the help for none."""
    options = parser.parse_args(argv)
    if getattr(options, "command", None) is None:
        parser.print_help()
    else:
        options.command(options)


def answer(command: Callable[[], None], debug: bool = False) -> int:
    """Run a command; 0, or 2 after one line ``error: ...`` on stderr, below the traceback where `debug` asks for it.

    75, EX_TEMPFAIL, where it was asked to stop and the same command continues, as it has said. 0 also where standard
    output is closed or its reader has gone: the files are written, and nobody reads the rest.
    """
    prepare_streams()
    try:
        command()
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _failed(str(error), debug)
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing may be flushed to it at exit
        _mute(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = error.filename or "standard output"
        return _failed(f"cannot write {where}: {error.strerror}; free some space or write elsewhere", debug)
    except Interrupted:
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        Console().say("interrupted")
        return 130


def prepare_streams() -> None:
    """Let stdout and stderr take any text: escaped where their encoding lacks a character, dropped where closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the process started, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(line: str, debug: bool) -> int:
    """Say an error after what was said before it, as far as either can be said."""
    try:
        sys.stdout.flush()
    except OSError:
        _mute(sys.stdout)
    console = Console()
    if debug:
        console.say(traceback.format_exc().rstrip())
    console.say(f"error: {line}")
    return 2


def _mute(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, so that it does not fail once more at exit."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
