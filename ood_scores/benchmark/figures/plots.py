"""The kinds of figures: functions of the results of a part that return the data drawn, and the picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ood_scores.benchmark.figures.quantities import MEAN, Source, over_seeds, title_of, values
from ood_scores.errors import BadInput, EmptyInput
from ood_scores.evaluation.feature_norms import norm_bins as norm_bin_table
from ood_scores.evaluation.feature_norms import norm_groups as norm_group_table
from ood_scores.evaluation.neural_collapse import singular_values as singular_value_table
from ood_scores.plotting.collapse import singular_value_curves
from ood_scores.plotting.curves import Panel, bin_edges, heights, score_histograms
from ood_scores.plotting.norms import norm_bin_curves
from ood_scores.plotting.panels import bar_panels, embedding_panels, line_panels, scatter_panel
from ood_scores.registry import Registry

Drawn: TypeAlias = tuple[pd.DataFrame, Figure]


def lines(
    source: Source,
    *,
    y: Sequence[str | Sequence[str]],
    scorer: str | None = None,
    ood: str = MEAN,
    change: bool = False,
) -> Drawn:
    """Draw quantities over epochs, or over the values of a sweep: means over seeds, with a band of one SD.

    Args:
        source: the results.
        y: a panel for each entry: a metric, ``false_positives``, a measure, ``log.`` and a column of the training log,
            or a list of these, which share the panel.
        scorer: the scorer of metrics; by default the first of the part.
        ood: the OoD dataset of metrics, or ``near``, ``far`` or ``mean``.
        change: whether to subtract each seed's value in the first epoch.
    """
    frames = []
    for entry in y:
        names = [entry] if isinstance(entry, str) else list(entry)
        for name in names:
            found = values(source, name, source.scorer(scorer), ood).dropna(subset="x")
            if change:
                first = found.sort_values("x").groupby(["line", "checkpoint"])["value"].transform("first")
                found["value"] -= first
            found["panel"] = ("change of " if change else "") + _shared_title([title_of(each) for each in names])
            found["line"] = _line(source, found["line"], title_of(name) if len(names) > 1 else "")
            frames.append(over_seeds(found.sort_values("x", kind="stable"), ["panel", "line", "x"]))
    table = pd.concat(frames, ignore_index=True)
    return table, line_panels(table, _x_title(source))


def _shared_title(titles: Sequence[str]) -> str:
    """Return what all titles have before their last comma, or else all of them."""
    shared = {title.rpartition(", ")[0] for title in titles}
    return shared.pop() if len(titles) > 1 and len(shared) == 1 and "" not in shared else " and ".join(titles)


def _line(source: Source, series: pd.Series, quantity: str) -> pd.Series:
    """Return names for the legend: the model, the quantity, or both if there are several of each."""
    if not quantity:
        return series
    several = len({model.series for model in source.models.values()}) > 1
    return series + f": {quantity}" if several else series.map(lambda _: quantity)


def _x_title(source: Source) -> str:
    swept = [model.setting for model in source.models.values() if model.setting and model.epoch is None]
    settings = {setting.partition("=")[0] for setting in swept}
    return " or ".join(sorted(settings)) or "epoch"


def scatter(
    source: Source, *, x: str, y: str, scorer: str | None = None, ood: str = MEAN, edges: Sequence[float] = ()
) -> Drawn:
    """Draw one quantity against another: a point for each seed and epoch.

    Args:
        source: the results.
        x, y: quantities, see ``lines``.
        scorer, ood: as for ``lines``.
        edges: last epochs of the groups that share a color.
    """
    label = source.scorer(scorer)
    both = [values(source, name, label, ood).set_index(["line", "x", "checkpoint"])["value"] for name in (x, y)]
    table = pd.concat(both, axis=1, join="inner", keys=["x", "y"]).rename_axis(["model", "epoch", "seed"]).reset_index()
    table["line"] = [
        _epochs(epoch, edges) if edges else model for epoch, model in zip(table["epoch"], table["model"], strict=True)
    ]
    return table, scatter_panel(table.sort_values("epoch", kind="stable"), title_of(x), title_of(y))


def _epochs(epoch: float, edges: Sequence[float]) -> str:
    after = [edge for edge in edges if edge < epoch]
    until = [edge for edge in edges if edge >= epoch]
    return " ".join(filter(None, ("epochs", f"after {after[-1]}" if after else "", f"to {until[0]}" if until else "")))


def comparison(source: Source, *, y: Sequence[str], x: Literal["ood", "scorer"] = "ood") -> Drawn:
    """Draw metrics of all scorers of the part: bars by OoD set, or lines over the scorers.

    Args:
        source: the results.
        y: a panel for each metric.
        x: ``"ood"`` has a group of bars for each OoD set and their mean, ``"scorer"`` a line for each of them.
    """
    if x not in ("ood", "scorer"):
        raise BadInput(f'the figure\'s x is {x!r}: give "ood" or "scorer".')
    part, frames = source.part, []
    scorers = [table.label for table in part.scorer_tables]
    for name in y:
        for ood in (*part.ood, *([MEAN] if len(part.ood) > 1 else [])):
            for scorer in scorers:
                found = values(source, name, scorer, ood)
                frames.append(found.assign(panel=title_of(name), scorer=scorer, ood=ood))
    line = "scorer" if x == "ood" else "ood"
    table = over_seeds(pd.concat(frames).assign(model=lambda of: of["line"]), ["panel", "model", "scorer", "ood"])
    if table["model"].nunique() > 1:
        table["panel"] = table["model"] + ": " + table["panel"]
    shown = table.assign(line=table[line], x=table[x])
    return table, bar_panels(shown, "") if x == "ood" else line_panels(shown, "")


def histograms(source: Source, *, scorers: Sequence[str] = ()) -> Drawn:
    """Draw the distributions of scores on the ID set and each OoD set: a panel for each model and scorer.

    Args:
        source: the results, of which the first checkpoint of each model is drawn.
        scorers: labels of the scorers; all by default.
    """
    chosen = [source.scorer(label) for label in scorers] or [table.label for table in source.part.scorer_tables]
    panels, rows = {}, []
    for unit in source.results.scored:
        for scorer in chosen if unit.part == source.part.title else ():
            title = f"{unit.model}: {scorer}"
            if title in panels or scorer not in unit.scores:
                continue
            sets = {name: np.asarray(scores) for name, scores in unit.scores[scorer].items()}
            outside = {name: scores for name, scores in sets.items() if name != "id"}
            panels[title] = Panel(sets["id"], outside)
            edges = bin_edges(sets["id"], [*outside.values()])
            for name, scores in sets.items():
                bins = zip(edges[:-1], edges[1:], heights(scores, edges), strict=True)
                rows += [(unit.model, scorer, name, low, high, height) for low, high, height in bins]
    if not panels:
        raise EmptyInput("nothing was scored: train or get what is missing first.")
    table = pd.DataFrame(rows, columns=["model", "scorer", "set", "low", "high", "height"])
    return table, score_histograms(panels, columns=min(3, len(panels)))


def norm_bins(source: Source, *, bins: int = 125, scale: float = 1.0) -> Drawn:
    """Draw accuracy and softmax by feature norm, see ``ood_scores.evaluation.feature_norms.norm_bins``."""
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for unit in source.first_units():
        sets, _ = source.feature_sets(unit)
        tables[unit.model] = {
            name: norm_bin_table(feats, bins, scale=scale, labeled=name == source.part.id)
            for name, feats in sets.items()
            if name != source.part.auxiliary
        }
    if not tables:
        raise EmptyInput("no network or dataset is available: train or get what is missing first.")
    frames = [frame.assign(model=model, set=name) for model, sets in tables.items() for name, frame in sets.items()]
    figure = norm_bin_curves(tables)
    return pd.concat(frames, ignore_index=True), figure


def norm_groups(source: Source, *, edges: Sequence[float]) -> Drawn:
    """Draw how much the features of the ID test set change in all, by norm in the last epoch: a panel for each series.

    Args:
        source: the results, of which the first seed is drawn.
        edges: edges of the norm groups, see ``ood_scores.evaluation.feature_norms.norm_groups``.
    """
    frames = []
    for series in dict.fromkeys(model.series for model in source.models.values()):
        units = [unit for unit in source.first_units() if source.models[unit.model].series == series]
        units.sort(key=lambda unit: source.models[unit.model].epoch or 0)
        if len(units) < 2:
            continue
        epochs = [source.models[unit.model].epoch for unit in units]
        found = norm_group_table([source.feature_sets(unit)[0][source.part.id] for unit in units], edges)
        found = found[found["rows"] > 0]
        start = found.drop_duplicates("group").assign(epoch=0, change=0.0, total=0.0)
        found = pd.concat([start, found], ignore_index=True)
        found["x"] = [epochs[number] for number in found["epoch"]]
        found["line"] = [_range(low, high) for low, high in zip(found["low"], found["high"], strict=True)]
        frames.append(found.assign(panel=series, mean=found["total"], sd=np.nan))
    if not frames:
        raise EmptyInput("no model has two epochs: train or get what is missing first.")
    table = pd.concat(frames, ignore_index=True)
    return table, line_panels(table, "epoch (total change since the first)")


def _range(low: float, high: float) -> str:
    return f"norm {low:g} to {high:g}" if np.isfinite(high) else f"norm from {low:g}"


def singular_values(source: Source, *, first: int = 200) -> Drawn:
    """Draw the singular values of the fit set, and the extent of the ID and OoD sets in its directions.

    The first model of the part is drawn; see ``ood_scores.evaluation.neural_collapse.singular_values``.
    """
    for unit in source.first_units():
        sets, fit = source.feature_sets(unit)
        if fit is not None:
            sets.pop(source.part.auxiliary or "", None)
            table = singular_value_table(fit, sets, name=source.part.fit or "fit")
            return table, singular_value_curves(table, first)
    raise EmptyInput("no network or fit set is available: train or get what is missing first.")


def embedding(source: Source, *, rows: int = 5000) -> Drawn:
    """Draw the features of the fit set of models that have two, colored by class.

    Args:
        source: the results.
        rows: number of evenly spaced rows of each model to draw.
    """
    table = pd.concat([*_embedded(source, rows), pd.DataFrame(columns=["panel", "line", "x", "y"])])
    return table, embedding_panels(table)


def _embedded(source: Source, rows: int) -> Iterable[pd.DataFrame]:
    for unit in source.first_units():
        _, fit = source.feature_sets(unit)
        if fit is None:
            continue
        if fit.num_features != 2:
            raise BadInput(f"{unit.model} has {fit.num_features} features: an embedding is drawn of two.")
        chosen = np.linspace(0, len(fit) - 1, min(rows, len(fit))).round().astype(int)
        features: Any = np.asarray(fit.features[:])[chosen]
        labels = fit.class_labels().cpu().numpy()[chosen]
        frame = pd.DataFrame(
            {"panel": unit.model, "line": labels.astype(str), "x": features[:, 0], "y": features[:, 1]}
        )
        yield frame.sort_values("line", kind="stable")


def options_of(plot: str) -> dict[str, bool]:
    """Return the options of a plot, and whether each is required."""
    parameters = inspect.signature(PLOTS[plot]).parameters.values()
    keywords = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    return {each.name: each.default is each.empty for each in keywords}


_ALL: tuple[Callable[..., Drawn], ...] = (
    lines,
    scatter,
    comparison,
    histograms,
    norm_bins,
    norm_groups,
    singular_values,
    embedding,
)
PLOTS: Registry[Callable[..., Drawn]] = Registry("plot", {plot.__name__: plot for plot in _ALL})
"""Plots by name. Their keyword-only parameters are the options of a ``[figure]`` table."""
