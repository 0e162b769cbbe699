"""Statistics of a feature set that fits ask for by name: one pass for all that ask, kept with the set.

A statistic is a small frozen dataclass; two scorers that ask for equal ones share the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.storage import statistics_store

FROM_LOGITS: Mapping[str, Callable[[Block], Tensor]] = {
    "softmax": Block.softmax,
    "max_logit": lambda block: block.max_logit()[:, None],
}
"""What else than columns there are means of, ``[B, K]``."""


class Accumulator(Protocol):
    """Takes blocks one after the other, then gives the result."""

    def update(self, block: Block) -> None: ...

    def result(self) -> Any: ...


class Statistic(Protocol):
    """What can be asked for: hashable, knows which columns it reads, and able to start an accumulator for a set."""

    @property
    def reads(self) -> Sequence[str]: ...

    def start(self, feats: FeatureSet) -> Accumulator: ...


@runtime_checkable
class Derivable(Statistic, Protocol):
    """A statistic that follows from another one of some sets."""

    def source(self, feats: FeatureSet) -> Statistic | None:
        """What it follows from; None for a set of which it is accumulated itself."""

    def derive(self, source: Any) -> Any: ...


def collect(
    feats: FeatureSet, wanted: Iterable[Statistic], spent: dict[Statistic, float] | None = None
) -> dict[Statistic, Any]:
    """The wanted statistics of the set; those it does not know yet are computed in one pass together.

    Args:
        feats: the set.
        wanted: the statistics.
        spent: gets the seconds that each took, without reading; 0 for one that was known.

    Raises:
        NotFinite: the set holds NaN or infinite values.
    """
    wanted = list(dict.fromkeys(wanted))
    seconds = {} if spent is None else spent
    seconds |= dict.fromkeys(wanted, 0.0)
    statistics_store.recall(feats, wanted)
    sources = {each: _source(each, feats) for each in wanted if each not in feats.statistics}
    statistics_store.recall(feats, sources.values())
    missing = [source for source in dict.fromkeys(sources.values()) if source not in feats.statistics]
    found, took = _accumulate(feats, missing)
    asked_by = {source: each for each, source in reversed(sources.items())} | {each: each for each in wanted}
    for statistic in missing:
        seconds[asked_by[statistic]] += took[statistic]
    known = {**feats.statistics, **found}
    for each, source in sources.items():
        if isinstance(each, Derivable) and source != each:
            found[each] = each.derive(known[source])
    if found:
        statistics_store.remember(feats, found)
    return {statistic: feats.statistics[statistic] for statistic in wanted}


def _accumulate(
    feats: FeatureSet, statistics: Sequence[Statistic]
) -> tuple[dict[Statistic, Any], dict[Statistic, float]]:
    """The results of the statistics, from one pass, and the seconds that each took."""
    accumulators = {statistic: statistic.start(feats) for statistic in statistics}
    seconds = dict.fromkeys(statistics, 0.0)
    if statistics:
        for block in feats.blocks(only={name for statistic in statistics for name in statistic.reads}):
            block.require_finite()
            for statistic, accumulator in accumulators.items():
                start = perf_counter()
                accumulator.update(block)
                seconds[statistic] += perf_counter() - start
    return {statistic: accumulator.result() for statistic, accumulator in accumulators.items()}, seconds


def _source(statistic: Statistic, feats: FeatureSet) -> Statistic:
    """What a statistic of the set follows from, or the statistic itself."""
    return (statistic.source(feats) if isinstance(statistic, Derivable) else None) or statistic


@dataclass(frozen=True)
class SampledRows:
    """Asks for features to take quantiles of, ``[M, D]``, in their own precision (half precision as float32).

    All rows as long as they hold at most ``values`` values in all, so that quantiles of them are exact; otherwise as
    many as that allows, evenly spaced, which is a fair sample unless the order of the rows repeats in the same rhythm.
    Kept with the set, as other statistics are: by default 256 MiB at most in float32, once for all that ask.
    """

    values: int = 2**26
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator:
        count = min(len(feats), max(1, self.values // max(feats.num_features, 1)))
        return _SampledRowsAccumulator(torch.arange(count) * len(feats) // count)


@dataclass(frozen=True)
class FeatureMean:
    """Asks for the mean of the features over all rows, float64 ``[D]``."""

    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator:
        return _FeatureMeanAccumulator()


def quantiles(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Quantiles along the first dimension, ``[len(shares), ...]`` on the CPU: those of ``numpy.quantile``.

    They are interpolated linearly. PyTorch's own takes no more than 2^24 values.
    """
    return torch.from_numpy(np.quantile(values.cpu().numpy(), list(shares), axis=0))


