"""Watching a stream: has it drifted from the calibration rows, whenever one cares to look?"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ood_scores.detector.conformal import Scores, check_shares, checked_scores, threshold_of
from ood_scores.errors import BadInput, EmptyInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT = "ood_scores monitor"
VERSION = 1

ODDS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""How many times the odds of a rejection the bettors expect after a drift, one each."""

POINTS = 1000
"""Most points of a curve in the picture."""


@dataclass
class Monitor:
    """A running rejection rate, and a test of drift that may be read after every row; made by ``Monitor.of``.

    **What is tested.** That calibration rows and rows of the stream are exchangeable, as independent draws from one
    distribution are. Then a new row is as likely to take any of the n + 1 + t places among the n calibration rows and
    the t rows seen, so that it lies below the threshold, the ``rank``-th smallest calibration score, with a
    probability of exactly

        c = (rank + rows seen below it) / (n + 1 + t),

    whatever the distribution. The calibration set is accounted for, and so is what the stream has taught since.

    **How.** Bettors start with 1 in all. A row below multiplies their stakes by q / c, another by (1 - q) / (1 - c).
    These bets are fair, so that the wealth is a martingale and reaches 1 / alpha at any time with a probability of at
    most alpha (Ville's inequality): ``drifted(alpha)`` may be read after every row, and the stream stopped for any
    reason. Each bettor has a rate q of its own, of 1.25 to 30 times the odds rank : n + 1 - rank, and bets nothing
    where c exceeds it. After t rows 1 / sqrt(t + 2) of what they started with has not yet been staked, so that there is
    something to bet on a drift that begins late.

    **What it does not see:** a drift that leaves the share of rows below the threshold as it is, or lowers it. Rows
    that depend on each other, such as frames of one video, are not exchangeable: pass one of each. A drift right at
    the start can be told from an unlucky calibration set only as far as n rows allow.

    Rows with exactly the threshold's score are above or below by lot, as the calibration rows tied with it are; the
    lots follow from ``seed`` and the row's number. That is for the test; the rejection rate does not count these rows.

    Sources: Vovk, Nouretdinov & Gammerman 2003, Testing exchangeability on-line (conformal martingales); Vovk 2021,
    Testing randomness online; Herbster & Warmuth 1998, Tracking the best expert (stakes set aside for a late change).

    Attributes:
        value: the threshold.
        n: calibration rows.
        rank: the threshold's place among them, the smallest being 1.
        cut: share of the rows tied with the threshold that lie below it.
        seed: of the lots.
        seen: rows of the stream.
        rejected: those with a score less than the threshold.
        below: the same and those tied with it that lie below by lot.
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
    stakes: list[float] = field(default_factory=lambda: [math.log(1 - _reserve(0))] * len(ODDS))
    peak: float = 0.0

    def __post_init__(self) -> None:
        self._curve = np.array([[self.seen], [self.rejected], [self._wealth()]])

    @classmethod
    def of(cls, calibration: Scores, keep: float = 0.95, *, delta: float | None = None, seed: int = 0) -> Monitor:
        """A monitor of the rows below ``threshold(calibration, keep, delta=delta)``.

        Args:
            calibration: [n] calibration scores, as in ``threshold``.
            keep, delta: as in ``threshold``.
            seed: of the lots that break ties.

        Raises:
            BadInput: too few rows for that threshold to reject anything. Besides, what ``threshold`` raises.
        """
        check_shares(keep=keep, delta=delta)
        scores = checked_scores(calibration, "calibration")
        found = threshold_of(scores, keep, delta)
        if found.rank == 0:
            raise BadInput(
                f"with {found.n} calibration rows no row can be rejected, so that there is nothing to watch: calibrate "
                f"with more, or with a lower keep than {keep:g}."
            )
        places = found.rank - np.count_nonzero(scores < found.value)
        tied = np.count_nonzero(scores == found.value)
        cut = np.random.default_rng([seed, 1]).beta(places, tied - places + 1)
        return cls(found.value, found.n, found.rank, float(cut), seed)

    def update(self, scores: Scores) -> None:
        """Takes in the scores [m] of the next rows, in their order: ``monitor.update(prediction.score)``.

        How the stream is cut into updates does not matter. A row takes half a kilobyte until the update is done.

        Raises: what ``threshold`` raises for scores; the monitor is then as it was.
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
        wealth = _wealth(stakes, seen)
        self.seen, self.rejected, self.below = int(seen[-1]), int(rejected[-1]), int(below[-1])
        self.stakes, self.peak = stakes[:, -1].tolist(), max(self.peak, float(wealth.max()))
        self._curve = _thinned(np.concatenate([self._curve, [seen, rejected, wealth]], axis=1))

    @property
    def rejection_rate(self) -> float:
        """The share of rows rejected so far; NaN before the first."""
        return self.rejected / self.seen if self.seen else math.nan

    @property
    def expected_rate(self) -> float:
        """The rejection rate without drift, on average over calibration sets: rank / (n + 1)."""
        return self.rank / (self.n + 1)

    @property
    def e_value(self) -> float:
        """The bettors' wealth now: 1 at the start, and without drift on average 1, even if one stops by it."""
        return _exp(self._wealth())

    @property
    def p_value(self) -> float:
        """1 / the highest wealth so far; without drift it is ever at most alpha with a probability of at most alpha."""
        return math.exp(-self.peak)

    def drifted(self, alpha: float = 0.01) -> bool:
        """Whether the stream has drifted; says so of a stream without drift with a probability of at most ``alpha``.

        Once true it stays true: after the cause is removed, start a new monitor.

        Raises:
            BadInput: alpha outside (0, 1).
        """
        check_shares(alpha=alpha)
        return self.p_value <= alpha

    def to_json(self) -> str:
        """The state as one line of JSON, from which ``from_json`` goes on."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, line: str) -> Monitor:
        """The monitor that ``to_json`` wrote; it goes on with the same values bit for bit. Its picture starts anew.

        Raises:
            BadInput: the line is not the state of a monitor, or a newer version of this package wrote it.
        """
        try:
            state = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"this line is not the state of a monitor, or not all of it ({error}).") from error
        if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
            raise BadInput("this line is not the state of a monitor: pass what to_json() gave.")
        if (version := state.pop("version", None)) != VERSION:
            raise BadInput(
                f"this state of a monitor is of version {version}, this package reads version {VERSION}: use the "
                "package that wrote it, or start a new monitor."
            )
        if state.keys() != {each.name for each in fields(cls)}:
            raise BadInput("this line is not the state of a monitor, or not all of it: start a new monitor.")
        return cls(**state)

    def plot(self, alpha: float = 0.01) -> Figure:
        """The rejection rate (above) and the e-value (below) over the rows, and when it reached 1 / alpha.

        The points, a thousand at most, are those since the monitor was made or loaded. The figure belongs to no window:
        ``monitor.plot().savefig("monitor.png", dpi=150)``.

        Raises:
            EmptyInput: there has been no row since.
            BadInput: alpha outside (0, 1).
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        check_shares(alpha=alpha)
        if self.seen == self._curve[0, 0]:
            raise EmptyInput("there has been no row since this monitor was made or loaded: update it first.")
        now = [[self.seen], [self.rejected], [self._wealth()]]
        curve = np.concatenate([self._curve, now], axis=1)
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        rates, wealth = figure.subplots(2, 1, sharex=True)
        _draw_rates(rates, curve, self.expected_rate)
        _draw_wealth(wealth, curve, alpha)
        figure.align_ylabels()
        return figure

    def _stakes_after(
        self, is_below: NDArray[np.bool_], chance: NDArray[np.float64], seen: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The logarithm of the stakes [G, m] after each row: what it made of those before, and what is added."""
        odds = np.array(ODDS)[:, None] * self.rank / (self.n + 1 - self.rank)
        rates = np.maximum(odds / (1 + odds), chance)
        pays = np.where(is_below, np.log(rates / chance), np.log((1 - rates) / (1 - chance)))
        total = np.cumsum(pays, axis=1)
        added = np.log(_reserve(seen - 1) - _reserve(seen))
        staked = np.concatenate([np.array(self.stakes)[:, None], added - total], axis=1)
        return total + np.logaddexp.accumulate(staked, axis=1)[:, 1:]

    def _wealth(self) -> float:
        return float(_wealth(np.array(self.stakes)[:, None], np.array([self.seen]))[0])


def _reserve(seen: Any) -> Any:
    """The share that is not staked after so many rows."""
    return 1 / np.sqrt(seen + 2)


def _wealth(stakes: NDArray[np.float64], seen: NDArray[np.int64]) -> NDArray[np.float64]:
    """The logarithm of the wealth [m]: the mean of the stakes [G, m], and what is not staked."""
    staked = np.logaddexp.reduce(stakes, axis=0) - math.log(len(stakes))
    return np.logaddexp(staked, np.log(_reserve(seen)))


def _thinned(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first point, and those at multiples of the smallest power of 2 that leaves at most ``POINTS``."""
    seen = curve[0]
    stride = 2 ** max(0, math.ceil(math.log2((seen[-1] - seen[0]) / POINTS)))
    chosen = seen % stride == 0
    chosen[0] = True
    return curve[:, chosen]


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 709 else math.inf


def _draw_rates(axes: Axes, curve: NDArray[np.float64], expected: float) -> None:
    """The rate so far, and that of the last rows: a twentieth of all."""
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
    _tidy(axes)


def _draw_wealth(axes: Axes, curve: NDArray[np.float64], alpha: float) -> None:
    """The wealth in powers of ten: it may be too large or too small for a float."""
    from ood_scores.plotting.style import OOD_COLORS

    seen, _, wealth = curve
    axes.plot(seen, wealth / math.log(10), color=OOD_COLORS[0], linewidth=1.6, label="e-value")
    axes.axhline(-math.log10(alpha), color=OOD_COLORS[1], linewidth=1.0, linestyle="--", label=f"1 / {alpha:g}")
    reached = np.flatnonzero(wealth >= -math.log(alpha))
    if len(reached):
        row = seen[reached[0]]
        axes.axvline(row, color=OOD_COLORS[1], linewidth=1.0)
        axes.annotate(
            f"reached by row {row:,.0f}",
            (row, 1),
            (3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=OOD_COLORS[1],
        )
    axes.set_ylabel("log10 e-value", fontsize=9)
    axes.set_xlabel("rows of the stream", fontsize=9)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
