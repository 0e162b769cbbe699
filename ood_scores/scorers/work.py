"""What scorers will cost, estimated from the sizes of the sets before anything is computed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ood_scores.features import FeatureSet
from ood_scores.features.statistics.base import Costly, Statistic
from ood_scores.features.statistics.collect import sources_of
from ood_scores.progress import LARGE, tell, tells_costs
from ood_scores.runtime import CPU

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

MINUTE = 60.0
FASTEST = 1e10
"""Operations per second of a slow processor: what needs less than a minute there is not looked at."""

SIDE = 1024
"""The side of the matrices whose product measures the speed of the device."""

NAMED = 4
"""The most scorers that are listed for a statistic that they share."""

EXTRAS = "extras/"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem: rows of the fit set (0 without one), rows to score, features, and classes.

    ``extras`` has the number of values in a row of each extra, by its name.
    """

    fit_rows: int
    rows: int
    features: int
    classes: int
    extras: Mapping[str, int] = field(default_factory=dict)

    def width(self, name: str) -> int:
        """Return the number of values in a row of the features, the logits, or an extra."""
        return {"features": self.features, "logits": self.classes, **self.extras}.get(name, 0)

    def below(self, name: str) -> list[str]:
        """Return the extras ``name.<part>`` of all parts."""
        return [extra for extra in self.extras if extra.startswith(f"{name}.")]


@dataclass(frozen=True)
class Work:
    """What a scorer needs besides a few passes over the sets and the statistics that it may share with others.

    Args:
        operations: Operations at the speed of a product of float32 matrices, such as ``2 N D C`` for N rows and a
            ``[D, C]`` matrix.
        memory: Bytes that it keeps.
    """

    operations: float = 0.0
    memory: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.memory + other.memory)


def search_of(bank: float, rows: int, width: int) -> Work:
    """Return the work of comparing each row with each row of a bank, which is kept twice if faiss searches."""
    return Work(2.0 * bank * rows * width, 8.0 * bank * width)


def work_alone(scorer: Scorer, sizes: Sizes) -> Work:
    """Return the work of a scorer inside another one, with that of its statistics, which it shares with none."""
    statistics = [each for each in scorer.statistics() if isinstance(each, Costly)]
    return sum((_work_of(each, sizes) for each in statistics), scorer.work(sizes))


def _work_of(statistic: Costly, sizes: Sizes) -> Work:
    return Work(statistic.operations(sizes.fit_rows, sizes.width(statistic.space)))


def tell_costly(scorers: Mapping[str, Scorer], fit: FeatureSet | None, sets: Sequence[FeatureSet]) -> None:
    """Print, within ``showing_work``, what will take more than a minute or keep more than 1 GB."""
    if not tells_costs():
        return
    lines = costly(scorers, sizes_of(fit, sets), sets[0].block_device, _not_collected(scorers, fit))
    if lines:
        tell(f"expected to be costly: {', '.join(lines)}")


def costly(
    scorers: Mapping[str, Scorer],
    sizes: Sizes,
    device: torch.device = CPU,
    is_new: Callable[[Statistic], bool] = lambda statistic: True,
) -> list[str]:
    """Return the scorers, and the statistics that they share, that will take more than a minute or keep more than 1 GB.

    Args:
        scorers: The scorers by label.
        sizes: The sizes of the sets.
        device: Where scores are computed.
        is_new: Whether a statistic has to be collected.

    Returns:
        Each with its time and memory, the slowest first.
    """
    works = {label: scorer.work(sizes) for label, scorer in scorers.items()}
    shared: dict[str, list[str]] = {}
    for label, scorer in scorers.items():
        for statistic in scorer.statistics():
            if isinstance(statistic, Costly) and is_new(statistic):
                works[statistic.title] = _work_of(statistic, sizes)
                shared.setdefault(statistic.title, []).append(label)
    slow = any(work.operations > FASTEST * MINUTE for work in works.values())
    speed = _speed(device) if slow else FASTEST
    told = sorted([(work.operations / speed, name, work.memory) for name, work in works.items()], reverse=True)
    return [
        f"{name}{_users(shared.get(name, ()))} ({cost})"
        for seconds, name, memory in told
        if (cost := ", ".join([*_minutes(seconds), *_gigabytes(memory)]))
    ]


def sizes_of(fit: FeatureSet | None, sets: Sequence[FeatureSet]) -> Sizes:
    """Return the sizes of a fit set, if there is one, and of the sets to score."""
    columns = {**sets[0].columns, **(fit.columns if fit else {})}
    extras = {
        name.removeprefix(EXTRAS): math.prod(column.shape[1:])
        for name, column in columns.items()
        if name.startswith(EXTRAS)
    }
    first = sets[0]
    return Sizes(len(fit) if fit else 0, sum(map(len, sets)), first.num_features, first.num_classes or 0, extras)


def _not_collected(scorers: Mapping[str, Scorer], fit: FeatureSet | None) -> Callable[[Statistic], bool]:
    """Return a function that tells whether a statistic does not follow from those that a fit set has."""
    if fit is None:
        return lambda statistic: True
    known = fit.statistics
    sources = sources_of(fit, [each for scorer in scorers.values() for each in scorer.statistics()])
    return lambda statistic: statistic in sources and sources[statistic] not in known


def _users(labels: Sequence[str]) -> str:
    """Return the scorers that share a statistic, in a few words."""
    if not labels:
        return ""
    named = labels if len(labels) <= NAMED else [*labels[: NAMED - 1], f"{len(labels) - NAMED + 1} more"]
    return f" for {' and '.join([', '.join(named[:-1]), named[-1]] if named[1:] else named)}"


def _minutes(seconds: float) -> list[str]:
    if seconds < MINUTE:
        return []
    hours = seconds / MINUTE**2
    return [f"about {hours:,.0f} h" if hours >= 1.5 else f"about {seconds / MINUTE:.0f} min"]


def _gigabytes(memory: float) -> list[str]:
    return [f"{memory / 2**30:,.1f} GB"] if memory >= LARGE else []


def _speed(device: torch.device) -> float:
    """Return the operations per second of a product of matrices on a device."""
    side = SIDE if device.type == "cpu" else 8 * SIDE
    matrix = torch.ones(side, side, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)
