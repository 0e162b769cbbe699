"""How well scores separate in-distribution (ID) rows from out-of-distribution (OoD) rows.

Higher score = more in-distribution. Every metric is a row of `METRICS`: a formula on `RocCounts`, which one sort of the
scores gives, and what the rest of the package has to know to compute, store and show it. Counts are int64 and ratios
float64, so ties and thresholds are exact. The false positive rate at 95% has two meanings in the literature, hence two
metrics: `fpr95_id` (ID is the positive class) and `fpr95_ood` (OoD is).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import ceil, isnan
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch
from ood_scores.registry import Registry

Scores: TypeAlias = "torch.Tensor | NDArray[Any] | Sequence[float]"
Rule: TypeAlias = Literal["first", "nearest"]
Interpolation: TypeAlias = Literal["step", "trapezoid"]
NONE = "–"
"""What tables show in place of NaN."""


@dataclass(frozen=True)
class RocCounts:
    """How many positive and negative rows each threshold accepts.

    Thresholds are the distinct scores in descending order, T of them; a row is accepted when its score is at least the
    threshold. The last threshold accepts every row.

    Attributes:
        thresholds: float64 [T], strictly descending.
        positives: int64 [T], accepted rows of the positive class.
        negatives: int64 [T], accepted rows of the negative class.
    """

    thresholds: NDArray[np.float64]
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]

    @property
    def n_positive(self) -> int:
        return int(self.positives[-1])

    @property
    def n_negative(self) -> int:
        return int(self.negatives[-1])

    def mirrored(self) -> RocCounts:
        """The counts with the classes swapped and the scores negated: what was rejected is accepted."""
        return RocCounts(-self.thresholds[::-1], _rejected(self.negatives), _rejected(self.positives))


class Metrics(dict[str, float]):
    """Every metric of ``METRICS`` for one pair of score vectors, and the numbers of rows ``n_id`` and ``n_ood``.

    Values are keys and attributes: ``found["auroc"]`` is ``found.auroc``.
    """

    n_id: int
    n_ood: int

    def __getattr__(self, name: str) -> float:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no metric {name!r}; there are: {', '.join(self)}") from None


@dataclass(frozen=True)
class Metric:
    """A metric: how it is computed from counts, and how tables and files show it.

    Attributes:
        name: key in frames, files and specs.
        label: short name in headings.
        formula: function of the counts, called with the options as keyword arguments.
        meaning: what the number is, for legends.
        positive: positive class of the counts that the formula receives; None if both choices give the same value.
        higher_is_better: direction.
        percent: whether values are shares, shown in percent.
        headline: whether it is shown in summary tables, compared between runs, has an interval in benchmark results and
            may choose parameters; the others are in frames, files and the HTML report.
        interval: method of the interval: DeLong (the AUROC only) or the bootstrap.
        options: options of ``compare`` that the formula takes.
        resampled: draws ``[R]`` values of the formula on resampled rows from (counts, R, generator), where there is a
            faster way than to draw the rows.
    """

    name: str
    label: str
    formula: Callable[..., float]
    meaning: str
    positive: Literal["ID", "OoD"] | None = None
    higher_is_better: bool = True
    percent: bool = True
    headline: bool = False
    interval: Literal["DeLong", "bootstrap"] = "bootstrap"
    options: tuple[str, ...] = ()
    resampled: Callable[[RocCounts, int, np.random.Generator], NDArray[np.float64]] | None = None

    @property
    def title(self) -> str:
        return f"{self.label} ({self.positive} positive)" if self.positive else self.label

    @property
    def heading(self) -> tuple[str, str]:
        """The title in two short lines: label, and direction with the positive class."""
        return self.label, ("↑" if self.higher_is_better else "↓") + (self.positive or "")

    @property
    def legend(self) -> str:
        return f"{self.meaning}; {'higher' if self.higher_is_better else 'lower'} is better"

    @property
    def scale(self) -> int:
        """Factor from a value to the number that is shown."""
        return 100 if self.percent else 1

    def __call__(self, id_scores: Scores, ood_scores: Scores) -> float:
        """Value for two score vectors with the formula's default options; raises what `roc_counts` raises."""
        return self.formula(self.counts(roc_counts(id_scores, ood_scores)))

    def counts(self, as_id: RocCounts) -> RocCounts:
        """The counts that the formula receives, from those with ID as the positive class."""
        return as_id.mirrored() if self.positive == "OoD" else as_id


