"""Metrics of how well scores separate in-distribution (ID) rows from out-of-distribution (OoD) rows.

Higher scores mean more in-distribution. Each metric is a row of ``METRICS``: a formula on ``RocCounts``, which take one
sort of the scores, and everything that the package needs to compute, store and show the metric. Counts are int64 and
ratios float64, so ties and thresholds are exact. FPR95 has two meanings in the literature, so there are two metrics:
``fpr95_id`` (ID is the positive class) and ``fpr95_ood`` (OoD is the positive class).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import isnan, nan
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ood_scores.errors import BadInput
from ood_scores.evaluation import calibration_error, selective
from ood_scores.evaluation.calibration_error import ClassifiedRows
from ood_scores.evaluation.roc_metrics import aupr_of, auroc_of, fpr_of, resampled_fpr
from ood_scores.evaluation.threshold_counts import Correct, RocCounts, Scores, roc_counts
from ood_scores.registry import Registry

Rule: TypeAlias = Literal["first", "nearest"]
Interpolation: TypeAlias = Literal["step", "trapezoid"]
NONE = "–"
"""Text that tables show for NaN."""


class Metrics(dict[str, float]):
    """The value of every metric for one pair of score vectors, and the numbers of rows ``n_id`` and ``n_ood``.

    Values can be read as items or as attributes: ``found["auroc"]`` is ``found.auroc``.
    """

    n_id: int
    n_ood: int

    def __getattr__(self, name: str) -> float:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no metric {name!r}: choose from {', '.join(self)}.") from None


@dataclass(frozen=True)
class Metric:
    """A metric: its formula, and how tables and files show it.

    Attributes:
        name: Key in data frames, files and specs.
        label: Short name for headings.
        formula: Function of the counts; options are passed as keyword arguments. For a metric of the classifier, a
            function of ``ClassifiedRows``.
        meaning: Description of the number for legends.
        positive: Positive class of the counts that are passed to the formula, or None if the choice makes no
            difference.
        higher_is_better: Whether higher values are better.
        percent: Whether values are shares, which are shown in percent.
        headline: Whether the metric appears in summary tables and comparisons of runs, has an interval in benchmark
            results, and can be used to choose parameters.
        on_request: Whether the metric is computed only where it is asked for by name; it is then a headline metric
            there. All other metrics appear in data frames, files and the HTML report.
        needs_correct: Whether the formula needs to know which ID rows are classified correctly.
        of_classifier: Whether the metric rates the softmax probabilities of ID rows, whatever the scores.
        interval: Method of the interval: DeLong (AUROC only) or the bootstrap.
        options: Names of the options of ``compare`` that the formula accepts.
        resampled: Function of the counts, the number of replicates R and a random generator that returns the metric on
            R resamples, ``[R]``. None if the rows have to be drawn.
    """

    name: str
    label: str
    formula: Callable[..., float]
    meaning: str
    positive: Literal["ID", "OoD"] | None = None
    higher_is_better: bool = True
    percent: bool = True
    headline: bool = False
    on_request: bool = False
    needs_correct: bool = False
    of_classifier: bool = False
    interval: Literal["DeLong", "bootstrap"] = "bootstrap"
    options: tuple[str, ...] = ()
    resampled: Callable[[RocCounts, int, np.random.Generator], NDArray[np.float64]] | None = None

    @property
    def title(self) -> str:
        return f"{self.label} ({self.positive} positive)" if self.positive else self.label

    @property
    def heading(self) -> tuple[str, str]:
        """The title as two short lines: the label, and the direction with the positive class."""
        return self.label, ("↑" if self.higher_is_better else "↓") + (self.positive or "")

    @property
    def legend(self) -> str:
        unit = "" if self.percent else ", not in percent"
        return f"{self.meaning}{unit}; {'higher' if self.higher_is_better else 'lower'} is better"

    @property
    def scale(self) -> int:
        """Factor by which a value is multiplied before it is shown."""
        return 100 if self.percent else 1

    def __call__(
        self,
        id_scores: Scores,
        ood_scores: Scores,
        correct: Correct | None = None,
        classified: ClassifiedRows | None = None,
    ) -> float:
        """Compute the metric of two score vectors with default options; errors are those of ``roc_counts``.

        The value is NaN if the metric needs ``correct`` or ``classified`` and it is None.
        """
        return self.of(roc_counts(id_scores, ood_scores, correct), classified)

    def of(self, as_id: RocCounts, classified: ClassifiedRows | None = None, **options: object) -> float:
        """Compute the metric of counts with ID as the positive class; NaN if what it needs is not there."""
        if self.of_classifier:
            return nan if classified is None else self.formula(classified)
        if self.needs_correct and as_id.correct is None:
            return nan
        return self.formula(self.counts(as_id), **{name: options[name] for name in self.options if name in options})

    def counts(self, as_id: RocCounts) -> RocCounts:
        """Convert counts with ID as the positive class to those that the formula expects."""
        return as_id.mirrored() if self.positive == "OoD" else as_id


def compare(
    id_scores: Scores,
    ood_scores: Scores,
    *,
    correct: Correct | None = None,
    classified: ClassifiedRows | None = None,
    metrics: Iterable[str] = (),
    rule: Rule = "first",
    interpolation: Interpolation = "step",
) -> Metrics:
    """Compute all metrics that are not on request, and those asked for, from one sort of the scores.

    Args:
        id_scores: Scores of ID rows, ``[N]``, as for ``roc_counts``.
        ood_scores: Scores of OoD rows, ``[M]``, as for ``roc_counts``.
        correct: Whether each ID row is classified correctly, bool ``[N]``. Metrics that need it are NaN without it.
        classified: The ID rows for metrics of the classifier, which are NaN without them.
        metrics: Names of metrics on request, see ``METRICS``.
        rule: See ``fpr_at_tpr_id``.
        interpolation: See ``aupr_in``.

    Raises:
        UnknownName: if there is no such metric, rule or interpolation.
        NotFinite, EmptyInput, ShapeMismatch, BadInput: as for ``roc_counts``.
    """
    as_id = roc_counts(id_scores, ood_scores, correct)
    options = {"rule": rule, "interpolation": interpolation}
    values = {each.name: each.of(as_id, classified, **options) for each in table_metrics(metrics)}
    return Metrics(values, n_id=as_id.n_positive, n_ood=as_id.n_negative)


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Area under the ROC curve: the probability that an ID row outscores an OoD row, where ties count one half.

    Arguments and errors are those of ``roc_counts``. Source: Fawcett 2006, An introduction to ROC analysis.
    """
    return auroc_of(roc_counts(id_scores, ood_scores))


