"""Collecting statistics: one pass over a feature set computes all of them, and the set keeps the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ood_scores.features.featureset import FeatureSet
from ood_scores.features.finite_pass import FinitePass
from ood_scores.features.statistics.base import Derivable, Found, Statistic
from ood_scores.features.storage import statistics_store
from ood_scores.progress import tells_costs, worked, working
from ood_scores.runtime import Cost, default_torch_state


@default_torch_state()
def collect(feats: FeatureSet, wanted: Iterable[Statistic], spent: dict[Statistic, Cost] | None = None) -> Found:
    """Collect statistics of a set; those that are not known yet are computed in one pass.

    Args:
        feats: The set.
        wanted: The statistics.
        spent: Receives the cost of each statistic, without reading; nothing for one that was known.

    Raises:
        NotFinite: if the columns that are read hold NaN or infinite values.
    """
    wanted = list(dict.fromkeys(wanted))
    costs = {} if spent is None else spent
    costs |= {each: Cost() for each in wanted}
    sources = sources_of(feats, wanted)
    missing = [source for source in dict.fromkeys(sources.values()) if source not in feats.statistics]
    found, took = _accumulate(feats, missing)
    asked_by = {source: each for each, source in reversed(sources.items())} | {each: each for each in wanted}
    for statistic in missing:
        costs[asked_by[statistic]] += took[statistic]
    known = {**feats.statistics, **found}
    for each, source in sources.items():
        if isinstance(each, Derivable) and source != each:
            found[each] = each.derive(known[source])
    if found:
        statistics_store.remember(feats, found)
    return Found({statistic: feats.statistics[statistic] for statistic in wanted})


def sources_of(feats: FeatureSet, wanted: Sequence[Statistic]) -> dict[Statistic, Statistic]:
    """Return, for each statistic that a set does not have yet, the statistic that it follows from, or itself."""
    statistics_store.recall(feats, wanted)
    sources = {each: _source(each, feats) for each in wanted if each not in feats.statistics}
    statistics_store.recall(feats, sources.values())
    return sources


def _accumulate(
    feats: FeatureSet, statistics: Sequence[Statistic]
) -> tuple[dict[Statistic, Any], dict[Statistic, Cost]]:
    """The results of statistics from one pass, and the cost of each."""
    accumulators = {statistic: statistic.start(feats) for statistic in statistics}
    costs, memory = {statistic: Cost() for statistic in statistics}, tells_costs()
    if statistics:
        working(f"collecting {len(statistics)} statistics of the fit set", len(feats), "rows")
        whole = FinitePass(feats, sorted({name for statistic in statistics for name in statistic.reads}))
        for block in whole.blocks():
            with whole.used(block):
                for statistic, accumulator in accumulators.items():
                    with costs[statistic].measured(memory):
                        accumulator.update(block)
            worked(block.start + len(block))
    return {statistic: accumulator.result() for statistic, accumulator in accumulators.items()}, costs


def _source(statistic: Statistic, feats: FeatureSet) -> Statistic:
    """The statistic that another one follows from, or the statistic itself."""
    return (statistic.source(feats) if isinstance(statistic, Derivable) else None) or statistic
