"""The monitor of a stream of features: windows, rare false alarms with any stopping rule, shifts, and named rows."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray
from scipy.stats import binom, kstest, spearmanr

from ood_scores.detector.feature_monitor import POWERS, FeatureMonitor
from ood_scores.detector.shift import Test, shift
from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch, UnknownName
from ood_scores.features import FeatureSet

SURE = 1e-4


def rows(rng: np.random.Generator, count: int, moved: float = 0.0) -> NDArray[Any]:
    return rng.normal(moved, 1, size=(count, 3)).astype(np.float32)


def stored(values: NDArray[Any]) -> dict[str, Any]:
    """Return rows as the state of a monitor contains them."""
    data = base64.b64encode(values.astype("<f4").tobytes()).decode()
    return {"shape": list(values.shape), "float32": data}


def monitored(seed: int, test: Test = "energy", windows: int = 4, moved: float = 0.0) -> FeatureMonitor:
    rng = np.random.default_rng(seed)
    monitor = FeatureMonitor.of(rows(rng, 30), test, window=15, permutations=99, seed=seed)
    monitor.update(rows(rng, 15 * windows, moved))
    return monitor


def test_the_wealth_matches_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    monitor = FeatureMonitor.of(rows(rng, 30), "energy", window=15, permutations=99)
    powers = np.array(POWERS)
    stakes, reserve, peak = np.full(len(powers), 1 - 1 / math.sqrt(2)), 1 / math.sqrt(2), 1.0
    for number in range(1, 9):
        pool, new = monitor.pool, rows(rng, 15, 2.0)
        monitor.update(new)
        e = powers * monitor.last_p_value ** (powers - 1)
        left = 1 / math.sqrt(number + 2)
        stakes, reserve = stakes * e + reserve - left, left
        wealth = stakes.mean() + reserve
        peak = max(peak, wealth)
        assert monitor.e_value == pytest.approx(wealth, rel=1e-12)
        assert monitor.p_value == pytest.approx(1 / peak, rel=1e-12)
        together = np.concatenate([pool, new])
        assert all((together == row).all(axis=1).any() for row in monitor.pool)
        assert len(monitor.pool) == 30
    assert monitor.drifted(0.1)


def test_p_values_of_windows_are_uniform_and_independent_and_false_alarms_are_rare() -> None:
    """The p-value of the monitor is that of the highest wealth so far: stopping there is the worst stopping rule."""
    runs = [monitored(seed) for seed in range(300)]
    lowest = np.array([run.p_value for run in runs])
    for alpha in (0.01, 0.05):
        assert (lowest <= alpha).sum() <= binom.isf(SURE, 300, alpha)
    assert (lowest < 0.9).sum() > 20, "the test is not empty"
    last = np.array([run.last_p_value for run in runs])
    for alpha in (0.01, 0.05):
        assert (last <= alpha).sum() <= binom.isf(SURE, 300, alpha)
    assert kstest(last, "uniform").pvalue > SURE


def test_later_windows_do_not_inherit_the_luck_of_the_reference() -> None:
    """With a fixed reference, p-values of one stream resemble each other; with the pool, they are independent."""
    fixed, pooled = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        reference, first, second = rows(rng, 15), rows(rng, 60), rows(rng, 60)
        fixed.append([shift(reference, new, "energy", permutations=99, seed=seed).p_value for new in (first, second)])
        monitor = FeatureMonitor.of(reference, "energy", window=60, permutations=99, seed=seed)
        monitor.update(first)
        before = monitor.last_p_value
        monitor.update(second)
        pooled.append([before, monitor.last_p_value])
    assert spearmanr(*np.transpose(fixed)).statistic > 0.3
    assert abs(spearmanr(*np.transpose(pooled)).statistic) < 0.32


@pytest.mark.parametrize("test", ["mmd", "energy", "knn", "classifier", "ks"])
def test_any_test_finds_a_shift_and_names_its_rows(test: Test) -> None:
    rng = np.random.default_rng(1)
    reference, clean, shifted = rows(rng, 300), rows(rng, 50), rows(rng, 250)
    shifted[::2] += 3
    monitor = FeatureMonitor.of(reference, test, window=50, permutations=199)
    names = [f"{'odd' if number % 2 else 'moved'}{number}" for number in range(250)]
    monitor.update(FeatureSet(torch.from_numpy(clean), ids=[f"clean{number}" for number in range(50)]))
    assert not monitor.drifted()
    monitor.update(FeatureSet(torch.from_numpy(shifted[:50]), ids=names[:50]))
    assert monitor.last_p_value <= 0.02
    assert sum(name.startswith("moved") for name in monitor.most_moved) >= 8
    monitor.update(FeatureSet(torch.from_numpy(shifted[50:]), ids=names[50:]))
    assert monitor.drifted()


def test_the_division_into_updates_does_not_matter_and_rows_without_ids_have_numbers() -> None:
    rng = np.random.default_rng(0)
    reference, stream = rows(rng, 40), rows(rng, 100)
    whole, parts = (FeatureMonitor.of(reference, "mmd", window=20, permutations=19) for _ in range(2))
    whole.update(stream)
    for part in np.split(stream, [1, 15, 33, 95]):
        parts.update(torch.from_numpy(part))
    assert parts.to_json() == whole.to_json()
    assert parts.seen == 100
    assert set(map(int, parts.most_moved)) <= set(range(80, 100))


def test_the_state_is_one_line_from_which_the_monitor_continues() -> None:
    rng = np.random.default_rng(0)
    monitor = FeatureMonitor.of(rows(rng, 40), "energy", window=20, permutations=19)
    for count in (7, 30, 20):
        line = monitor.to_json()
        assert "\n" not in line
        again = FeatureMonitor.from_json(line)
        assert again.to_json() == line
        new = rows(rng, count, 0.5)
        monitor.update(new)
        again.update(new)
        assert again.to_json() == monitor.to_json()
        assert (again.e_value, again.p_value, again.seen) == (monitor.e_value, monitor.p_value, monitor.seen)
    parts = json.loads(line)
    parts["pool"]["shape"] = [41, 3]
    with pytest.raises(BadInput, match="the rows in this state of a monitor are damaged"):
        FeatureMonitor.from_json(json.dumps(parts))
    for bad in ("", "{}", line[:-1]):
        with pytest.raises(BadInput, match="state of a monitor"):
            FeatureMonitor.from_json(bad)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test": "mmdd"}, "test is 'mmdd' in this state of a monitor, but it must be 'mmd' or 'energy' or"),
        ({"test": []}, r"test is \[\]"),
        ({"window": 9}, "window is 9 in .*at least 10"),
        ({"permutations": 0}, "permutations is 0 in .*at least 1"),
        ({"windows": "a"}, "windows is 'a' in .*at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"last_p_value": 0}, "last_p_value is 0 in .*above 0 and up to 1"),
        ({"last_p_value": math.nan}, "last_p_value is nan"),
        ({"waiting_names": [3]}, r"waiting_names is \[3\] in .*a list of texts"),
        ({"most_moved": None}, "most_moved is None"),
        ({"stakes": [0.0]}, r"stakes is \[0.0\] in .*a list of 5 finite numbers"),
        ({"peak": None}, "peak is None in .*a finite number of at least 0"),
        ({"pool": stored(np.zeros((9, 3)))}, r"rows in this state of a monitor are damaged \(the pool has 9\)"),
        ({"pool": stored(np.zeros(30))}, r"damaged \(shape \[30\]\)"),
        ({"pool": stored(np.full((40, 3), np.inf))}, "a feature is NaN or infinite"),
        ({"pool": stored(np.zeros((40, 2)))}, r"waiting has shape \[7, 3\], not less than 20 rows of 2 features"),
        ({"pool": {"shape": [10**30], "float32": ""}}, "damaged"),
        ({"waiting": stored(np.zeros((20, 3)))}, r"waiting has shape \[20, 3\]"),
        ({"waiting": stored(np.zeros((6, 3)))}, "6 wait, and waiting_names has 7 names"),
    ],
)
def test_values_that_cannot_be_right_are_refused(changes: dict[str, Any], words: str) -> None:
    rng = np.random.default_rng(0)
    monitor = FeatureMonitor.of(rows(rng, 40), "energy", window=20, permutations=19)
    monitor.update(rows(rng, 7))
    with pytest.raises(BadInput, match=words):
        FeatureMonitor.from_json(json.dumps(json.loads(monitor.to_json()) | changes))


def test_an_interrupted_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    monitor = FeatureMonitor.of(rows(rng, 40), window=20, permutations=19)
    monitor.update(rows(rng, 7))
    before, new, calls = monitor.to_json(), rows(rng, 50), iter(range(2))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return shift(*arguments, **options)

    monkeypatch.setattr("ood_scores.detector.feature_monitor.shift", interrupted)
    with pytest.raises(KeyboardInterrupt):
        monitor.update(new)
    assert monitor.to_json() == before
    monkeypatch.undo()
    monitor.update(new)
    again = FeatureMonitor.from_json(before)
    again.update(new)
    assert monitor.to_json() == again.to_json()
    assert monitor.windows == 2


def test_bad_input_is_refused_and_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    monitor = FeatureMonitor.of(rows(rng, 40), window=20)
    before = monitor.to_json()
    for bad, error in (
        (np.full((3, 3), np.nan), NotFinite),
        (np.zeros((0, 3)), EmptyInput),
        (np.zeros((3, 2)), ShapeMismatch),
        (np.full((60, 3), 1e39), NotFinite),
    ):
        with pytest.raises(error):
            monitor.update(bad)
    assert monitor.to_json() == before
    monitor.update(rows(rng, 20))
    assert monitor.windows == 1
    with pytest.raises(NotFinite, match=r"a reference feature exceeds 3.4e\+38, the largest float32"):
        FeatureMonitor.of(np.full((40, 3), 1e39))
    with pytest.raises(BadInput, match="a window must have at least 10 rows"):
        FeatureMonitor.of(rows(rng, 40), window=9)
    with pytest.raises(UnknownName, match="there is no test of shift"):
        FeatureMonitor.of(rows(rng, 40), "t")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="permutations must be at least 1"):
        FeatureMonitor.of(rows(rng, 40), permutations=0)
    with pytest.raises(BadInput, match=r"alpha must be in \(0, 1\)"):
        monitor.drifted(1)


def test_the_figure(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    monitor = FeatureMonitor.of(rows(rng, 100), "energy", window=20, permutations=499)
    with pytest.raises(EmptyInput, match="no window was completed"):
        monitor.plot()
    monitor.update(rows(rng, 200))
    monitor.update(rows(rng, 100, 2.0))
    figure = Figure()
    axes, other = figure.subplots(1, 2)
    assert monitor.plot(ax=axes) is figure
    assert not other.lines
    dots, wealth, limit, reached = (np.asarray(line.get_xydata()) for line in axes.lines)
    assert tuple(dots[-1]) == pytest.approx((300, -math.log10(monitor.last_p_value)))
    assert tuple(wealth[-1]) == pytest.approx((300, math.log10(monitor.e_value)))
    assert (limit[:, 1] == 2).all()
    assert 200 < reached[0, 0] <= 300
    monitor.plot().savefig(tmp_path / "shift.png")
    assert imread(tmp_path / "shift.png").std() > 0.05