def aupr_in(id_scores: Scores, ood_scores: Scores, *, interpolation: Interpolation = "step") -> float:
    """Area under the precision-recall curve with ID as the positive class.

    Args:
        id_scores: Scores of ID rows, ``[N]``, as for ``roc_counts``.
        ood_scores: Scores of OoD rows, ``[M]``, as for ``roc_counts``.
        interpolation: ``"step"`` for average precision, ``sum_k (R_k - R_{k-1}) P_k``; ``"trapezoid"`` for straight
            lines between the points, starting at (recall 0, precision 1). Straight lines are optimistic, but some
            published tables use them.

    Raises:
        UnknownName: if there is no such interpolation.
        NotFinite, EmptyInput, ShapeMismatch, BadInput: as for ``roc_counts``.

    Source: Davis & Goadrich 2006, The relationship between precision-recall and ROC curves.
    """
    return aupr_of(roc_counts(id_scores, ood_scores), interpolation)


def aupr_out(id_scores: Scores, ood_scores: Scores, *, interpolation: Interpolation = "step") -> float:
    """Area under the precision-recall curve with OoD as the positive class and negated scores; see ``aupr_in``."""
    return aupr_of(roc_counts(id_scores, ood_scores).mirrored(), interpolation)


def fpr95_id(id_scores: Scores, ood_scores: Scores, *, rule: Rule = "first") -> float:
    """Share of OoD rows accepted by the threshold that accepts 95% of ID rows; see ``fpr_at_tpr_id``.

    This is the convention of GradNorm, ViM, KNN and ASH. Source: Liang et al. 2018 (ODIN).
    """
    return fpr_at_tpr_id(id_scores, ood_scores, 0.95, rule=rule)


