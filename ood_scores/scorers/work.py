"""What scorers will cost, estimated from the sizes of the sets before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ood_scores.features import FeatureSet
from ood_scores.progress import LARGE, tell, tells_costs

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

MINUTE = 60.0
FASTEST = 1e10
"""Operations per second of a slow processor: what needs less than a minute there is not looked at."""

SIDE = 1024
"""The side of the matrices whose product measures the speed of the device."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a problem: rows of the fit set (0 without one), rows to score, features, and classes."""

    fit_rows: int
    rows: int
    features: int
    classes: int


@dataclass(frozen=True)
class Work:
    """What a scorer needs besides a few passes over the sets and the statistics that many scorers share.

    Args:
        operations: Operations at the speed of a product of float32 matrices, such as ``2 N D C`` for N rows and a
            ``[D, C]`` matrix.
        memory: Bytes that it keeps.
    """

    operations: float = 0.0
    memory: float = 0.0


def search_of(bank: float, rows: int, width: int) -> Work:
    """Return the work of comparing each row with each row of a bank, which is kept twice if faiss searches."""
    return Work(2.0 * bank * rows * width, 8.0 * bank * width)


def tell_costly(scorers: Mapping[str, Scorer], fit: FeatureSet | None, sets: Sequence[FeatureSet]) -> None:
    """Print, within ``showing_work``, the scorers that will take more than a minute or keep more than 1 GB."""
    if not tells_costs():
        return
    first = sets[0]
    sizes = Sizes(len(fit) if fit else 0, sum(map(len, sets)), first.num_features, first.num_classes or 0)
    works = {label: scorer.work(sizes) for label, scorer in scorers.items()}
    slow = any(work.operations > FASTEST * MINUTE for work in works.values())
    speed = _speed(first.block_device) if slow else FASTEST
    told = [(work.operations / speed, label, work.memory) for label, work in works.items()]
    lines = [
        f"{label} ({cost})"
        for seconds, label, memory in sorted(told, reverse=True)
        if (cost := ", ".join([*_minutes(seconds), *_gigabytes(memory)]))
    ]
    if lines:
        tell(f"expected to be costly: {', '.join(lines)}")


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
