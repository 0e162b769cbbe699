"""Figures of feature norms; save one with ``figure.savefig("norms.png", dpi=150)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ood_scores.errors import EmptyInput
from ood_scores.plotting.style import LABEL, SMALL, color, new_figure, tidy

if TYPE_CHECKING:
    import pandas as pd


def norm_bin_curves(models: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Draw accuracy (top) and mean maximum softmax (bottom) by feature norm: a column per model, a color per set.

    The figure is as Figs. 7 and 4 of Haas et al. 2024, with bins instead of images as points. Sets without labels have
    no points at the top.

    Args:
        models: Results of ``norm_bins`` by the name of the set, for each model by its name.
    """
    if not any(models.values()):
        raise EmptyInput("there is no table to draw: pass {model: {set: norm_bins(feats), ...}, ...}.")
    names = list(dict.fromkeys(name for tables in models.values() for name in tables))
    colors = {name: color(number) for number, name in enumerate(names)}
    figure = new_figure(0.6 + 3.6 * len(models), 4.8)
    panels = figure.subplots(2, len(models), sharex="col", sharey="row", squeeze=False)
    for column, (model, tables) in enumerate(models.items()):
        for axes, figures in zip(panels[:, column], ("accuracy", "confidence"), strict=True):
            for name, table in tables.items():
                axes.scatter(table["norm"], table[figures], color=colors[name], s=14, linewidths=0, alpha=0.85)
            tidy(axes, model if figures == "accuracy" else "")
            axes.tick_params(labelbottom=True)
        panels[1, column].set_xlabel("feature norm, mean of the bin", fontsize=LABEL)
    panels[0, 0].set_ylabel("accuracy", fontsize=LABEL)
    panels[1, 0].set_ylabel("mean maximum softmax", fontsize=LABEL)
    handles = [Line2D([], [], color=each, marker="o", linestyle="", markersize=4) for each in colors.values()]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=SMALL)
    return figure


def norm_group_curves(table: pd.DataFrame) -> Figure:
    """Draw the changes of features in each norm group: per epoch on the left, summed up on the right.

    The figure is as Fig. 3 (center) and Fig. 6 of Haas et al. 2024. Darker lines are larger norms; groups without rows
    are left out.

    Args:
        table: Result of ``norm_groups``.
    """
    present = table[table["rows"] > 0]
    if not len(present):
        raise EmptyInput("there are no norm groups to draw: pass the result of norm_groups.")
    figure = new_figure(9.4, 3.4)
    panels = figure.subplots(1, 2)
    groups = list(present.groupby("group", sort=True))
    columns = {"change": "change from the epoch before", "total": "total change so far"}
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for shade, (_, part) in zip(_shades(len(groups)), groups, strict=True):
            axes.plot(part["epoch"], part[column], color=shade, linewidth=1.8, label=_group_name(part.iloc[0]))
        tidy(axes, title)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch", fontsize=LABEL)
    panels[0].set_ylabel("mean squared distance", fontsize=LABEL)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        names[::-1],
        loc="outside right center",
        title="norm in the last epoch\n(rows)",
        frameon=False,
        fontsize=SMALL,
        title_fontsize=SMALL,
    )
    return figure


def _shades(count: int) -> list[str]:
    """Blues from light to dark."""
    return [to_hex(colormaps["Blues"](place)) for place in np.linspace(0.4, 1, count)]


def _group_name(row: pd.Series) -> str:
    bounds = f"{row['low']:g} to {row['high']:g}" if np.isfinite(row["high"]) else f"from {row['low']:g}"
    return f"{bounds} ({int(row['rows']):,})"