def fpr95_ood(id_scores: Scores, ood_scores: Scores, *, rule: Rule = "first") -> float:
    """Share of ID rows rejected by the threshold that rejects 95% of OoD rows; see ``fpr_at_tpr_ood``.

    This is the convention of OpenOOD v1.5 and pytorch-ood. Source: Zhang et al. 2023 (OpenOOD v1.5).
    """
    return fpr_at_tpr_ood(id_scores, ood_scores, 0.95, rule=rule)


def fpr_at_tpr_id(id_scores: Scores, ood_scores: Scores, tpr: float, *, rule: Rule = "first") -> float:
    """Share of OoD rows accepted by the threshold that accepts the share ``tpr`` of ID rows.

    Args:
        id_scores: Scores of ID rows, ``[N]``, as for ``roc_counts``.
        ood_scores: Scores of OoD rows, ``[M]``, as for ``roc_counts``.
        tpr: True positive rate in (0, 1], taken as the decimal number that it prints as, so that 0.95 of 20 rows is
            exactly 19.
        rule: ``"first"`` for the highest threshold that accepts at least ``tpr``; ``"nearest"`` for the threshold whose
            accepted share is closest to ``tpr``. If two shares are equally close, the higher one is used; of the
            thresholds with that share, the lowest is used (the highest if the share is 1), as in the code of Hendrycks
            et al. 2019 (Outlier Exposure).

    Raises:
        BadInput: if ``tpr`` is outside (0, 1].
        UnknownName: if there is no such rule.
        NotFinite, EmptyInput, ShapeMismatch, BadInput: as for ``roc_counts``.
    """
    return fpr_of(roc_counts(id_scores, ood_scores), tpr, rule)


def fpr_at_tpr_ood(id_scores: Scores, ood_scores: Scores, tpr: float, *, rule: Rule = "first") -> float:
    """Share of ID rows rejected by the threshold that rejects the share ``tpr`` of OoD rows; see ``fpr_at_tpr_id``."""
    return fpr_of(roc_counts(id_scores, ood_scores).mirrored(), tpr, rule)


