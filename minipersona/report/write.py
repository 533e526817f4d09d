"""From a study's directory to its report: report.md, report.html, figures/*.png and a CSV beside each.

Everything is read from the directory, and nothing is dated: an equal directory gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from minipersona.console import Console
from minipersona.files import write_atomically, write_text
from minipersona.report import figures, render
from minipersona.report.all_series import all_series
from minipersona.report.content import document
from minipersona.report.series import Series
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import current_verdict


def write_report(directory: Path, console: Console | None = None) -> None:
    """Write the report of the study in `directory`, finished or not.

    The verdict is verdict.json's. Where the study went on since that was written, it is judged now and written anew.
    Without matplotlib the report says so and has no figures. UserError where the directory is not a study's.
    """
    directory = Path(directory)
    results = read_study(directory)
    verdict = current_verdict(results)
    series, missing = all_series(results, verdict)
    drawn = draw_all(series)
    if drawn is None:
        (console or Console()).say("no figures: matplotlib is not installed; pip install 'minipersona[report]'")
    _write_figures(directory / "figures", series, drawn or {})
    report = document(results, verdict, series, missing, drawn=drawn is not None)
    write_text(directory / "report.md", render.markdown(report))
    write_text(directory / "report.html", render.html(report, drawn or {}))


def draw_all(series: Sequence[Series]) -> dict[str, bytes] | None:
    """The PNG of every figure by its name; None where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    return {one.name: figures.draw(one) for one in series}


def _write_figures(directory: Path, series: Sequence[Series], drawn: Mapping[str, bytes]) -> None:
    """Write the CSV and the PNG of each figure, and remove those of an earlier report that no longer hold."""
    csv = {one.name: one.to_csv() for one in series}
    for name in figures.DRAWINGS:
        if name in csv:
            write_text(directory / f"{name}.csv", csv[name])
        else:
            (directory / f"{name}.csv").unlink(missing_ok=True)
        if name in drawn:
            with write_atomically(directory / f"{name}.png", len(drawn[name])) as temporary:
                temporary.write_bytes(drawn[name])
        else:
            (directory / f"{name}.png").unlink(missing_ok=True)
