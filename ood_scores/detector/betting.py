"""Bets against exchangeability, whose wealth is evidence that may be read at any time, and its curve and state.

Bettors start with a total wealth of 1. Their bets are fair without drift, so that the wealth is a martingale and ever
reaches 1 / alpha with a probability of at most alpha (Ville's inequality). A part of the initial wealth is not staked
yet, so that there is something left to bet on a drift that starts late.

Sources: Vovk, Nouretdinov & Gammerman 2003, Testing exchangeability on-line; Herbster & Warmuth 1998, Tracking the best
expert (stakes set aside for a late change).
"""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ood_scores.detector.conformal import check_shares
from ood_scores.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = NDArray[np.float64]

POINTS = 1000
"""Maximum number of points of a curve in a figure."""
MOST = 2**62
"""Maximum of a count in the state of a monitor: sums of two fit into 64 bits."""


def reserve(bets: Any) -> Any:
    """Return the share of the initial wealth that is not staked after so many bets."""
    return 1 / np.sqrt(bets + 2)


def initial_stakes(bettors: int) -> list[float]:
    """Return the logarithm of the stakes of each bettor before the first bet."""
    return [math.log(1 - reserve(0))] * bettors


def stakes_after(stakes: Any, pays: Values, bets: NDArray[np.int64]) -> Values:
    """Return the logarithm of the stakes ``[G, m]`` after each bet: earlier stakes after the bet, plus new ones.

    Args:
        stakes: the logarithm of the stakes of each bettor before, ``[G]``.
        pays: the logarithm of the factor by which a bet multiplies the stakes, ``[G, m]``.
        bets: the number of bets after each, ``[m]``.
    """
    total = np.cumsum(pays, axis=1)
    added = np.log(reserve(bets - 1) - reserve(bets))
    staked = np.concatenate([np.array(stakes)[:, None], added - total], axis=1)
    return total + np.logaddexp.accumulate(staked, axis=1)[:, 1:]


def log_wealth(stakes: Values, bets: NDArray[np.int64]) -> Values:
    """Return the logarithm of the wealth ``[m]``: the mean of the stakes ``[G, m]``, plus what is not staked."""
    staked = np.logaddexp.reduce(stakes, axis=0) - math.log(len(stakes))
    return np.logaddexp(staked, np.log(reserve(bets)))


def exponential(logarithm: float) -> float:
    """Return the number with this logarithm; infinity if it is too large for a float."""
    return math.exp(logarithm) if logarithm < 709 else math.inf


def thinned(curve: Values) -> Values:
    """Return the first point of a curve, and those at multiples of a power of 2 that leaves at most ``POINTS``.

    Args:
        curve: the number of bets, ascending, and other rows ``[K, m]``.
    """
    seen = curve[0]
    stride = 2 ** max(0, math.ceil(math.log2((seen[-1] - seen[0]) / POINTS)))
    chosen = seen % stride == 0
    chosen[0] = True
    return curve[:, chosen]


class Evidence(ABC):
    """What the wealth of bettors says of a stream.

    Attributes:
        stakes: the logarithm of each bettor's stakes.
        peak: the logarithm of the highest wealth so far.
    """

    stakes: list[float]
    peak: float

    @property
    @abstractmethod
    def bets(self) -> int:
        """The number of bets so far."""

    def _wealth(self) -> float:
        return float(log_wealth(np.array(self.stakes)[:, None], np.array([self.bets]))[0])

    @property
    def e_value(self) -> float:
        """The current wealth of the bettors: 1 at the start; without drift at most 1 on average at any time."""
        return exponential(self._wealth())

    @property
    def p_value(self) -> float:
        """1 / the highest wealth so far; without drift, it ever falls to alpha with a probability of at most alpha."""
        return math.exp(-self.peak)

    def drifted(self, alpha: float = 0.01) -> bool:
        """Return whether the stream has drifted, with a probability of a false alarm of at most ``alpha``.

        Once true, it stays true: start a new monitor after removing the cause.

        Raises:
            BadInput: if alpha is not in (0, 1).
        """
        check_shares(alpha=alpha)
        return self.p_value <= alpha


def draw_wealth(axes: Axes, rows: Values, wealth: Values, alpha: float) -> None:
    """Draw the wealth in powers of ten, which may be too large or too small for a float, and where it is 1 / alpha."""
    from ood_scores.plotting.style import OOD_COLORS

    axes.plot(rows, wealth / math.log(10), color=OOD_COLORS[0], linewidth=1.6, label="e-value")
    axes.axhline(-math.log10(alpha), color=OOD_COLORS[1], linewidth=1.0, linestyle="--", label=f"1 / {alpha:g}")
    reached = np.flatnonzero(wealth >= -math.log(alpha))
    if len(reached):
        row = rows[reached[0]]
        is_late = row > (rows[0] + rows[-1]) / 2
        axes.axvline(row, color=OOD_COLORS[1], linewidth=1.0)
        axes.annotate(
            f"reached by row {row:,.0f}",
            (row, 1),
            (-3 if is_late else 3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if is_late else "left",
            va="top",
            fontsize=8,
            color=OOD_COLORS[1],
        )
    axes.set_ylabel("log10 e-value", fontsize=9)
    axes.set_xlabel("rows of the stream", fontsize=9)
    legend_above(axes)


def legend_above(axes: Axes) -> None:
    """Set the style of axes, with the legend above them."""
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def state_line(kind: str, version: int, state: Mapping[str, Any]) -> str:
    """Return the state of a monitor as one line of JSON."""
    return json.dumps({"format": kind, "version": version, **state})


def read_state(line: str, kind: str, version: int, names: Collection[str]) -> dict[str, Any]:
    """Return the state in a line of ``state_line``.

    Raises:
        BadInput: if the line is not the state of such a monitor, or was written by a newer version of this package.
    """
    try:
        state = json.loads(line)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            f"this line is not the complete state of a monitor ({error}): pass a line from to_json()."
        ) from error
    if not isinstance(state, dict) or state.pop("format", None) != kind:
        raise BadInput("this line is not the state of a monitor: pass a line from to_json().")
    if (found := state.pop("version", None)) != version:
        raise BadInput(
            f"this state of a monitor has version {found}, but this package reads version {version}: use the "
            "package that wrote it, or start a new monitor."
        )
    if state.keys() != set(names):
        raise BadInput("this line is not the complete state of a monitor: start a new monitor.")
    return state


def require_valid(state: Mapping[str, Any], name: str, is_valid: Callable[[Any], bool], wanted: str) -> None:
    """Raise BadInput if a value of the state of a monitor cannot be right."""
    if not is_valid(state[name]):
        raise BadInput(
            f"{name} is {state[name]!r:.60} in this state of a monitor, but it must be {wanted}: start a new monitor."
        )


def require_evidence(state: Mapping[str, Any], bettors: int) -> None:
    """Raise BadInput if what all monitors have in common cannot be right: the seed, the stakes, and the peak."""
    require_valid(state, "seed", lambda seed: is_whole(seed, most=math.inf), "a whole number of at least 0")
    stakes = state["stakes"]
    are_stakes = isinstance(stakes, list) and len(stakes) == bettors and all(map(is_finite, stakes))
    require_valid(state, "stakes", lambda _: are_stakes, f"a list of {bettors} finite numbers")
    require_valid(state, "peak", lambda peak: is_finite(peak) and peak >= 0, "a finite number of at least 0")


def is_whole(value: Any, least: int = 0, most: float = MOST) -> bool:
    """Whether a value is a whole number in this range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can have, and not infinite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max
