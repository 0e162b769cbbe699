"""Monitor a stream of features for shift, window by window, with a verdict that may be read at any time."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from ood_scores.detector.betting import (
    Evidence,
    draw_wealth,
    initial_stakes,
    is_finite,
    is_whole,
    read_state,
    require_evidence,
    require_valid,
    stakes_after,
    state_line,
    thinned,
)
from ood_scores.detector.conformal import check_shares
from ood_scores.detector.shift import LEAST_ROWS, Test, check_test, checked_features, shift
from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch
from ood_scores.features import FeatureSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = NDArray[np.float32]

FORMAT = "ood_scores feature monitor"
VERSION = 1
SMALLEST = 1e-300
"""The smallest p-value that is told apart from others."""
POWERS = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Powers k of the bettors: small ones gain most from very small p-values, large ones from slightly small ones."""
LARGEST = float(np.finfo(np.float32).max)
NAMED = 10
"""Number of rows of a window that are named."""


@dataclass(eq=False)
class FeatureMonitor(Evidence):
    """Two-sample tests of the windows of a stream, and their evidence; created by ``FeatureMonitor.of``.

    Each window of consecutive rows is compared with a pool of rows by a test of ``ood_scores.shift``. The pool starts
    as the reference rows. After each window, the next pool is drawn at random from the pool and the window together,
    and has as many rows as before.

    **Null hypothesis.** Reference rows and rows of the stream are exchangeable, as independent draws from one
    distribution are. Which rows of the pool and the window are those of the window is then random, whatever they are,
    so that the p-value of the window is valid, and independent of those of earlier windows. (A fixed reference would
    not do: if it is unlucky, the p-values of all windows are small.)

    **Test.** Bettors stake their wealth on every window, and get k p^(k - 1) times the stakes, each with its own power
    k. Without shift that is at most 1 on average, so that the total wealth ever reaches 1 / alpha with a probability of
    at most alpha: ``drifted(alpha)`` may be read after every row.

    **Limits.** Rows of a shifted stream enter the pool. A sudden change is found within a few windows or not at all,
    and one that takes much longer than the stream takes to fill the pool is not seen. Rows that depend on each other,
    such as frames of one video, are not exchangeable. The p-value of ``ks`` is an approximation.

    Sources: Vovk, Nouretdinov & Gammerman 2003, Testing exchangeability on-line (power martingales); Volkhonskiy et al.
    2017, Inductive conformal martingales for change-point detection; the tests are those of ``detector.shift``.

    Attributes:
        test: the name of the test.
        window: the number of rows of a window.
        pool: the rows that the next window is compared with, float32 ``[n, D]``.
        waiting: the rows of the window that is not yet full, float32 ``[m, D]``.
        waiting_names: the names of these rows.
        permutations: the number of permutations of a test.
        seed: the seed of permutations and of the draws of pools.
        windows: the number of windows tested.
        last_p_value: the p-value of the last window alone; 1 before the first.
        most_moved: the names of the rows of the last window that resemble the pool least, the first least: their ids,
            or their numbers in the stream.
        stakes: the logarithm of each bettor's stakes.
        peak: the logarithm of the highest wealth so far.
    """

    test: Test
    window: int
    pool: Rows
    waiting: Rows
    waiting_names: list[str] = field(default_factory=list)
    permutations: int = 499
    seed: int = 0
    windows: int = 0
    last_p_value: float = 1.0
    most_moved: list[str] = field(default_factory=list)
    stakes: list[float] = field(default_factory=lambda: initial_stakes(len(POWERS)))
    peak: float = 0.0

    def __post_init__(self) -> None:
        self._curve = np.array([[self.windows], [math.nan], [self._wealth()]])

    @classmethod
    def of(
        cls, reference: Any, test: Test = "mmd", *, window: int = 100, permutations: int = 499, seed: int = 0
    ) -> FeatureMonitor:
        """Create a monitor that compares windows of a stream with reference rows.

        Args:
            reference: features ``[n, D]`` of held-out in-distribution rows, as in ``ood_scores.shift``. A window costs
                what that test costs with n + window rows: a few thousand rows are enough.
            test: the test, as in ``ood_scores.shift``.
            window: the number of rows of a window, at least 10. Larger windows find smaller shifts, later.
            permutations: the number of permutations of a test.
            seed: the seed of all random numbers.

        Raises:
            BadInput: if the window has fewer than 10 rows, or there is no permutation. Other errors are those of
                ``ood_scores.shift`` for the reference; NotFinite also if a feature exceeds float32.
        """
        check_test(test, permutations)
        if window < LEAST_ROWS:
            raise BadInput(f"a window must have at least {LEAST_ROWS} rows, got {window}: pass window=100.")
        pool = _as_float32(reference, "reference", LEAST_ROWS)
        return cls(test, window, pool, pool[:0], permutations=permutations, seed=seed)

    @property
    def seen(self) -> int:
        """The number of rows of the stream, those of the window that is not yet full included."""
        return self.windows * self.window + len(self.waiting)

    def update(self, features: Any) -> None:
        """Add the features ``[m, D]`` of the next rows, in their order: a tensor, an array, or a feature set.

        Windows are tested as soon as they are full. It does not matter how the stream is divided into updates.

        Raises:
            ShapeMismatch: if the rows have another number of features than the reference. Other errors are those of
                ``ood_scores.shift``; NotFinite also if a feature exceeds float32. The monitor is then unchanged, as it
                is if the update is interrupted.
        """
        rows = _as_float32(features, "stream", 1)
        if rows.shape[1] != self.pool.shape[1]:
            raise ShapeMismatch(
                f"the reference rows have {self.pool.shape[1]} features and the stream {rows.shape[1]}: pass features "
                "of the same layer of the same model."
            )
        ids = features.ids if isinstance(features, FeatureSet) else None
        numbers = map(str, range(self.seen, self.seen + len(rows)))
        names = (
            [str(own) or number for own, number in zip(ids, numbers, strict=True)] if ids is not None else [*numbers]
        )
        before = dict(vars(self))
        try:
            self._add(rows, names)
        except BaseException:
            vars(self).update(before)
            raise

    @property
    def bets(self) -> int:
        """The number of bets so far: one on each of the windows."""
        return self.windows

    def to_json(self) -> str:
        """Return the state as one line of JSON, from which ``from_json`` continues.

        It contains the pool, 5.3 bytes for each of its numbers.
        """
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return state_line(FORMAT, VERSION, state | {name: _as_text(state[name]) for name in ("pool", "waiting")})

    @classmethod
    def from_json(cls, line: str) -> FeatureMonitor:
        """Restore a monitor from ``to_json``; it continues with the same values, bit for bit. Its figure starts anew.

        Raises:
            BadInput: if the line is not the state of a monitor, has a value that cannot be right, or was written by a
                newer version of this package.
        """
        state = read_state(line, FORMAT, VERSION, [each.name for each in fields(cls)])
        _check(state)
        monitor = cls(**state | {name: _as_rows(state[name]) for name in ("pool", "waiting")})
        monitor._check_rows()
        return monitor

    def plot(self, alpha: float = 0.01, *, ax: Axes | None = None) -> Figure:
        """Plot the e-value over the rows, the p-values of the windows, and where the e-value reached 1 / alpha.

        Both are powers of ten: a window with a p-value of 0.001 is a dot at 3. The curve has at most a thousand points
        and starts when the monitor was created or loaded. The figure has no window:
        ``monitor.plot().savefig("shift.png", dpi=150)``.

        Args:
            alpha: the probability of a false alarm.
            ax: the axes to draw into; None for a new figure.

        Raises:
            EmptyInput: if no window was completed since then.
            BadInput: if alpha is not in (0, 1).
        """
        from ood_scores.plotting.style import new_figure

        check_shares(alpha=alpha)
        if self.windows == self._curve[0, 0]:
            raise EmptyInput("no window was completed since this monitor was created or loaded: update it first.")
        axes = new_figure(7, 3).subplots() if ax is None else ax
        now = [[self.windows], [math.log(self.last_p_value)], [self._wealth()]]
        windows, log_p, wealth = np.concatenate([self._curve, now], axis=1)
        rows = windows * self.window
        axes.plot(rows, -log_p / math.log(10), ".", color="#9a9a9a", markersize=4, label="−log10 p of a window")
        draw_wealth(axes, rows, wealth, alpha)
        axes.set_ylabel("evidence, powers of 10", fontsize=9)
        return axes.get_figure(root=True)  # type: ignore[return-value]

    def _add(self, rows: Rows, names: list[str]) -> None:
        """Add rows, and test the windows that are full."""
        self.waiting = np.concatenate([self.waiting, rows])
        self.waiting_names = self.waiting_names + names
        while len(self.waiting) >= self.window:
            self._test(self.waiting[: self.window], self.waiting_names[: self.window])
            self.waiting, self.waiting_names = self.waiting[self.window :], self.waiting_names[self.window :]

    def _check_rows(self) -> None:
        """Raise BadInput if the pool and the rows that wait cannot be those of one monitor."""
        pool, waiting = self.pool, self.waiting
        names, wanted = len(self.waiting_names), f"less than {self.window} rows of {pool.shape[1]} features"
        if len(pool) < LEAST_ROWS:
            raise _damaged(f"the pool has {len(pool)}")
        if waiting.shape[1] != pool.shape[1] or len(waiting) >= self.window:
            raise _damaged(f"waiting has shape {list(waiting.shape)}, not {wanted}")
        if names != len(waiting):
            raise _damaged(f"{len(waiting)} wait, and waiting_names has {names} names")

    def _test(self, rows: Rows, names: list[str]) -> None:
        """Test a window, bet on it, and draw the next pool."""
        lots = np.random.default_rng([self.seed, self.windows])
        found = shift(self.pool, rows, self.test, permutations=self.permutations, seed=int(lots.integers(2**32)))
        kept = lots.choice(len(self.pool) + len(rows), len(self.pool), replace=False)
        self.pool = np.concatenate([self.pool, rows])[kept]
        self.windows += 1
        bets = np.array([self.windows])
        p = max(found.p_value, SMALLEST)
        powers = np.array(POWERS)[:, None]
        stakes = stakes_after(self.stakes, np.log(powers) + (powers - 1) * math.log(p), bets)
        self.stakes, self.last_p_value = stakes[:, -1].tolist(), p
        self.most_moved = [names[row] for row in found.most_moved(NAMED)]
        wealth = self._wealth()
        self.peak = max(self.peak, wealth)
        point = [[self.windows], [math.log(p)], [wealth]]
        self._curve = thinned(np.concatenate([self._curve, point], axis=1))


