"""How the figures look. Needs matplotlib only where a figure is made.

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart; markers, line styles and labels say the
same again for print.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

from minipersona.report.names import Row
from minipersona.run.judgement import COLLAPSED_M1, PASS_M1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

INK, GREY, PALE = "#1c1e21", "#6d747c", "#d5d9de"
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "font.family": "DejaVu Sans",  # the one that matplotlib ships
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "lines.linewidth": 1.5,
}
LABEL_SIZE = 8.0  # points

# Over the whole study: colour, marker and whether it is filled, by phase.
PHASE_STYLES = {
    "1": (INK, "o", True),
    "2A": (BLUE, "o", True),
    "2B": (BLUE, "s", False),
    "3": (GREEN, "^", True),
    "4A": (ORANGE, "D", True),
    "4B": (ORANGE, "D", False),
    "EM": (INK, "*", True),
    "5A": (VERMILLION, "v", True),
    "5B": (PURPLE, "P", True),
    "5C": (SKY, "X", True),
}


def point_style(phase: str) -> dict[str, Any]:
    """How a recipe of that phase is marked; the base, which has no phase, in grey."""
    colour, marker, filled = PHASE_STYLES.get(phase, (GREY, "o", True))
    face, edge, width = (colour, INK, 0.5) if filled else ("white", colour, 1.4)
    return {
        "linestyle": "",
        "marker": marker,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": width,
    }


def line_styles() -> Iterator[dict[str, Any]]:
    """How the first line of a panel looks, the second, and so on; no two of a dozen alike."""
    colours = cycle((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY))
    dashes = cycle(("-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2))))
    markers = cycle(("o", "s", "^", "D", "v", "P", "X"))
    for colour, dash, marker in zip(colours, dashes, markers):  # noqa: B905, without end
        yield {"color": colour, "linestyle": dash, "marker": marker}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, belonging to no window and to no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.04))
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, without a date or a version, so that equal figures are equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def thresholds(axes: Axes, label: Literal["inside", "outside", ""] = "inside") -> list[Annotation]:
    """Horizontal lines where a recipe can no longer pass and from where it counts as collapsed -> their labels."""
    labels = []
    for value, text in ((PASS_M1, "0.95: passes below"), (COLLAPSED_M1, "0.97: collapsed from here")):
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
        if label:
            x, offset, align = (0, (4, 2.5), "bottom") if label == "inside" else (1, (4, 0), "center")
            labels.append(
                axes.annotate(
                    text, (x, value), offset, xycoords=("axes fraction", "data"), textcoords="offset points",
                    color=GREY, fontsize=7.5, va=align,
                )
            )  # fmt: skip
    return labels


def settle(figure: Figure) -> None:
    """Compute limits and sizes and keep them, whatever is added: a label is placed once, in pixels."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def by(rows: Sequence[Row], *keys: str) -> dict[Any, list[Row]]:
    """The rows by the value of a key, or by the tuple of several, in the order in which they first occur."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys), []).append(row)
    return groups


def known(rows: Sequence[Row], *keys: str) -> list[Row]:
    """The rows that have a number under every key."""
    return [row for row in rows if all(row[key] is not None for key in keys)]
