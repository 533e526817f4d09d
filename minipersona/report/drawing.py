"""What the figures share: colours and marks, axes without a window, lines at the bounds, legends.

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart, and Tol's wine for what lies beyond the
registered recipes; markers and line styles say the same again for print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from minipersona.report.blocks import one_line
from minipersona.run.judgement import Bounds
from minipersona.study_config import BEYOND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#1c1e21", "#6d747c", "#d5d9de"
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
WINE = "#882255"
Style = dict[str, Any]  # keyword arguments of matplotlib
STYLE: Style = {
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
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}

# Of each phase: its name; colour, marker and whether the marker is filled.
PHASES = {
    "1": ("dose", INK, "o", True),
    "2A": ("KL to the base", BLUE, "o", True),
    "2B": ("R3F noise", BLUE, "s", False),
    "3": ("low rank", GREEN, "^", True),
    "4A": ("persona system prompts", ORANGE, "D", True),
    "4B": ("persona responses", ORANGE, "D", False),
    "EM": ("unmixed EM reference", INK, "*", True),
    "5A": ("raw text mixed in", VERMILLION, "v", True),
    "5B": ("instructions mixed in", PURPLE, "P", True),
    "5C": ("preventative steering", SKY, "X", True),
}
UNNAMED = ("", GREY, "o", True)
BEYOND_MARKERS = "oDs^vP*Xph<>d8H"

T = TypeVar("T")
K = TypeVar("K")


class WithInterval(Protocol):
    """A row that may have an interval of M1."""

    @property
    def m1_low(self) -> float | None: ...
    @property
    def m1_high(self) -> float | None: ...


R = TypeVar("R", bound=WithInterval)


def phase_title(phase: str) -> str:
    """``"2A"`` -> ``"2A  KL to the base"``."""
    return f"{phase}  {_look(phase)[0]}".rstrip()


def _look(phase: str) -> tuple[str, str, str, bool]:
    """Of a phase its name, colour, marker and whether the marker is filled; recipes beyond share one colour."""
    if phase[:1] == BEYOND and len(phase) == 2:
        number = ord(phase[1]) - ord("A")
        return "beyond the registered", WINE, BEYOND_MARKERS[number % len(BEYOND_MARKERS)], number % 2 == 0
    return PHASES.get(phase, UNNAMED)


def shortened(text: str, most: int = 34) -> str:
    """A label that fits into a figure."""
    text = one_line(text)
    text = f" {text}" if text.startswith("_") else text  # matplotlib's legends leave out a label such as _x
    return text if len(text) <= most else text[: most - 1] + "…"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, belonging to no window and to no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.04))
    FigureCanvasAgg(figure)
    return figure


def thresholds(axes: Axes, bounds: Bounds, named: bool = True) -> None:
    """Horizontal lines at the M1 below which a recipe can pass, and from which it counts as collapsed."""
    for value, meaning in ((bounds.collapsed, "collapsed from here"), (bounds.passing, "passes below")):
        label = f"{value:.4g}: {meaning}" if named else ""
        axes.axhline(value, color=GREY, linewidth=0.9, linestyle=":", zorder=1, label=label)


def bars(axes: Axes, rows: Sequence[R], across: Callable[[R], float], colour: str) -> None:
    """The interval of every row that has one, as a vertical bar."""
    axes.vlines(*intervals(rows, across), color=colour, linewidth=1.2, zorder=5)


def intervals(rows: Sequence[R], across: Callable[[R], float]) -> tuple[list[float], list[float], list[float]]:
    """Of every row that has an interval of M1: its place on the horizontal axis, and the two ends."""
    known = [(across(r), r.m1_low, r.m1_high) for r in rows if r.m1_low is not None and r.m1_high is not None]
    return [x for x, _, _ in known], [low for _, low, _ in known], [high for _, _, high in known]


def legend(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it covers no point."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)


def colour_of(phase: str) -> str:
    """The colour in which every figure draws a phase."""
    return _look(phase)[1]


def point_style(phase: str) -> Style:
    """How a recipe of that phase is marked; the base, which has no phase, in grey."""
    _, colour, marker, filled = _look(phase)
    face, edge, width = (colour, INK, 0.5) if filled else ("white", colour, 1.4)
    return {
        "linestyle": "",
        "marker": marker,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": width,
    }


def line_styles() -> Iterator[Style]:
    """How the first line of a panel looks, the second, and so on; no two of a dozen alike."""
    colours = cycle((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY))
    dashes = cycle(("-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 2))))
    markers = cycle(("o", "s", "^", "D", "v", "P", "X"))
    for colour, dash, marker in zip(colours, dashes, markers):  # noqa: B905, without end
        yield {"color": colour, "linestyle": dash, "marker": marker}


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The rows by the value of a key, in the order in which they first occur."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
