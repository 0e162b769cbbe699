"""Monitor a stream of scores for drift from the calibration rows, with a test that may be read at any time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ood_scores.detector.betting import (
    Evidence,
    draw_wealth,
    initial_stakes,
    is_finite,
    is_whole,
    legend_above,
    log_wealth,
    read_state,
    require_evidence,
    require_valid,
    stakes_after,
    state_line,
    thinned,
)
from ood_scores.detector.conformal import Scores, check_shares, checked_scores, threshold_of
from ood_scores.errors import BadInput, EmptyInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT = "ood_scores monitor"
VERSION = 1

ODDS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Factors by which each of the bettors expects the odds of a rejection to rise after a drift."""


@dataclass
class Monitor(Evidence):
    """A running rejection rate, and a test for drift that may be read after every row; created by ``Monitor.of``.

    **Null hypothesis.** Calibration rows and rows of the stream are exchangeable, as independent draws from one
    distribution are. A new row is then equally likely to have any of the n + 1 + t ranks among the n calibration rows
    and the t rows seen, so that the probability that it is below the threshold, the ``rank``-th smallest calibration
    score, is exactly

        c = (rank + rows seen below it) / (n + 1 + t),

    whatever the distribution. This accounts for the size of the calibration set and for the rows seen since.

    **Test.** Bettors start with a total wealth of 1. A row below the threshold multiplies their stakes by q / c, any
    other row by (1 - q) / (1 - c). These bets are fair, so that the wealth is a martingale and ever reaches 1 / alpha
    with a probability of at most alpha (Ville's inequality): ``drifted(alpha)`` may be read after every row, and the
    stream may be stopped for any reason. Each bettor has its own rate q, of 1.25 to 30 times the odds
    rank : n + 1 - rank, and does not bet if c exceeds it. After t rows, a share of 1 / sqrt(t + 2) of the initial
    wealth has not yet been staked, so that there is something left to bet on a drift that starts late.

    **Limits.** A drift that does not change the share of rows below the threshold, or lowers it, is not detected. Rows
    that depend on each other, such as frames of one video, are not exchangeable: pass one frame per video. A drift at
    the very start can be distinguished from an unlucky calibration set only as far as n rows allow.

    For the test, rows whose score equals the threshold are randomly counted as above or below it, like the calibration
    rows tied with it; the random numbers are determined by ``seed`` and the row's number. The rejection rate does not
    count these rows.

    Sources: Vovk, Nouretdinov & Gammerman 2003, Testing exchangeability on-line (conformal martingales); Vovk 2021,
    Testing randomness online; Herbster & Warmuth 1998, Tracking the best expert (stakes set aside for a late change).

    Attributes:
        value: the threshold.
        n: the number of calibration rows.
        rank: the rank of the threshold among them; the smallest score has rank 1.
        cut: the share of the rows tied with the threshold that are counted as below it.
        seed: the seed of the random numbers that break ties.
        seen: the number of rows of the stream.
        rejected: the number of rows with a score below the threshold.
        below: the same, plus the rows tied with the threshold that were counted as below it.
        stakes: the logarithm of each bettor's stakes.
        peak: the logarithm of the highest wealth so far.
    """

    value: float
    n: int
    rank: int
    cut: float
    seed: int = 0
    seen: int = 0
    rejected: int = 0
    below: int = 0
    stakes: list[float] = field(default_factory=lambda: initial_stakes(len(ODDS)))
    peak: float = 0.0

    def __post_init__(self) -> None:
        self._curve = np.array([[self.seen], [self.rejected], [self._wealth()]])

    @classmethod
    def of(cls, calibration: Scores, keep: float = 0.95, *, delta: float | None = None, seed: int = 0) -> Monitor:
        """Create a monitor of the rows below ``threshold(calibration, keep, delta=delta)``.

        Args:
            calibration: the calibration scores ``[n]``, as in ``threshold``.
            keep, delta: the same as in ``threshold``.
            seed: the seed of the random numbers that break ties.

        Raises:
            BadInput: if there are too few rows for that threshold to reject any. Other errors are those of
                ``threshold``.
        """
        check_shares(keep=keep, delta=delta)
        scores = checked_scores(calibration, "calibration")
        found = threshold_of(scores, keep, delta)
        if found.rank == 0:
            raise BadInput(
                f"with {found.n} calibration rows no row can be rejected, so that there is nothing to monitor: "
                f"calibrate with more rows, or with a lower keep than {keep:g}."
            )
        places = found.rank - np.count_nonzero(scores < found.value)
        tied = np.count_nonzero(scores == found.value)
        cut = np.random.default_rng([seed, 1]).beta(places, tied - places + 1)
        return cls(found.value, found.n, found.rank, float(cut), seed)

    def update(self, scores: Scores) -> None:
        """Add the scores ``[m]`` of the next rows, in their order: ``monitor.update(prediction.score)``.

        Rows of images that could not be read have no score: leave them out, ``prediction.score[prediction.is_read]``.
        It does not matter how the stream is divided into updates. During an update, each row takes half a kilobyte.

        Raises:
            BadInput: the errors of ``threshold`` for scores; the monitor is then unchanged.
        """
        rows = checked_scores(scores, "stream")
        is_rejected = rows < self.value
        lots = np.random.Generator(np.random.PCG64(self.seed).advance(self.seen)).random(len(rows))
        is_below = is_rejected | ((rows == self.value) & (lots < self.cut))
        seen = self.seen + np.arange(1, len(rows) + 1)
        rejected = self.rejected + np.cumsum(is_rejected)
        below = self.below + np.cumsum(is_below)
        chance = (self.rank + below - is_below) / (self.n + seen)
        stakes = self._stakes_after(is_below, chance, seen)
        wealth = log_wealth(stakes, seen)
        self.seen, self.rejected, self.below = int(seen[-1]), int(rejected[-1]), int(below[-1])
        self.stakes, self.peak = stakes[:, -1].tolist(), max(self.peak, float(wealth.max()))
        self._curve = thinned(np.concatenate([self._curve, [seen, rejected, wealth]], axis=1))

    @property
    def rejection_rate(self) -> float:
        """The share of rows rejected so far; NaN before the first row."""
        return self.rejected / self.seen if self.seen else math.nan

    @property
    def expected_rate(self) -> float:
        """The rejection rate without drift, on average over calibration sets: rank / (n + 1)."""
        return self.rank / (self.n + 1)

    @property
    def bets(self) -> int:
        """The number of bets so far: one on each of the rows."""
        return self.seen

    def to_json(self) -> str:
        """Return the state as one line of JSON, from which ``from_json`` continues."""
        return state_line(FORMAT, VERSION, asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Monitor:
        """Restore a monitor from ``to_json``; it continues with the same values, bit for bit. Its figure starts anew.

        Raises:
            BadInput: if the line is not the state of a monitor, has a value that cannot be right, or was written by a
                newer version of this package.
        """
        state = read_state(line, FORMAT, VERSION, [each.name for each in fields(cls)])
        _check(state)
        return cls(**state)

    def plot(self, alpha: float = 0.01) -> Figure:
        """Plot the rejection rate (top) and the e-value (bottom) over the rows, and mark when it reached 1 / alpha.

        The curves have at most a thousand points and start when the monitor was created or loaded. The figure has no
        window: ``monitor.plot().savefig("monitor.png", dpi=150)``.

        Raises:
            EmptyInput: if there are no rows since then.
            BadInput: if alpha is not in (0, 1).
        """
        from ood_scores.plotting.style import new_figure

        check_shares(alpha=alpha)
        if self.seen == self._curve[0, 0]:
            raise EmptyInput("no row was added since this monitor was created or loaded: update it first.")
        now = [[self.seen], [self.rejected], [self._wealth()]]
        curve = np.concatenate([self._curve, now], axis=1)
        figure = new_figure(7, 4.4)
        rates, wealth = figure.subplots(2, 1, sharex=True)
        _draw_rates(rates, curve, self.expected_rate)
        draw_wealth(wealth, curve[0], curve[2], alpha)
        figure.align_ylabels()
        return figure

    def _stakes_after(
        self, is_below: NDArray[np.bool_], chance: NDArray[np.float64], seen: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the logarithm of the stakes ``[G, m]`` after each row: earlier stakes after the bet, plus new ones."""
        odds = np.array(ODDS)[:, None] * self.rank / (self.n + 1 - self.rank)
        rates = np.maximum(odds / (1 + odds), chance)
        pays = np.where(is_below, np.log(rates / chance), np.log((1 - rates) / (1 - chance)))
        return stakes_after(self.stakes, pays, seen)


def _check(state: Mapping[str, Any]) -> None:
    require_valid(state, "value", lambda value: is_finite(value) or value in (-math.inf, math.inf), "a number")
    require_valid(state, "n", lambda n: is_whole(n, 1), "a whole number of at least 1")
    require_valid(
        state, "rank", lambda rank: is_whole(rank, 1, state["n"]), f"a whole number from 1 to n = {state['n']}"
    )
    require_valid(state, "cut", lambda cut: is_finite(cut) and 0 <= cut <= 1, "a number from 0 to 1")
    require_valid(state, "seen", is_whole, "a whole number of at least 0")
    for name, most in (("below", "seen"), ("rejected", "below")):
        limit = state[most]
        require_valid(state, name, partial(is_whole, most=limit), f"a whole number from 0 to {most} = {limit}")
    require_evidence(state, len(ODDS))


def _draw_rates(axes: Axes, curve: NDArray[np.float64], expected: float) -> None:
    """Draw the rate so far, and the rate of the last rows: a twentieth of all."""
    from ood_scores.plotting.style import ID_COLOR, OOD_COLORS

    seen, rejected, _ = curve
    window = max(1.0, (seen[-1] - seen[0]) / 20)
    ends = np.interp(np.maximum(seen - window, seen[0]), seen, rejected)
    with np.errstate(invalid="ignore"):
        lately = (rejected - ends) / np.minimum(seen - seen[0], window)
        so_far = rejected / seen
    axes.plot(seen, lately, color=ID_COLOR, linewidth=1.0, label=f"last {window:,.0f} rows")
    axes.plot(seen, so_far, color=OOD_COLORS[0], linewidth=1.6, label="so far")
    axes.axhline(expected, color="black", linewidth=0.8, linestyle="--", label=f"expected, {expected:.3g}")
    axes.set_ylabel("rejection rate", fontsize=9)
    axes.set_ylim(bottom=0)
    legend_above(axes)
