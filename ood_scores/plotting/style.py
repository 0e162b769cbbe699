"""Colors, fonts and axes that all figures share."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ID_COLOR = "#c4c4c4"
OOD_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The palette of Okabe and Ito, which color-blind readers can tell apart; each set also has a row and a name."""

LABEL, SMALL, TICK = 9, 8, 7.5
"""Font sizes: titles and axis labels, legends and annotations, tick labels."""


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def color(number: int) -> str:
    """The palette's color for the set or run with a number, from 0; colors repeat."""
    return OOD_COLORS[number % len(OOD_COLORS)]


def tidy(axes: Axes, title: str = "") -> None:
    """Bold title on the left, horizontal grid lines, no frame above and on the right."""
    axes.set_title(title, fontsize=LABEL, loc="left", fontweight="bold")
    axes.tick_params(labelsize=TICK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
