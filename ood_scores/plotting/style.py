"""Colors, fonts and axes of all figures."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ID_COLOR = "#c4c4c4"
OOD_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Palette of Okabe and Ito, which color-blind readers can distinguish."""

LABEL, SMALL, TICK = 9, 8, 7.5
"""Font sizes: titles and axis labels, legends and annotations, tick labels."""


def new_figure(width: float, height: float) -> Figure:
    """Return a figure that belongs to no window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def color(number: int) -> str:
    """Return the color for a number from 0; colors repeat."""
    return OOD_COLORS[number % len(OOD_COLORS)]


def tidy(axes: Axes, title: str = "") -> None:
    """Set the title and the style of axes."""
    axes.set_title(title, fontsize=LABEL, loc="left", fontweight="bold")
    axes.tick_params(labelsize=TICK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