def roc_counts(id_scores: Scores, ood_scores: Scores) -> RocCounts:
    """Counts with ID as the positive class, in O(n log n) time and linear memory.

    Args:
        id_scores: [N] scores of ID rows: a tensor on any device, an array or a list of numbers; infinities are allowed.
        ood_scores: [M] scores of OoD rows, likewise.

    Raises:
        NotFinite: a score is NaN.
        EmptyInput: one side has no rows.
        ShapeMismatch: scores that are not one-dimensional.
        BadInput: scores that are not real numbers.
    """
    id_negated, ood_negated = -checked_scores(id_scores, "ID"), -checked_scores(ood_scores, "OoD")
    id_negated.sort()
    ood_negated.sort()
    scores = np.concatenate([id_negated, ood_negated])
    order = np.argsort(scores, kind="stable")  # merges two sorted runs: linear time
    scores = scores[order]
    last_of_value = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    positives = np.cumsum(order < len(id_negated), dtype=np.int64)[last_of_value]
    return RocCounts(-scores[last_of_value], positives, last_of_value + 1 - positives)


def compare(
    id_scores: Scores, ood_scores: Scores, *, rule: Rule = "first", interpolation: Interpolation = "step"
) -> Metrics:
    """All metrics from one sort. Arguments as for the functions named like the metrics; raises what they raise."""
    as_id = roc_counts(id_scores, ood_scores)
    as_ood = as_id.mirrored()
    options = {"rule": rule, "interpolation": interpolation}
    values = {
        name: metric.formula(
            as_ood if metric.positive == "OoD" else as_id, **{option: options[option] for option in metric.options}
        )
        for name, metric in METRICS.items()
    }
    return Metrics(values, n_id=as_id.n_positive, n_ood=as_id.n_negative)


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Area under the ROC curve: the chance that an ID row outscores an OoD row, ties counting one half.

    Shapes, dtypes and errors as in `roc_counts`. Source: Fawcett 2006, An introduction to ROC analysis.
    """
    return auroc_of(roc_counts(id_scores, ood_scores))


def aupr_in(id_scores: Scores, ood_scores: Scores, *, interpolation: Interpolation = "step") -> float:
    """Area under the precision-recall curve with ID as the positive class.

    Args:
        id_scores: [N] scores, as in `roc_counts`.
        ood_scores: [M] scores, as in `roc_counts`.
        interpolation: "step" is average precision, sum_k (R_k - R_{k-1}) P_k; "trapezoid" joins the points by straight
            lines from (recall 0, precision 1), which is optimistic but is what some published tables report.

    Raises:
        UnknownName: another interpolation. Besides, what `roc_counts` raises.

    Source: Davis & Goadrich 2006, The relationship between precision-recall and ROC curves.
    """
    return aupr_of(roc_counts(id_scores, ood_scores), interpolation)


def aupr_out(id_scores: Scores, ood_scores: Scores, *, interpolation: Interpolation = "step") -> float:
    """Area under the precision-recall curve with OoD as the positive class and scores negated; see `aupr_in`."""
    return aupr_of(roc_counts(id_scores, ood_scores).mirrored(), interpolation)


def fpr95_id(id_scores: Scores, ood_scores: Scores, *, rule: Rule = "first") -> float:
    """Share of OoD rows accepted by the threshold that keeps 95% of ID rows; see `fpr_at_tpr_id`.

    The convention of GradNorm, ViM, KNN and ASH. Source: Liang et al. 2018 (ODIN).
    """
    return fpr_at_tpr_id(id_scores, ood_scores, 0.95, rule=rule)


def fpr95_ood(id_scores: Scores, ood_scores: Scores, *, rule: Rule = "first") -> float:
    """Share of ID rows rejected by the threshold that catches 95% of OoD rows; see `fpr_at_tpr_ood`.

    The convention of OpenOOD v1.5 and pytorch-ood. Source: Zhang et al. 2023 (OpenOOD v1.5).
    """
    return fpr_at_tpr_ood(id_scores, ood_scores, 0.95, rule=rule)


def fpr_at_tpr_id(id_scores: Scores, ood_scores: Scores, tpr: float, *, rule: Rule = "first") -> float:
    """Share of OoD rows accepted by the threshold that keeps the share `tpr` of ID rows.

    Args:
        id_scores: [N] scores, as in `roc_counts`.
        ood_scores: [M] scores, as in `roc_counts`.
        tpr: in (0, 1], taken as the decimal number it prints as, so that 0.95 of 20 rows is exactly 19.
        rule: "first" is the highest threshold that keeps at least `tpr`; "nearest" is the one whose kept share is
            nearest to `tpr`: the higher share when two are as near, and of the thresholds with that share the lowest
            (the highest if it is 1), as in the code of Hendrycks et al. 2019 (Outlier Exposure).

    Raises:
        BadInput: `tpr` outside (0, 1].
        UnknownName: another rule. Besides, what `roc_counts` raises.
    """
    return fpr_of(roc_counts(id_scores, ood_scores), tpr, rule)


def fpr_at_tpr_ood(id_scores: Scores, ood_scores: Scores, tpr: float, *, rule: Rule = "first") -> float:
    """Share of ID rows rejected by the threshold that catches the share `tpr` of OoD rows: `fpr_at_tpr_id` mirrored."""
    return fpr_of(roc_counts(id_scores, ood_scores).mirrored(), tpr, rule)


def checked_scores(scores: Scores, side: str) -> NDArray[np.float64]:
    """Scores as float64 ``[N]``; raises what ``roc_counts`` raises, naming the side."""
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu().to(torch.promote_types(scores.dtype, torch.float64)).numpy()
    array = np.asarray(scores)
    if array.ndim != 1:
        raise ShapeMismatch(f"{side} scores have shape {list(array.shape)}; give one score per row, shape [N]")
    if len(array) == 0:
        raise EmptyInput(f"there are no {side} scores; give at least one")
    if array.dtype.kind not in "biuf":
        raise BadInput(f"{side} scores have dtype {array.dtype}; give real numbers")
    array = array.astype(np.float64, copy=False)
    n_nan = np.count_nonzero(np.isnan(array))
    if n_nan:
        raise NotFinite(f"{n_nan} of {len(array)} {side} scores are NaN; a NaN has no rank, so find where it arose")
    return array


def _rejected(accepted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows below each threshold, from the lowest threshold accepted up to all rows."""
    below = np.empty_like(accepted)
    np.subtract(accepted[-1], accepted[-2::-1], out=below[:-1])
    below[-1] = accepted[-1]
    return below


