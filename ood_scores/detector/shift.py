"""Two-sample tests on features: has the data changed?

A monitor of the rejection rate (``detector.monitor``) sees changes that the score sees. These tests compare the
features of a window of new rows with those of reference rows, and see any change that their statistic sees, OoD or not.
``detector.feature_monitor`` tests the windows of a stream.
p-values are valid at finite n: under the hypothesis that all rows are exchangeable, P(p <= a) <= a. That of ``ks`` is
an approximation.

Sources: Gretton et al. 2012, A kernel two-sample test (MMD, median heuristic); Schrab et al. 2023, MMD aggregated
two-sample test (widths of powers of two times the median); Biggs et al. 2023, MMD-FUSE (one set of permutations for all
widths); Székely & Rizzo 2013, Energy statistics; Schilling 1986, Multivariate two-sample tests based on nearest
neighbors; Lopez-Paz & Oquab 2017, Revisiting classifier two-sample tests; Rabanser et al. 2019, Failing loudly
(univariate tests with Bonferroni's correction).

Departure from MMD-FUSE: the largest statistic instead of a soft maximum, and units of the standard deviation over the
permutations instead of the root mean square of the kernel, which is much larger for wide kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kstwo, rankdata

from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch
from ood_scores.features import FeatureSet
from ood_scores.registry import Registry
from ood_scores.runtime import default_torch_state

Test = Literal["mmd", "energy", "knn", "classifier", "ks"]
Values = NDArray[np.float64]

BLOCK = 1024
"""Number of rows whose distances to all rows are in memory at a time."""
MEDIAN_ROWS = 1000
"""Number of rows from which the median distance is estimated."""
WIDTHS = (1 / 4, 1 / 2, 1, 2, 4)
"""Widths of the kernels of MMD as shares of the median distance."""
ROUNDING = 1e-12
"""Standard deviation of MMD below which it is rounding."""
NEIGHBORS = 5
LARGEST_EXPONENT = 256
"""Rows whose largest value is between 2^-256 and 2^256 are compared as they are."""
LEAST_ROWS = 10
"""Number of rows that a side must have."""


@dataclass(frozen=True, eq=False)
class Shift:
    """The result of a two-sample test.

    Attributes:
        test: the name of the test.
        statistic: its statistic; larger means a larger difference.
        p_value: the probability of such a statistic, or a larger one, if nothing has changed.
        outlyingness: how much less each row of the window resembles the reference rows than the window, float64
            ``[m]``.
    """

    test: Test
    statistic: float
    p_value: float
    outlyingness: Values

    def most_moved(self, rows: int = 10) -> NDArray[np.int64]:
        """Return the numbers of the rows of the window that resemble the reference rows least, the first least."""
        return np.argsort(-self.outlyingness, kind="stable")[:rows]


@default_torch_state()
def shift(reference: Any, window: Any, test: Test = "mmd", *, permutations: int = 499, seed: int = 0) -> Shift:
    """Test whether the features of a window are distributed like those of reference rows.

    Args:
        reference: features ``[n, D]`` of reference rows: a tensor, an array, or a feature set. They must not be rows
            that the model was trained on, whose features differ from those of any new rows.
        window: features ``[m, D]`` of new rows.
        test: the statistic. ``"mmd"``: squared maximum mean discrepancy in units of its standard deviation, the largest
            of Gaussian kernels with widths of 1/4, 1/2, 1, 2, and 4 times the median distance; ``"energy"``: energy
            distance, without a width to choose; ``"knn"``: share of the 5 nearest neighbors from the same side;
            ``"classifier"``: AUROC on half of the rows of a logistic regression fitted on the other half; ``"ks"``:
            largest Kolmogorov-Smirnov distance of a dimension, with Bonferroni's correction.
        permutations: the number of permutations for the p-value, which is at least 1 / (permutations + 1). ``"ks"``
            needs none.
        seed: the seed of the permutations and of the halves.

    Cost: O((n + m)^2 (D + permutations)) for ``mmd`` and ``energy``, O((n + m)^2 D) for ``knn``, by 1,024 rows.

    Raises:
        UnknownName: if there is no such test.
        BadInput: if ``permutations`` is less than 1, or a feature set has no features.
        EmptyInput: if a side has fewer than 10 rows.
        ShapeMismatch: if the sides are not ``[n, D]`` and ``[m, D]``.
        NotFinite: if a feature is NaN or infinite.
    """
    check_test(test, permutations)
    known, new = checked_features(reference, "reference"), checked_features(window, "window")
    if known.shape[1] != new.shape[1]:
        raise ShapeMismatch(f"the reference rows have {known.shape[1]} features and the window {new.shape[1]}.")
    statistic, p_value, outlyingness = _TESTS[test](known, new, permutations, seed)
    return Shift(test, statistic, p_value, outlyingness)


def check_test(test: str, permutations: int) -> None:
    """Raise UnknownName or BadInput if there is no such test, or no permutation."""
    _TESTS[test]
    if permutations < 1:
        raise BadInput(f"permutations must be at least 1, got {permutations}: pass 499.")


def checked_features(given: Any, name: str, least: int = LEAST_ROWS) -> Values:
    """Return features as float64 ``[N, D]``; ``name`` says in errors which rows these are.

    Raises:
        BadInput: if a feature set has no features.
        EmptyInput, ShapeMismatch, NotFinite: if there are fewer than ``least`` rows, or these are no finite features.
    """
    if isinstance(given, FeatureSet):
        if not given.has("features"):
            raise BadInput(f"the {name} set has no features: pass one that has.")
        given = given.features
    array = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given, dtype=np.float64)
    if array.ndim != 2:
        raise ShapeMismatch(f"the {name} features have shape {list(array.shape)}: pass [rows, features].")
    if len(array) < least:
        raise EmptyInput(f"there are {len(array)} {name} rows: pass at least {least}.")
    if not np.isfinite(array).all():
        raise NotFinite(f"a {name} feature is NaN or infinite: check where it comes from.")
    return array


def _mmd(known: Values, new: Values, permutations: int, seed: int) -> tuple[float, float, Values]:
    """Return the largest squared MMD of several widths in units of its standard deviation, its p-value, its witness.

    The standard deviation is that over the permutations and the rows as they are. It is the same for every order of the
    rows, so that the p-value stays exact.
    """
    rows, _ = _within_range(known, new)
    median = median_distance(rows, seed) or 1.0
    kernels = [partial(_gaussian, width=share * median) for share in WIDTHS]
    estimates, witnesses = _of_kernels(rows, len(known), kernels, permutations, seed)
    estimates /= np.maximum(estimates.std(axis=1, keepdims=True), ROUNDING)
    largest = estimates.max(axis=0)
    return float(largest[0]), _p_value(largest), witnesses[estimates[:, 0].argmax()]


def median_distance(rows: torch.Tensor, seed: int) -> float:
    """Return the median distance between rows ``[N, D]``, at most ``MEDIAN_ROWS`` of them.

    They are drawn from the rows in the order of their sums, so that the order of the rows, of which permutation tests
    know nothing, does not matter.
    """
    in_order = rows[rows.sum(dim=1).argsort()]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:MEDIAN_ROWS])
    return float(torch.pdist(in_order[drawn]).median())


def _energy(known: Values, new: Values, permutations: int, seed: int) -> tuple[float, float, Values]:
    rows, exponent = _within_range(known, new)
    (estimates,), (witness,) = _of_kernels(rows, len(known), [torch.neg], permutations, seed)
    return float(np.ldexp(estimates[0], exponent)), _p_value(estimates), np.ldexp(witness, exponent)


def _gaussian(distances: torch.Tensor, width: float) -> torch.Tensor:
    return (distances / width).square_().div_(-2).exp_()


def _of_kernels(
    rows: torch.Tensor, n: int, kernels: Sequence[Callable[[torch.Tensor], torch.Tensor]], permutations: int, seed: int
) -> tuple[Values, Values]:
    """Return unbiased estimates of E k(x, x') + E k(y, y') - 2 E k(x, y) ``[K, 1 + permutations]`` for K kernels.

    The first estimates are those without a permutation. The witness functions of these, ``[K, m]``, come second. All
    permutations take one product of the kernel matrix with their indicators of the reference side.
    """
    sides = _permuted_sides(len(rows), n, permutations, seed)
    indicators = torch.from_numpy(sides.T.astype(np.float64))
    inside = indicators.new_zeros(len(kernels), len(sides))
    sums, to_known = indicators.new_empty(2, len(kernels), len(rows))
    for here, distances in _distances(rows):
        for number, kernel in enumerate(kernels):
            values = kernel(distances)
            values[torch.arange(len(values)), torch.arange(here.start, here.stop)] = 0
            products = values @ indicators
            inside[number] += (indicators[here] * products).sum(dim=0)
            sums[number, here], to_known[number, here] = values.sum(dim=1), products[:, 0]
    m = len(rows) - n
    across = sums @ indicators - inside
    outside = sums.sum(dim=1, keepdim=True) - 2 * across - inside
    estimates = inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * across / (n * m)
    to_new = (sums - to_known)[:, n:] / (m - 1)
    return estimates.numpy(), (to_new - to_known[:, n:] / n).numpy()


def _knn(known: Values, new: Values, permutations: int, seed: int) -> tuple[float, float, Values]:
    """Return the share of neighbors from the same side, its p-value, and the share of neighbors from the window.

    Of rows at the same distance, ``topk`` prefers some places. The rows are shuffled, so that it prefers no side.
    """
    order = np.random.default_rng((seed, 1)).permutation(len(known) + len(new))
    rows = _within_range(known, new)[0][order]
    neighbors = torch.empty(len(rows), NEIGHBORS, dtype=torch.int64)
    for here, distances in _distances(rows):
        distances[torch.arange(len(distances)), torch.arange(here.start, here.stop)] = torch.inf
        neighbors[here] = distances.topk(NEIGHBORS, dim=1, largest=False).indices
    sides = _permuted_sides(len(rows), len(known), permutations, seed)[:, order]
    same = np.array([(side[neighbors] == side[:, None]).mean() for side in sides])
    from_window = 1 - sides[0][neighbors].mean(axis=1)
    return float(same[0]), _p_value(same), from_window[np.argsort(order)][len(known) :]


def _classifier(known: Values, new: Values, permutations: int, seed: int) -> tuple[float, float, Values]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    rows, n = _within_range(known, new)[0].numpy(), len(known)
    is_new = np.arange(len(rows)) >= n
    fitted = np.concatenate([rng.permutation(n)[: n // 2], n + rng.permutation(len(new))[: len(new) // 2]])
    tested = np.setdiff1d(np.arange(len(rows)), fitted)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    logits = model.fit(rows[fitted], is_new[fitted]).decision_function(rows)
    ranks = rankdata(logits[tested])
    m = int(is_new[tested].sum())
    sides = ~_permuted_sides(len(tested), len(tested) - m, permutations, seed)
    sides[0] = is_new[tested]
    areas = (sides @ ranks - m * (m + 1) / 2) / (m * (len(tested) - m))
    return float(areas[0]), _p_value(areas), logits[n:]


def _ks(known: Values, new: Values, permutations: int, seed: int) -> tuple[float, float, Values]:
    n, m = len(known), len(new)
    rows = np.concatenate([known, new])
    order = np.argsort(rows, axis=0, kind="stable")
    sorted_rows = np.take_along_axis(rows, order, axis=0)
    difference = np.cumsum(np.where(order < n, 1 / n, -1 / m), axis=0)
    last_of_value = np.ones_like(difference, dtype=bool)
    last_of_value[:-1] = sorted_rows[1:] != sorted_rows[:-1]
    gaps = np.where(last_of_value, np.abs(difference), 0)
    largest = gaps.max(axis=0)
    dimension = int(largest.argmax())
    p = kstwo.sf(largest[dimension], round(n * m / (n + m)))
    sign = np.sign(difference[gaps[:, dimension].argmax(), dimension])
    return float(largest[dimension]), min(1.0, float(p) * rows.shape[1]), sign * new[:, dimension]


_TESTS: Registry[Callable[[Values, Values, int, int], tuple[float, float, Values]]] = Registry(
    "test of shift", {"mmd": _mmd, "energy": _energy, "knn": _knn, "classifier": _classifier, "ks": _ks}
)


def _within_range(known: Values, new: Values) -> tuple[torch.Tensor, int]:
    """Return all rows, divided by a power of 2 if their squares would exceed float64 or vanish, and its exponent."""
    rows = np.concatenate([known, new])
    exponent = int(np.frexp(np.abs(rows).max(initial=0))[1])
    exponent = exponent if abs(exponent) > LARGEST_EXPONENT else 0
    return torch.from_numpy(np.ldexp(rows, -exponent)), exponent


def _permuted_sides(rows: int, n: int, permutations: int, seed: int) -> NDArray[np.bool_]:
    """Return which rows are on the reference side, bool ``[1 + permutations, rows]``: first the n first rows."""
    rng = np.random.default_rng(seed)
    sides = np.tile(np.arange(rows) < n, (permutations + 1, 1))
    sides[1:] = rng.permuted(sides[1:], axis=1)
    return sides


def _p_value(statistics: Values) -> float:
    """The share of permutations, with the first that is none, whose statistic is at least as large as the first."""
    return float(np.mean(statistics >= statistics[0] - 1e-12 * abs(statistics[0])))


def _distances(rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield Euclidean distances ``[B, N]`` of blocks of rows to all rows."""
    for start in range(0, len(rows), BLOCK):
        here = slice(start, min(start + BLOCK, len(rows)))
        yield here, torch.cdist(rows[here], rows)
