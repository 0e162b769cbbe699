"""The monitor of a stream: exactly fair bets, few false alarms with any stopping rule, and detected drifts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from scipy.special import betaln
from scipy.stats import binom, norm

from ood_scores.detector.betting import POINTS
from ood_scores.detector.conformal import threshold
from ood_scores.detector.monitor import ODDS, Monitor
from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch

Array = NDArray[Any]
SURE = 1e-4


def watched(below: Any, n: int, rank: int) -> Monitor:
    """Create a monitor and update it with rows below the threshold, or not."""
    monitor = Monitor(value=0.0, n=n, rank=rank, cut=0.5)
    monitor.update(np.where(np.asarray(below), -1.0, 1.0))
    return monitor


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (3, 1), (19, 1), (20, 5)])
def test_bets_are_fair(n: int, rank: int) -> None:
    """The mean wealth over all 2^9 streams, weighted by their probability for exchangeable rows, is exactly 1."""
    streams = list(product([False, True], repeat=9))
    counts = [sum(stream) for stream in streams]
    chances = [math.exp(betaln(rank + k, n + 1 - rank + 9 - k) - betaln(rank, n + 1 - rank)) for k in counts]
    assert sum(chances) == pytest.approx(1)
    wealth = [watched(stream, n, rank).e_value for stream in streams]
    assert np.dot(chances, wealth) == pytest.approx(1, rel=1e-12)
    assert max(wealth) > 2


def test_the_wealth_matches_a_plain_computation() -> None:
    """The plain computation goes row by row, without logarithms."""
    stream = np.random.default_rng(0).random(60) < 0.3
    n, rank, below, peak = 19, 2, 0, 1.0
    stakes, reserve = np.full(len(ODDS), 1 - 1 / math.sqrt(2)), 1 / math.sqrt(2)
    for t, is_below in enumerate(stream):
        chance = (rank + below) / (n + 1 + t)
        for bettor, times in enumerate(ODDS):
            odds = times * rank / (n + 1 - rank)
            q = max(odds / (1 + odds), chance)
            stakes[bettor] *= q / chance if is_below else (1 - q) / (1 - chance)
        left = 1 / math.sqrt(t + 3)
        stakes += reserve - left
        reserve, below = left, below + is_below
        peak = max(peak, stakes.mean() + reserve)
    monitor = watched(stream, n, rank)
    assert monitor.e_value == pytest.approx(stakes.mean() + reserve, rel=1e-12)
    assert monitor.p_value == pytest.approx(1 / peak, rel=1e-12)
    assert monitor.below == monitor.rejected == below


def lowest_p_values(draw: Callable[..., Array], n: int, keep: float, delta: float | None) -> Array:
    """Monitor 1,000 streams of 1,000 rows without drift, each with its own calibration set."""
    rng = np.random.default_rng(7)
    found = []
    for seed in range(1000):
        monitor = Monitor.of(draw(rng, n), keep, delta=delta, seed=seed)
        monitor.update(draw(rng, 1000))
        found.append(monitor.p_value)
    return np.array(found)


def continuous(rng: np.random.Generator, rows: int) -> Array:
    return rng.normal(size=rows)


def tied(rng: np.random.Generator, rows: int) -> Array:
    return np.floor(rng.normal(size=rows))


@pytest.mark.parametrize(
    ("draw", "n", "keep", "delta"),
    [
        (continuous, 20, 0.95, None),
        (continuous, 200, 0.9, None),
        (continuous, 100, 0.95, 0.1),
        (tied, 20, 0.8, None),
        (tied, 200, 0.9, None),
    ],
)
def test_false_alarms_are_rare_with_any_stopping_rule(
    draw: Callable[..., Array], n: int, keep: float, delta: float | None
) -> None:
    """The p-value is that of the highest wealth so far: stopping there is the worst stopping rule."""
    found = lowest_p_values(draw, n, keep, delta)
    for alpha in (0.01, 0.05, 0.2):
        assert (found <= alpha).sum() <= binom.isf(SURE, 1000, alpha)
    assert (found <= 0.5).sum() > 50, "the test is not empty"


def test_ignoring_the_size_of_the_calibration_set_would_raise_false_alarms() -> None:
    """The simulation is sensitive to calibration: if the rate is assumed to be exact, more than alpha raise alarms."""
    rng = np.random.default_rng(7)
    count = 0
    for _ in range(300):
        value = threshold(rng.normal(size=20), 0.8).value
        naive = Monitor(value, n=21 * 10**9 - 1, rank=4 * 10**9, cut=0.5)
        naive.update(rng.normal(size=1000))
        count += naive.drifted(0.05)
    assert count > binom.isf(SURE, 300, 0.05)


@pytest.mark.parametrize(("before", "within"), [(0, 250), (1000, 250), (100_000, 400)])
def test_a_drift_is_detected_whenever_it_starts(before: int, within: int) -> None:
    """Scores fall by one standard deviation: 26% are rejected instead of 5%."""
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(20):
        monitor = Monitor.of(rng.normal(size=1000))
        if before:
            monitor.update(rng.normal(size=before))
        assert not monitor.drifted()
        monitor.update(rng.normal(size=within) - 1)
        found += monitor.drifted()
    assert norm.cdf(norm.ppf(0.05) + 1) == pytest.approx(0.26, abs=0.001)
    assert found >= 19


def test_a_slight_drift_is_detected_in_time() -> None:
    """9% are rejected instead of 5%, after 1,000 rows."""
    rng = np.random.default_rng(4)
    monitor = Monitor.of(rng.normal(size=10_000))
    monitor.update(rng.normal(size=1000))
    monitor.update(rng.normal(size=3000) - 0.3)
    assert monitor.drifted()


def test_the_division_into_updates_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    calibration, stream = tied(rng, 50), tied(rng, 3000)
    whole, parts = Monitor.of(calibration, 0.8), Monitor.of(calibration, 0.8)
    whole.update(stream)
    for start, stop in pairwise([0, 1, 65, 1000, 3000]):
        parts.update(torch.tensor(stream[start:stop]))
    assert (parts.seen, parts.rejected, parts.below) == (whole.seen, whole.rejected, whole.below)
    np.testing.assert_allclose(parts.stakes, whole.stakes, rtol=1e-9)
    assert parts.p_value == pytest.approx(whole.p_value, rel=1e-9)


def test_rates() -> None:
    monitor = Monitor.of(range(1, 20), 0.9)
    assert monitor.value == 2
    assert monitor.expected_rate == 0.1
    assert math.isnan(monitor.rejection_rate)
    assert monitor.e_value == pytest.approx(1)
    assert monitor.p_value == 1
    monitor.update([1, 2, 2, 2, 2, 2, 2, 3, 4, 0])
    assert monitor.rejection_rate == 0.2, "ties with the threshold are kept"
    assert 2 < monitor.below < 8, "but for the test they are above or below by lot"


def test_rows_tied_with_the_threshold_are_below_as_often_as_calibration_rows() -> None:
    """All scores are equal: the threshold has rank ``rank`` among n tied rows, so that a share Beta(rank, n + 1 - rank)
    is below it."""
    cuts = [Monitor.of(np.zeros(99), 0.9, seed=seed).cut for seed in range(300)]
    assert np.mean(cuts) == pytest.approx(0.1, abs=4 * 0.03 / math.sqrt(300))
    assert np.std(cuts) == pytest.approx(0.03, rel=0.2)
    monitor = Monitor.of(np.zeros(99), 0.9)
    monitor.update(np.zeros(20_000))
    assert monitor.rejected == 0
    assert monitor.below / 20_000 == pytest.approx(monitor.cut, abs=0.01)


def test_values_beyond_the_range_of_floats() -> None:
    monitor = watched(np.ones(2000), n=10**6, rank=10**4)
    assert monitor.e_value == math.inf
    assert monitor.p_value == 0
    assert monitor.drifted(1e-300)


def test_the_state_is_one_line_from_which_the_monitor_continues() -> None:
    rng = np.random.default_rng(0)
    monitor = Monitor.of(rng.normal(size=50))
    for _ in range(3):
        line = monitor.to_json()
        assert "\n" not in line
        assert len(line) < 500
        again = Monitor.from_json(line)
        assert again == monitor
        rows = rng.normal(size=100) - 1
        monitor.update(rows)
        again.update(rows)
        assert again == monitor
        assert (again.e_value, again.p_value) == (monitor.e_value, monitor.p_value)


def test_other_lines_are_refused() -> None:
    line = Monitor.of(range(30)).to_json()
    for bad in ("", line[:-5], "[]", "3", "{}", '{"format": "something else"}', "[" * 10**5, None):
        with pytest.raises(BadInput, match=r"this line is not the (complete )?state of a monitor"):
            Monitor.from_json(bad)  # type: ignore[arg-type]
    parts = json.loads(line)
    parts.pop("cut")
    with pytest.raises(BadInput, match="not the complete state of a monitor"):
        Monitor.from_json(json.dumps(parts))
    newer = json.loads(line) | {"version": 2}
    with pytest.raises(BadInput, match="has version 2, but this package reads version 1"):
        Monitor.from_json(json.dumps(newer))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": math.nan}, "value is nan in this state of a monitor, but it must be a number: start a new monitor"),
        ({"n": -5}, "n is -5 in .*a whole number of at least 1"),
        ({"n": 30.0}, "n is 30.0"),
        ({"n": True}, "n is True"),
        ({"n": 2**64}, "n is 18446744073709551616"),
        ({"rank": 0}, "rank is 0 in .*a whole number from 1 to n = 30"),
        ({"rank": 31}, "rank is 31"),
        ({"cut": 1.5}, "cut is 1.5 in .*a number from 0 to 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seen": "a"}, "seen is 'a' in .*a whole number of at least 0"),
        ({"below": 11}, "below is 11 in .*a whole number from 0 to seen = 10"),
        ({"below": 4, "rejected": 5}, "rejected is 5 in .*a whole number from 0 to below = 4"),
        ({"stakes": [0.0] * 6}, "stakes is .*a list of 7 finite numbers"),
        ({"stakes": ["a"] * 7}, "stakes is "),
        ({"stakes": [math.inf] * 7}, "stakes is "),
        ({"peak": None}, "peak is None in .*a finite number of at least 0"),
        ({"peak": 10**400}, "peak is 1000"),
    ],
)
def test_values_that_cannot_be_right_are_refused(changes: dict[str, Any], words: str) -> None:
    monitor = Monitor.of(range(30))
    monitor.update(range(10))
    with pytest.raises(BadInput, match=words):
        Monitor.from_json(json.dumps(json.loads(monitor.to_json()) | changes))


def test_seeds_of_any_size_and_infinite_thresholds_are_restored() -> None:
    for monitor in (Monitor.of(range(30), seed=2**70), Monitor.of([-math.inf] * 30)):
        assert Monitor.from_json(monitor.to_json()) == monitor


def test_bad_input_is_refused_and_changes_nothing() -> None:
    monitor = Monitor.of(range(30))
    before = monitor.to_json()
    refused: list[tuple[Any, type[Exception]]] = [
        ([1.0, math.nan], NotFinite),
        ([], EmptyInput),
        ([[1.0]], ShapeMismatch),
    ]
    for bad, error in refused:
        with pytest.raises(error):
            monitor.update(bad)
    assert monitor.to_json() == before
    for alpha in (0, 1, math.nan):
        with pytest.raises(BadInput, match=r"alpha must be in \(0, 1\)"):
            monitor.drifted(alpha)
    with pytest.raises(BadInput, match="with 18 calibration rows no row can be rejected"):
        Monitor.of(range(18))
    with pytest.raises(BadInput, match="keep must be in"):
        Monitor.of(range(18), 1.0)


def points(line: Line2D) -> Array:
    return np.asarray(line.get_xydata())


def test_the_figure(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    monitor = Monitor.of(rng.normal(size=500))
    with pytest.raises(EmptyInput, match="no row was added"):
        monitor.plot()
    for shift in [0.0] * 40 + [1.0] * 10:
        monitor.update(rng.normal(size=64) - shift)
    figure = monitor.plot(alpha=0.001)
    rates, wealth = figure.axes
    lately, so_far, expected = map(points, rates.lines)
    assert tuple(so_far[-1]) == (3200, monitor.rejection_rate)
    assert lately[-1, 1] == pytest.approx(0.26, abs=0.1)
    assert (expected[:, 1] == monitor.expected_rate).all()
    curve, limit, reached = map(points, wealth.lines)
    assert tuple(curve[-1]) == pytest.approx((3200, math.log10(monitor.e_value)))
    assert (limit[:, 1] == 3).all()
    assert 40 * 64 < reached[0, 0] < 43 * 64
    assert wealth.texts[0].get_text() == f"reached by row {reached[0, 0]:,.0f}"
    middle = (curve[0, 0] + curve[-1, 0]) / 2
    assert wealth.texts[0].get_horizontalalignment() == ("right" if reached[0, 0] > middle else "left")
    figure.savefig(tmp_path / "monitor.png")
    assert imread(tmp_path / "monitor.png").std() > 0.05


def test_the_figure_has_few_points_for_a_long_stream() -> None:
    rng = np.random.default_rng(0)
    monitor = Monitor.of(rng.normal(size=500))
    for rows in (1, 30_000, 7, 50_000):
        monitor.update(rng.normal(size=rows))
    seen = points(monitor.plot().axes[0].lines[1])[:, 0]
    assert POINTS / 2 < len(seen) <= POINTS + 2
    assert seen[0] == 0
    assert seen[-1] == monitor.seen == 80_008
    assert (np.diff(seen)[:-1] == np.diff(seen)[0]).all()
