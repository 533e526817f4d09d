"""From a study's directory to its report: report.md, report.html, figures/*.png and a CSV beside each.

Everything is read from the directory, and nothing is dated: an equal directory gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minipersona.console import Console
from minipersona.files import write_atomically, write_text
from minipersona.report import html, markdown, plots, plots_geometry, style
from minipersona.report.content import document
from minipersona.report.names import Row
from minipersona.report.series import Series, all_series
from minipersona.verdict.results import read_study
from minipersona.verdict.verdict import current_verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWINGS: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "m1_against_learned": plots.m1_against_learned,
    "m1_by_step": plots.m1_by_step,
    "cosines": plots_geometry.cosine_matrices,
    "decomposition": plots_geometry.decomposition,
    "mixture": plots_geometry.mixture,
}


def write_report(directory: Path, console: Console | None = None) -> None:
    """Write the report of the study in `directory`, finished or not.

    The verdict is verdict.json's or, where the study went on since that was written, judged now and written anew.
    Without matplotlib the report says so and has no figures. UserError where the directory is no study's.
    """
    directory = Path(directory)
    results = read_study(directory)
    verdict = current_verdict(results)
    series, missing = all_series(results, verdict)
    figures = draw_all(series)
    if figures is None:
        (console or Console()).say("no figures: matplotlib is not installed; pip install 'minipersona[report]'")
    _write_figures(directory / "figures", series, figures or {})
    report = document(results, verdict, series, missing, drawn=figures is not None)
    write_text(directory / "report.md", markdown.render(report))
    write_text(directory / "report.html", html.render(report, figures or {}))


def draw_all(series: Sequence[Series]) -> dict[str, bytes] | None:
    """The PNG of every figure by its name; None where matplotlib is not installed."""
    try:
        from matplotlib.style import context
    except ImportError:
        return None
    figures = {}
    for one in series:
        with context(["default", style.STYLE]):
            figures[one.name] = style.png(DRAWINGS[one.name](one.rows))
    return figures


def _write_figures(directory: Path, series: Sequence[Series], figures: dict[str, bytes]) -> None:
    """Write the CSV and the PNG of each figure, and remove those of an earlier report that no longer hold."""
    csv = {one.name: one.to_csv() for one in series}
    for name in DRAWINGS:
        if name in csv:
            write_text(directory / f"{name}.csv", csv[name])
        else:
            (directory / f"{name}.csv").unlink(missing_ok=True)
        if name in figures:
            with write_atomically(directory / f"{name}.png", len(figures[name])) as temporary:
                temporary.write_bytes(figures[name])
        else:
            (directory / f"{name}.png").unlink(missing_ok=True)