def _as_float32(features: Any, name: str, least: int) -> Rows:
    """Return ``checked_features`` as float32; NotFinite if one exceeds its range."""
    rows = checked_features(features, name, least)
    if np.abs(rows).max(initial=0) > LARGEST:
        raise NotFinite(f"a {name} feature exceeds {LARGEST:.2g}, the largest float32: scale the features down.")
    return rows.astype(np.float32)


def _as_text(rows: Rows) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(rows, "<f4").tobytes()).decode()
    return {"shape": list(rows.shape), "float32": data}


def _as_rows(text: Mapping[str, Any]) -> Rows:
    try:
        data = np.frombuffer(base64.b64decode(text["float32"], validate=True), "<f4")
        rows = data.reshape(text["shape"]).astype(np.float32)
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as error:
        raise _damaged(error) from error
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise _damaged(f"shape {list(rows.shape)}" if rows.ndim != 2 else "a feature is NaN or infinite")
    return rows


def _damaged(reason: object) -> BadInput:
    return BadInput(f"the rows in this state of a monitor are damaged ({reason}): start a new monitor.")


def _check(state: Mapping[str, Any]) -> None:
    """Raise BadInput if a value other than the rows cannot be right."""
    tests = get_args(Test)
    require_valid(state, "test", lambda test: test in tests, " or ".join(map(repr, tests)))
    for name, least in (("window", LEAST_ROWS), ("permutations", 1), ("windows", 0)):
        require_valid(state, name, partial(is_whole, least=least), f"a whole number of at least {least}")
    require_valid(state, "last_p_value", lambda p: is_finite(p) and 0 < p <= 1, "a number above 0 and up to 1")
    for name in ("waiting_names", "most_moved"):
        require_valid(state, name, _are_texts, "a list of texts")
    require_evidence(state, len(POWERS))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
