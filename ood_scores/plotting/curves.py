"""Figures of score distributions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ood_scores.evaluation.metrics import METRICS, number
from ood_scores.evaluation.threshold_counts import Scores
from ood_scores.plotting.style import ID_COLOR, LABEL, SMALL, TICK, color, new_figure

BINS = 40
NARROWEST = 6.0
"""Smallest width of a figure in inches, which has room for the legend."""
REACH = 3.0
"""Extent of the axis beyond the ID scores in widths of the ID scores; scores farther out are in the outermost bin."""


@dataclass(frozen=True)
class Panel:
    """Scores of one scorer: of the ID set, and of each OoD set by name."""

    id_scores: Scores
    ood_scores: Mapping[str, Scores]


def score_histograms(panels: Mapping[str, Panel], columns: int = 3) -> Figure:
    """Draw score distributions: a panel per scorer with a row for each OoD set, the ID set, and the AUROC.

    Each histogram is scaled to its own peak, so a set with nearly constant scores does not flatten the others.

    Args:
        panels: Panels by title.
        columns: Number of panels side by side.

    Returns:
        A figure that belongs to no window; save it with ``figure.savefig("scores.png", dpi=150)``.
    """
    rows = ceil(len(panels) / columns)
    height = 0.55 + 0.5 * max(len(panel.ood_scores) for panel in panels.values())
    figure = new_figure(max(NARROWEST, 2.9 * columns), height * rows + 0.6)
    grid = figure.add_gridspec(rows, columns)
    for i, (title, panel) in enumerate(panels.items()):
        _draw_panel(figure, grid[divmod(i, columns)], title, panel)
    figure.supxlabel(
        "score (higher = more in-distribution; scores off the axis are in its outermost bin)", fontsize=LABEL
    )
    figure.supylabel("density, relative to its peak", fontsize=LABEL)
    handles = [
        Patch(color=ID_COLOR, label="in-distribution"),
        Patch(fill=False, label="out-of-distribution, with AUROC in percent"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _draw_panel(figure: Figure, place: SubplotSpec, title: str, panel: Panel) -> None:
    auroc = METRICS["auroc"]
    grid = place.subgridspec(len(panel.ood_scores), 1, hspace=0)
    edges = bin_edges(np.asarray(panel.id_scores), [np.asarray(scores) for scores in panel.ood_scores.values()])
    for i, (name, scores) in enumerate(panel.ood_scores.items()):
        axes = figure.add_subplot(grid[i])
        axes.stairs(heights(panel.id_scores, edges), edges, fill=True, color=ID_COLOR)
        axes.stairs(heights(scores, edges), edges, fill=True, color=color(i), alpha=0.2)
        axes.stairs(heights(scores, edges), edges, color=color(i), linewidth=1.1)
        _tidy(axes, edges)
        label = f"{name}\n{number(auroc.scale * auroc(panel.id_scores, scores), auroc.percent)}"
        axes.annotate(label, (1.02, 0.5), xycoords="axes fraction", va="center", fontsize=TICK, color=color(i))
        if i == 0:
            axes.set_title(title, fontsize=LABEL, loc="left", fontweight="bold")
        if i < len(panel.ood_scores) - 1:
            axes.tick_params(labelbottom=False, length=0)


def _tidy(axes: Axes, edges: NDArray[np.float64]) -> None:
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.08), yticks=[])
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right", "left"]].set_visible(False)


def bin_edges(id_scores: NDArray[np.float64], ood_scores: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return edges that cover all scores, but at most ``REACH`` widths of the ID scores beyond the ID scores."""
    low, high = np.quantile(id_scores[np.isfinite(id_scores)], [0.005, 0.995])
    reach = REACH * (high - low)
    everything = np.concatenate([id_scores, *ood_scores])
    first, last = max(everything.min(), low - reach), min(everything.max(), high + reach)
    return np.linspace(first, last if last > first else first + 1, BINS + 1)


def heights(scores: Scores, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return counts per bin relative to the largest; scores beyond the edges are in the outermost bins."""
    counts, _ = np.histogram(np.asarray(scores).clip(edges[0], edges[-1]), edges)
    return counts / counts.max()