def auroc_of(counts: RocCounts) -> float:
    """``auroc`` of scores that are counted already."""
    new_negatives = np.diff(counts.negatives, prepend=0)
    outranked_twice = counts.positives.copy()  # positives above a negative count twice, those tied with it once
    outranked_twice[1:] += counts.positives[:-1]
    return int(new_negatives @ outranked_twice) / (2 * counts.n_positive * counts.n_negative)


def _step(recalled: NDArray[np.int64], precision: NDArray[np.float64]) -> float:
    return float(recalled @ precision)


def _trapezoid(recalled: NDArray[np.int64], precision: NDArray[np.float64]) -> float:
    return float(recalled @ (precision + np.append(1.0, precision[:-1]))) / 2


_INTERPOLATIONS: Registry[Callable[[NDArray[np.int64], NDArray[np.float64]], float]] = Registry(
    "interpolation", {"step": _step, "trapezoid": _trapezoid}
)


def aupr_of(counts: RocCounts, interpolation: str = "step") -> float:
    """``aupr_in`` of scores that are counted already."""
    precision = counts.positives / (counts.positives + counts.negatives)
    recalled = np.diff(counts.positives, prepend=0)
    return _INTERPOLATIONS[interpolation](recalled, precision) / counts.n_positive


def _first(positives: NDArray[np.int64], wanted: Fraction) -> int:
    return int(np.searchsorted(positives, ceil(wanted)))


