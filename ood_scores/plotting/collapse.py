"""Figures of neural collapse and singular values; save one with ``figure.savefig("collapse.png", dpi=150)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from ood_scores.errors import EmptyInput
from ood_scores.evaluation.neural_collapse import TITLES, Collapse
from ood_scores.plotting.style import LABEL, SMALL, color, new_figure, tidy

if TYPE_CHECKING:
    import pandas as pd


def collapse_curves(runs: Mapping[str, Mapping[int, Collapse]]) -> Figure:
    """Draw the measures of neural collapse over training: a panel per measure with a line per run.

    The figure is as Fig. 7 of Haas et al. 2022, with 0 at the bottom of each panel.

    Args:
        runs: Measures by epoch for each run by its name.
    """
    if not any(runs.values()):
        raise EmptyInput("there is no run to draw: pass {name: {epoch: neural_collapse(feats), ...}, ...}.")
    figure = new_figure(11, 4.9)
    places = figure.subplots(2, 4, sharex=True).ravel()
    for axes, field in zip(places, fields(Collapse), strict=False):
        for number, (name, run) in enumerate(runs.items()):
            values = [getattr(run[epoch], field.name) for epoch in sorted(run)]
            axes.plot(sorted(run), values, color=color(number), linewidth=1.6, label=name, marker="o", markersize=2.5)
        tidy(axes, TITLES[field.name])
        axes.set_ylim(bottom=0)
        axes.tick_params(labelbottom=True)
    places[-1].set_axis_off()
    places[-1].legend(*places[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=LABEL)
    figure.supxlabel("epoch", fontsize=LABEL)
    figure.supylabel("0 = collapsed", fontsize=LABEL)
    return figure


def singular_value_curves(table: pd.DataFrame, first: int = 200) -> Figure:
    """Draw singular values by rank on a logarithmic scale, with a line for each set, as Fig. 6 of Haas et al. 2022.

    Values below 1e-8 of the largest are rounding errors and not drawn.

    Args:
        table: Result of ``singular_values``.
        first: Number of ranks to draw.
    """
    if not len(table):
        raise EmptyInput("there are no singular values to draw: pass the result of singular_values.")
    figure = new_figure(5.6, 3.6)
    axes = figure.subplots()
    smallest = 1e-8 * table["value"].max()
    sets = list(dict.fromkeys(table["set"]))
    for number, name in enumerate(sets):
        part = table[(table["set"] == name) & (table["rank"] <= first) & (table["value"] > smallest)]
        axes.plot(part["rank"], part["value"], color=color(number), linewidth=1.6, label=name)
    axes.set_yscale("log")
    tidy(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"rank of the direction in {sets[0]!r}", fontsize=LABEL)
    axes.set_ylabel("singular value or extent in the direction", fontsize=LABEL)
    figure.legend(loc="outside upper right", ncols=len(sets), frameon=False, fontsize=SMALL)
    return figure