@dataclass
class _SampledRowsAccumulator:
    numbers: Tensor
    rows: Tensor | None = None

    def update(self, block: Block) -> None:
        if self.rows is None:
            self.rows = torch.empty(len(self.numbers), block.features.shape[1], dtype=block.features.dtype)
        first, last = torch.searchsorted(self.numbers, torch.tensor([block.start, block.start + len(block)])).tolist()
        chosen = self.numbers[first:last] - block.start
        self.rows[first:last] = block.features[chosen.to(block.features.device)].to(self.rows)

    def result(self) -> Tensor:
        if self.rows is None:
            raise BadInput("no block was read.")
        return self.rows


@dataclass
class _FeatureMeanAccumulator:
    """The sum of deviations from the first row, so that a large offset costs no digits; in float64 across blocks."""

    first: Tensor | None = None
    total: Tensor | float = 0.0
    rows: int = 0

    def update(self, block: Block) -> None:
        features = block.features
        self.first = features[0].clone() if self.first is None else self.first
        self.total = self.total + (features - self.first).sum(dim=0).double()
        self.rows += len(block)

    def result(self) -> Tensor:
        if self.first is None:
            raise BadInput("no block was read.")
        return self.first.double() + self.total / self.rows


@dataclass(frozen=True)
class GroupMeans:
    """How many rows each group has, int64 ``[G]``, and their means, float64 ``[G, K]`` (zeros for an empty group)."""

    counts: Tensor
    means: Tensor


@dataclass(frozen=True)
class Means:
    """Asks for the ``GroupMeans`` of ``"features"``, ``"logits"``, ``"softmax"``, ``"max_logit"`` or an extra.

    ``group``: ``"all"`` rows together, G = 1; by class, G = C, of the ``"label"`` or as ``"predicted"``; or
    ``"correct"``: by class, of the rows whose predicted class is their label.
    """

    space: str = "features"
    group: Literal["all", "label", "predicted", "correct"] = "all"

    @property
    def reads(self) -> Sequence[str]:
        space = "logits" if self.space in FROM_LOGITS else self.space
        return (space, "logits") if self.group in ("predicted", "correct") else (space,)

    def start(self, feats: FeatureSet) -> Accumulator:
        labels = feats.class_labels() if self.group in ("label", "correct") else None
        highest = 0 if labels is None else int(labels.max())
        return _MeansAccumulator(self, labels, 1 if self.group == "all" else feats.num_classes or highest + 1)


@dataclass(frozen=True)
class Logits:
    """Asks for the logits themselves, ``[N, C]`` on the CPU in the dtype blocks have them in (float32 or float64)."""

    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator:
        return _LogitsAccumulator(len(feats))


@dataclass
class _MeansAccumulator:
    statistic: Means
    labels: Tensor | None
    groups: int
    counts: Tensor | None = None
    sums: Tensor | None = None

    def update(self, block: Block) -> None:
        values = _values(block, self.statistic.space)
        if self.counts is None or self.sums is None:
            self.counts = torch.zeros(self.groups, dtype=torch.int64, device=values.device)
            self.sums = values.new_zeros(self.groups, values.shape[1], dtype=torch.float64)
        if self.statistic.group == "all":
            self.counts += len(block)
            self.sums += values.sum(dim=0, dtype=torch.float64)
            return
        group, values = self._grouped(block, values)
        self.counts += torch.bincount(group, minlength=self.groups)
        self.sums.index_add_(0, group, values.double())

    def _grouped(self, block: Block, values: Tensor) -> tuple[Tensor, Tensor]:
        """The group of each row that counts, and its values."""
        if self.labels is None:
            return block.prediction(), values
        labels = self.labels[block.start : block.start + len(block)].to(values.device)
        if self.statistic.group == "label":
            return labels, values
        correct = block.prediction() == labels
        return labels[correct], values[correct]

    def result(self) -> GroupMeans:
        if self.counts is None or self.sums is None:
            raise BadInput("no block was read.")
        return GroupMeans(self.counts, self.sums / self.counts.clamp_min(1)[:, None])


def _values(block: Block, space: str) -> Tensor:
    """A space as the block has it, or what is derived from its logits."""
    if space in FROM_LOGITS:
        return FROM_LOGITS[space](block)
    return getattr(block, space) if space in ("features", "logits") else block.extras[space]


@dataclass
class _LogitsAccumulator:
    length: int
    logits: Tensor | None = None

    def update(self, block: Block) -> None:
        if self.logits is None:
            self.logits = torch.empty(self.length, block.logits.shape[1], dtype=block.logits.dtype)
        self.logits[block.start : block.start + len(block)] = block.logits.cpu()

    def result(self) -> Tensor:
        if self.logits is None:
            raise BadInput("no block was read.")
        return self.logits
