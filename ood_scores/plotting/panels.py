"""Figures of panels from tidy tables; save one with ``figure.savefig("lines.png", dpi=150)``."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ood_scores.errors import EmptyInput
from ood_scores.plotting.style import LABEL, SMALL, color, new_figure, tidy

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = 4
"""Largest number of panels side by side."""
WIDE = 30
"""Ratio of the largest to the smallest place from which the horizontal axis is logarithmic."""


def line_panels(table: pd.DataFrame, xlabel: str) -> Figure:
    """Draw means over seeds with a band of one standard deviation: a panel for each quantity, a line for each series.

    Args:
        table: Columns ``panel``, ``line``, ``x`` (numbers, or names that are placed side by side), ``mean``, and
            ``sd``, which is NaN for a single seed.
        xlabel: Label of the horizontal axes.
    """

    def draw(axes: Axes, part: pd.DataFrame, number: int, line: str) -> None:
        shade: Any = color(number)
        x, mean, sd = (part[name].to_numpy() for name in ("x", "mean", "sd"))
        axes.plot(x, mean, color=shade, linewidth=1.6, label=line, marker="o", markersize=2.5)
        if np.isfinite(sd).any():
            axes.fill_between(x, mean - sd, mean + sd, color=shade, alpha=0.2, linewidth=0)

    return _panels(table, xlabel, draw)


def bar_panels(table: pd.DataFrame, xlabel: str) -> Figure:
    """Draw groups of bars: a panel for each quantity, a group for each ``x``, a color for each ``line``.

    Args:
        table: Columns ``panel``, ``line``, ``x`` and ``mean``.
        xlabel: Label of the horizontal axes.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(table["x"]))}
    width = 0.8 / table["line"].nunique() if len(table) else 0.8

    def draw(axes: Axes, part: pd.DataFrame, number: int, line: str) -> None:
        left = [places[name] - 0.4 + (number + 0.5) * width for name in part["x"]]
        axes.bar(left, part["mean"], width=0.92 * width, color=color(number), label=line)
        axes.set_xticks(list(places.values()), list(places))

    return _panels(table, xlabel, draw)


def scatter_panel(table: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Draw points ``x`` and ``y`` in a color for each ``line``, with Pearson's correlation of all points in the title.

    The figure is as Fig. 3 of Haas et al. 2022.
    """
    _require_rows(table)
    figure = new_figure(5.2, 3.8)
    axes = figure.subplots()
    for number, (line, part) in enumerate(table.groupby("line", sort=False)):
        axes.scatter(part["x"], part["y"], color=color(number), s=14, linewidths=0, alpha=0.85, label=str(line))
    tidy(axes, f"Pearson's r = {correlation(table):.3f}")
    axes.set_xlabel(xlabel, fontsize=LABEL)
    axes.set_ylabel(ylabel, fontsize=LABEL)
    figure.legend(loc="outside right upper", frameon=False, fontsize=SMALL)
    return figure


def correlation(table: pd.DataFrame) -> float:
    """Return Pearson's correlation of the columns ``x`` and ``y``; NaN if one of them is constant."""
    return float(table["x"].astype(float).corr(table["y"].astype(float)))


def embedding_panels(table: pd.DataFrame) -> Figure:
    """Draw features of two dimensions, ``x`` and ``y``: a panel for each ``panel``, a color for each class ``line``.

    The figure is as Fig. 8 of Haas et al. 2022.
    """

    def draw(axes: Axes, part: pd.DataFrame, number: int, line: str) -> None:
        axes.scatter(part["x"], part["y"], color=f"C{number}", s=4, linewidths=0, label=line)
        axes.set_aspect("equal", adjustable="datalim")

    return _panels(table, "first feature", draw)


def _panels(table: pd.DataFrame, xlabel: str, draw: Callable[[Axes, pd.DataFrame, int, str], None]) -> Figure:
    _require_rows(table)
    panels, lines = (list(dict.fromkeys(table[name])) for name in ("panel", "line"))
    columns = min(COLUMNS, len(panels))
    rows = ceil(len(panels) / columns)
    figure = new_figure(max(4.2, 3.3 * columns), 2.7 * rows + 0.4)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    names = isinstance(table["x"].iloc[0], str)
    for axes, panel in zip(places, panels, strict=False):
        for number, line in enumerate(lines):
            part = table[(table["panel"] == panel) & (table["line"] == line)]
            if len(part):
                draw(axes, part, number, str(line))
        tidy(axes, str(panel))
        axes.set_xlabel(xlabel, fontsize=LABEL)
        if names:
            axes.tick_params(axis="x", rotation=30)
        else:
            _scale(axes, table["x"].to_numpy(dtype=np.float64))
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    found = {name: handle for axes in places for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(found) > 1:
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside upper center",
            ncols=min(5, len(found)),
            frameon=False,
            fontsize=SMALL,
        )
    return figure


def _scale(axes: Axes, x: NDArray[np.float64]) -> None:
    """Label whole numbers only if all are whole, and use a logarithmic axis for fractions of several magnitudes."""
    if (x == x.round()).all():
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif x.min() > 0 and x.max() / x.min() >= WIDE:
        axes.set_xscale("log")


def _require_rows(table: pd.DataFrame) -> None:
    if not len(table):
        raise EmptyInput("there is nothing to draw, since nothing was measured: train or get what is missing first.")