_aupr = partial(Metric, label="AUPR", formula=aupr_of, options=("interpolation",))
_fpr95 = partial(
    Metric,
    label="FPR95",
    formula=partial(fpr_of, tpr=0.95),
    higher_is_better=False,
    headline=True,
    options=("rule",),
    resampled=partial(resampled_fpr, tpr=0.95),
)
_system = partial(Metric, on_request=True, needs_correct=True)
_risk = partial(_system, higher_is_better=False)
_classifier = partial(Metric, on_request=True, of_classifier=True, higher_is_better=False)
_ROWS = (
    Metric(
        "auroc",
        label="AUROC",
        formula=auroc_of,
        meaning="probability that an ID image has a higher score than an out-of-distribution (OoD) image",
        headline=True,
        interval="DeLong",
    ),
    _aupr("aupr_in", positive="ID", meaning="area under the precision-recall curve with ID images as positives"),
    _aupr("aupr_out", positive="OoD", meaning="area under the precision-recall curve with OoD images as positives"),
    _fpr95("fpr95_id", positive="ID", meaning="share of OoD images accepted when 95% of ID images are accepted"),
    _fpr95("fpr95_ood", positive="OoD", meaning="share of ID images rejected when 95% of OoD images are rejected"),
    _risk(
        "aurc",
        label="AURC",
        formula=selective.aurc_of,
        meaning="mean error rate among accepted ID images over all coverages",
    ),
    _risk(
        "e_aurc",
        label="E-AURC",
        formula=selective.e_aurc_of,
        meaning="AURC minus that of the best ranking of the same predictions",
    ),
    _risk(
        "augrc",
        label="AUGRC",
        formula=selective.augrc_of,
        meaning="mean share of ID images that are accepted and misclassified over all coverages",
    ),
    *(
        _risk(
            f"{name}_scod",
            label=f"{label}-SCOD",
            formula=partial(formula, ood=True),
            meaning=f"{label} on ID and OoD images together, where accepted OoD images are errors",
        )
        for name, label, formula in (
            ("aurc", "AURC", selective.aurc_of),
            ("e_aurc", "E-AURC", selective.e_aurc_of),
            ("augrc", "AUGRC", selective.augrc_of),
        )
    ),
    _system(
        "oscr",
        label="OSCR",
        formula=selective.oscr_of,
        meaning="probability that an ID image is classified correctly and has a higher score than an OoD image",
    ),
    *(
        _system(
            f"ccr_fpr{places}",
            label=f"CCR@1e-{places}",
            formula=partial(selective.ccr_of, fpr=f"1e-{places}"),
            meaning=f"share of ID images accepted and classified correctly when at most 1e-{places} of OoD images are "
            "accepted",
        )
        for places in (1, 2, 3, 4)
    ),
    Metric(
        "detection_error",
        label="detection error",
        formula=selective.detection_error_of,
        meaning="smallest mean of the shares of rejected ID images and accepted OoD images over all thresholds",
        higher_is_better=False,
        on_request=True,
    ),
    Metric(
        "autc",
        label="AUTC",
        formula=selective.autc_of,
        meaning="mean error over thresholds that are uniform between the lowest and the highest score",
        higher_is_better=False,
        on_request=True,
    ),
    _classifier(
        "brier",
        label="Brier",
        formula=calibration_error.brier_of,
        meaning="mean squared distance of the probabilities of ID images from their labels, summed over classes",
        percent=False,
    ),
    _classifier(
        "nll",
        label="NLL",
        formula=calibration_error.nll_of,
        meaning="mean negative log-likelihood of the labels of ID images, in nats",
        percent=False,
    ),
    _classifier(
        "ece",
        label="ECE",
        formula=calibration_error.ece_of,
        meaning="mean difference of confidence and accuracy on ID images, over 15 bins of equal width",
    ),
    _classifier(
        "ece_equal_mass",
        label="ECE-mass",
        formula=calibration_error.ece_equal_mass_of,
        meaning="mean difference of confidence and accuracy on ID images, over 15 bins of equally many images",
    ),
    _classifier(
        "rms_debiased",
        label="RMSCE",
        formula=calibration_error.rms_debiased_of,
        meaning="root mean squared difference of confidence and accuracy on ID images, over 15 bins of equally many "
        "images, without the part that is due to chance",
    ),
)
METRICS: Registry[Metric] = Registry("metric", {metric.name: metric for metric in _ROWS})
"""All metrics by name, in the order of data frames and files. To add a metric, add a row."""


def number(value: float, percent: bool = True, digits: int | None = None, *, signed: bool = False) -> str:
    """Format a scaled number for a table: by default percentages have one decimal, others three significant digits."""
    if isnan(value):
        return NONE
    digits = (1 if percent else 3) if digits is None else digits
    return f"{value:{'+' if signed else ''}.{digits}{'f' if percent else 'g'}}"


def table_metrics(asked: Iterable[str] = ()) -> list[Metric]:
    """Metrics of data frames and files: all that are not on request, and those asked for, in the order of ``METRICS``.

    Raises:
        UnknownName: if there is no metric with a name that is asked for.
        BadInput: if ``asked`` is a text instead of a list.
    """
    if isinstance(asked, str):
        raise BadInput(f"metrics is the text {asked!r}: give a list of names, such as [{asked!r}].")
    wanted = {METRICS[name].name for name in asked}
    return [metric for metric in METRICS.values() if metric.name in wanted or not metric.on_request]


def asks_for_classifier(asked: Iterable[str]) -> bool:
    """Whether a metric that is asked for rates the classifier, and needs its probabilities."""
    return any(METRICS[name].of_classifier for name in asked)


def headline_metrics(asked: Iterable[str] = ()) -> list[Metric]:
    """Metrics of summary tables, in the order of ``METRICS``: the usual ones, and those on request asked for."""
    return [metric for metric in table_metrics(asked) if metric.headline or metric.on_request]
