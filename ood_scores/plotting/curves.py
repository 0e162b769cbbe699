"""Pictures of score distributions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ood_scores.evaluation.metrics import Scores, auroc

ID_COLOUR = "#c4c4c4"
OOD_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; each set also has a row and a name of its own."""

BINS = 40
REACH = 3.0
"""How many widths of the ID scores the axis may reach beyond them; what lies farther out is in the outermost bin."""


@dataclass(frozen=True)
class Panel:
    """The scores of one scorer: of the in-distribution set, and of each out-of-distribution set by name."""

    id_scores: Scores
    ood_scores: Mapping[str, Scores]


def score_histograms(panels: Mapping[str, Panel], columns: int = 3) -> Figure:
    """Score distributions: a panel per scorer, in it a row per OoD set against the in-distribution set, with its AUROC.

    Each histogram is scaled to its own peak, so that a set whose scores are all alike does not flatten the others.

    Args:
        panels: by title.
        columns: how many panels stand beside each other.

    Returns:
        A figure that belongs to no window: ``figure.savefig("scores.png", dpi=150)``.
    """
    rows = ceil(len(panels) / columns)
    height = 0.55 + 0.5 * max(len(panel.ood_scores) for panel in panels.values())
    figure = Figure(figsize=(2.9 * columns, height * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    for i, (title, panel) in enumerate(panels.items()):
        _draw_panel(figure, grid[divmod(i, columns)], title, panel)
    figure.supxlabel("score (higher = more in-distribution; scores off the axis are in its outermost bin)", fontsize=9)
    figure.supylabel("density, relative to its peak", fontsize=9)
    handles = [
        Patch(color=ID_COLOUR, label="in-distribution"),
        Patch(fill=False, label="out-of-distribution, with AUROC in percent"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_panel(figure: Figure, place: SubplotSpec, title: str, panel: Panel) -> None:
    grid = place.subgridspec(len(panel.ood_scores), 1, hspace=0)
    edges = bin_edges(np.asarray(panel.id_scores), [np.asarray(scores) for scores in panel.ood_scores.values()])
    for i, (name, scores) in enumerate(panel.ood_scores.items()):
        axes = figure.add_subplot(grid[i])
        colour = OOD_COLOURS[i % len(OOD_COLOURS)]
        axes.stairs(heights(panel.id_scores, edges), edges, fill=True, color=ID_COLOUR)
        axes.stairs(heights(scores, edges), edges, fill=True, color=colour, alpha=0.2)
        axes.stairs(heights(scores, edges), edges, color=colour, linewidth=1.1)
        _tidy(axes, edges)
        label = f"{name}\n{100 * auroc(panel.id_scores, scores):.1f}"
        axes.annotate(label, (1.02, 0.5), xycoords="axes fraction", va="center", fontsize=7.5, color=colour)
        if i == 0:
            axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
        if i < len(panel.ood_scores) - 1:
            axes.tick_params(labelbottom=False, length=0)


def _tidy(axes: Axes, edges: NDArray[np.float64]) -> None:
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.08), yticks=[])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)


def bin_edges(id_scores: NDArray[np.float64], ood_scores: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Edges that cover all scores, but reach at most ``REACH`` widths of the ID scores beyond them."""
    low, high = np.quantile(id_scores[np.isfinite(id_scores)], [0.005, 0.995])
    reach = REACH * (high - low)
    everything = np.concatenate([id_scores, *ood_scores])
    first, last = max(everything.min(), low - reach), min(everything.max(), high + reach)
    return np.linspace(first, last if last > first else first + 1, BINS + 1)


def heights(scores: Scores, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many scores each bin holds, relative to the fullest; those off the edges are in the outermost bins."""
    counts, _ = np.histogram(np.asarray(scores).clip(edges[0], edges[-1]), edges)
    return counts / counts.max()
