"""Pictures of what ``collapse`` measures. Figures belong to no window: ``figure.savefig("collapse.png", dpi=150)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ood_scores.errors import EmptyInput
from ood_scores.evaluation.neural_collapse import TITLES, Collapse
from ood_scores.plotting.curves import OOD_COLOURS

if TYPE_CHECKING:
    import pandas as pd


def collapse_curves(runs: Mapping[str, Mapping[int, Collapse]]) -> Figure:
    """Every measure of neural collapse over training: a panel for each, in it a line for each run, 0 at the bottom.

    As Fig. 7 of Haas et al. 2022.

    Args:
        runs: by name, each the measures by epoch.
    """
    if not any(runs.values()):
        raise EmptyInput("there is no run to draw: pass {name: {epoch: neural_collapse(feats), ...}, ...}.")
    figure = _figure(11, 4.9)
    places = figure.subplots(2, 4, sharex=True).ravel()
    for axes, field in zip(places, fields(Collapse), strict=False):
        for colour, (name, run) in zip(_colours(len(runs)), runs.items(), strict=True):
            values = [getattr(run[epoch], field.name) for epoch in sorted(run)]
            axes.plot(sorted(run), values, color=colour, linewidth=1.6, label=name, marker="o", markersize=2.5)
        _tidy(axes, TITLES[field.name])
        axes.set_ylim(bottom=0)
        axes.tick_params(labelbottom=True)
    places[-1].set_axis_off()
    places[-1].legend(*places[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=9)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("0 = collapsed", fontsize=9)
    return figure


def norm_bin_curves(models: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Accuracy (above) and mean maximum softmax (below) by feature norm: a column per model, a colour per set.

    As Figs. 7 and 4 of Haas et al. 2024, with bins where their Fig. 4 has a point for each image. Sets without labels
    are missing above.

    Args:
        models: by name, each what ``norm_bins`` gives by the name of the set.
    """
    if not any(models.values()):
        raise EmptyInput("there is no table to draw: pass {model: {set: norm_bins(feats), ...}, ...}.")
    names = list(dict.fromkeys(name for tables in models.values() for name in tables))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    figure = _figure(0.6 + 3.6 * len(models), 4.8)
    panels = figure.subplots(2, len(models), sharex="col", sharey="row", squeeze=False)
    for column, (model, tables) in enumerate(models.items()):
        for axes, figures in zip(panels[:, column], ("accuracy", "confidence"), strict=True):
            for name, table in tables.items():
                axes.scatter(table["norm"], table[figures], color=colours[name], s=14, linewidths=0, alpha=0.85)
            _tidy(axes, model if figures == "accuracy" else "")
            axes.tick_params(labelbottom=True)
        panels[1, column].set_xlabel("feature norm, mean of the bin", fontsize=9)
    panels[0, 0].set_ylabel("accuracy", fontsize=9)
    panels[1, 0].set_ylabel("mean maximum softmax", fontsize=9)
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", markersize=4) for colour in colours.values()]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=8)
    return figure


def singular_value_curves(table: pd.DataFrame, first: int = 200) -> Figure:
    """Singular values by rank on a logarithmic scale, a line for each set. As Fig. 6 of Haas et al. 2022.

    Values below 1e-8 of the largest are rounding, and are not drawn.

    Args:
        table: what ``singular_values`` gives.
        first: how many ranks are drawn.
    """
    if not len(table):
        raise EmptyInput("there are no singular values to draw: pass what singular_values gives.")
    figure = _figure(5.6, 3.6)
    axes = figure.subplots()
    smallest = 1e-8 * table["value"].max()
    sets = list(dict.fromkeys(table["set"]))
    for colour, name in zip(_colours(len(sets)), sets, strict=True):
        part = table[(table["set"] == name) & (table["rank"] <= first) & (table["value"] > smallest)]
        axes.plot(part["rank"], part["value"], color=colour, linewidth=1.6, label=name)
    axes.set_yscale("log")
    _tidy(axes, "")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"rank of the direction among those of {sets[0]!r}", fontsize=9)
    axes.set_ylabel("singular value, or reach in the direction", fontsize=9)
    figure.legend(loc="outside upper right", ncols=len(sets), frameon=False, fontsize=8)
    return figure


def norm_group_curves(table: pd.DataFrame) -> Figure:
    """How much the features of each norm group change: per epoch on the left, summed up on the right.

    As Fig. 3 (centre) and Fig. 6 of Haas et al. 2024; the darker, the larger the norms. Groups without rows are left
    out.

    Args:
        table: what ``norm_groups`` gives.
    """
    present = table[table["rows"] > 0]
    if not len(present):
        raise EmptyInput("there are no norm groups to draw: pass what norm_groups gives.")
    figure = _figure(9.4, 3.4)
    panels = figure.subplots(1, 2)
    groups = list(present.groupby("group", sort=True))
    columns = {"change": "change from the epoch before", "total": "total change so far"}
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for colour, (_, part) in zip(_shades(len(groups)), groups, strict=True):
            axes.plot(part["epoch"], part[column], color=colour, linewidth=1.8, label=_group_name(part.iloc[0]))
        _tidy(axes, title)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch", fontsize=9)
    panels[0].set_ylabel("mean squared distance", fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        names[::-1],
        loc="outside right center",
        title="norm in the last epoch\n(rows)",
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _colours(count: int) -> list[str]:
    return [OOD_COLOURS[i % len(OOD_COLOURS)] for i in range(count)]


def _shades(count: int) -> list[str]:
    """Light to dark."""
    return [to_hex(colormaps["Blues"](place)) for place in np.linspace(0.4, 1, count)]


def _group_name(row: pd.Series) -> str:
    bounds = f"{row['low']:g} to {row['high']:g}" if np.isfinite(row["high"]) else f"from {row['low']:g}"
    return f"{bounds} ({int(row['rows']):,})"
