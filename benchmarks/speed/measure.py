"""Paired timing: a function and its baseline alternate, so that both run under the same conditions."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Line:
    """Median times of paired runs in seconds, ours and of the baseline, and the required ratio, if any."""

    name: str
    baseline: str
    ours_s: float
    baseline_s: float
    better: Better
    asked: float | None = None
    pairs: int = 1

    @property
    def ratio(self) -> float:
        """Our speed over that of the baseline (``better="higher"``), or our time over its time (``"lower"``)."""
        return self.baseline_s / self.ours_s if self.better == "higher" else self.ours_s / self.baseline_s

    @property
    def met(self) -> bool | None:
        if self.asked is None:
            return None
        return self.ratio >= self.asked if self.better == "higher" else self.ratio <= self.asked


@dataclass(frozen=True)
class Figure:
    """A number that is not a ratio of times, how it was measured, and its required bounds, if any."""

    name: str
    how: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.least is None and self.most is None:
            return None
        return (self.least or 0.0) <= self.value <= (math.inf if self.most is None else self.most)


def paired(
    name: str,
    ours: Callable[[], object],
    baseline_name: str,
    baseline: Callable[[], object],
    *,
    better: Better,
    asked: float | None = None,
    pairs: int = 7,
    ours_share: float = 1.0,
    baseline_share: float = 1.0,
) -> Line:
    """Measure the medians over ``pairs`` alternating runs, after one warm-up run of each.

    A function may do only a share of the work, or a multiple of it; its time is divided by this share.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs + 1):
        for function, seconds in zip((ours, baseline), times, strict=True):
            taken = timed(function)
            if turn:
                seconds.append(taken)
    ours_s, baseline_s = (statistics.median(seconds) for seconds in times)
    return Line(name, baseline_name, ours_s / ours_share, baseline_s / baseline_share, better, asked, pairs)


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of one call, including the work that it started on a GPU."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def exponent(runs: Sequence[tuple[int, Callable[[], object]]], rounds: int = 5) -> float:
    """Fit the slope of log time over log size by least squares.

    The time for a size is the median of ``rounds`` runs, which alternate between sizes, after a warm-up run.
    """
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for seconds, (_, run) in zip(times, runs, strict=True):
            taken = timed(run)
            if turn:
                seconds.append(taken)
    medians = [statistics.median(seconds) for seconds in times]
    sizes = [math.log(size) for size, _ in runs]
    return statistics.linear_regression(sizes, list(map(math.log, medians))).slope


def scaled(scale: float, size: int, least: int = 1) -> int:
    """Multiply a size by the option ``--scale``."""
    return max(least, round(scale * size))


@dataclass(frozen=True)
class Product:
    """A product of two square matrices, which measures the computing speed of the machine."""

    side: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def flops(self) -> float:
        return 2.0 * self.side**3

    def runner(self) -> Callable[[], object]:
        left, right, out = (torch.rand(self.side, self.side, dtype=self.dtype, device=self.device) for _ in range(3))
        return lambda: torch.mm(left, right, out=out)

    def __str__(self) -> str:
        return f"{self.side:,} x {self.side:,} {str(self.dtype).removeprefix('torch.')} product"