def _nearest(positives: NDArray[np.int64], wanted: Fraction) -> int:
    above = _first(positives, wanted)
    candidates = {int(positives[above]), int(positives[max(above - 1, 0)])}
    kept = min(candidates, key=lambda count: (abs(count - wanted), -count))
    if kept == positives[-1]:
        return int(np.searchsorted(positives, kept))
    return int(np.searchsorted(positives, kept, side="right")) - 1


_RULES: Registry[Callable[[NDArray[np.int64], Fraction], int]] = Registry(
    "rule", {"first": _first, "nearest": _nearest}
)


def fpr_of(counts: RocCounts, tpr: float, rule: str = "first") -> float:
    """``fpr_at_tpr_id`` of scores that are counted already."""
    if not 0 < tpr <= 1:
        raise BadInput(f"a true positive rate of {tpr} cannot be asked for; give a number above 0 and at most 1")
    index = _RULES[rule](counts.positives, Fraction(str(tpr)) * counts.n_positive)
    return int(counts.negatives[index]) / counts.n_negative


def resampled_fpr(counts: RocCounts, replicates: int, rng: np.random.Generator, tpr: float) -> NDArray[np.float64]:
    """``fpr_of`` with the rule "first" on ``replicates`` resamples of the rows, without drawing rows.

    The k-th highest of n resampled rows is the row whose place, as a share of n, is a Beta(k, n - k + 1) variable (the
    k-th of n uniform ones), and how many rows of the other class it accepts is binomial.
    """
    n, m = counts.n_positive, counts.n_negative
    kept = ceil(Fraction(str(tpr)) * n)
    row = np.minimum((n * rng.beta(kept, n - kept + 1, replicates)).astype(np.int64), n - 1)
    accepted = counts.negatives[np.searchsorted(counts.positives, row, side="right")]
    return rng.binomial(m, accepted / m) / m


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        metric.name: metric
        for metric in (
            Metric(
                "auroc",
                "AUROC",
                auroc_of,
                "chance that an ID image has a higher score than an out-of-distribution (OoD) image",
                headline=True,
                interval="DeLong",
            ),
            Metric(
                "aupr_in",
                "AUPR",
                aupr_of,
                "area under the precision-recall curve with ID images as positives",
                positive="ID",
                options=("interpolation",),
            ),
            Metric(
                "aupr_out",
                "AUPR",
                aupr_of,
                "area under the precision-recall curve with OoD images as positives",
                positive="OoD",
                options=("interpolation",),
            ),
            Metric(
                "fpr95_id",
                "FPR95",
                partial(fpr_of, tpr=0.95),
                "share of OoD images accepted when 95% of ID images are",
                positive="ID",
                higher_is_better=False,
                headline=True,
                options=("rule",),
                resampled=partial(resampled_fpr, tpr=0.95),
            ),
            Metric(
                "fpr95_ood",
                "FPR95",
                partial(fpr_of, tpr=0.95),
                "share of ID images rejected when 95% of OoD images are",
                positive="OoD",
                higher_is_better=False,
                headline=True,
                options=("rule",),
                resampled=partial(resampled_fpr, tpr=0.95),
            ),
        )
    },
)
"""Every metric by name, in the order of frames and files. A new metric is a row here."""


def number(value: float, percent: bool = True, digits: int | None = None, *, signed: bool = False) -> str:
    """A scaled number as tables write it: percentages with one decimal, others with three significant digits."""
    if isnan(value):
        return NONE
    digits = (1 if percent else 3) if digits is None else digits
    return f"{value:{'+' if signed else ''}.{digits}{'f' if percent else 'g'}}"


def headline_metrics() -> list[Metric]:
    return [metric for metric in METRICS.values() if metric.headline]
