"""Scorers as scikit-learn estimators, for arrays of features in pipelines and grid searches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.validation import check_is_fitted, validate_data

from ood_scores.errors import BadInput
from ood_scores.features import FeatureSet
from ood_scores.features.linear_probe import fit_linear_probe
from ood_scores.scorers import create_scorer


class OODEstimator(OutlierMixin, BaseEstimator):
    """A scorer as scikit-learn's outlier detectors are: 1 for in-distribution rows and -1 for out-of-distribution rows.

    A scorer that needs logits or a head gets those of a linear probe, which is fitted on the features and ``y``; see
    ``ood_scores.fit_linear_probe``.

    Args:
        scorer: the name of a scorer that reads features, logits, labels, or a head; ``ood-scores list`` shows them.
        parameters: parameters of the scorer by name; None for its defaults.
        contamination: the share of fit rows that ``predict`` calls -1, in (0, 0.5]. The scorer is fitted on these rows,
            so a smaller or, mostly, a larger share of new rows gets -1. For a threshold with a guarantee, pass
            ``score_samples`` of held-out rows to ``ood_scores.detector.conformal.threshold``.

    Attributes:
        scorer_: the fitted scorer.
        head_: the head of the linear probe, or None.
        classes_: the distinct values of ``y``, or None.
        offset_: the threshold: ``decision_function`` is ``score_samples - offset_``.
    """

    def __init__(
        self, scorer: str = "knn", *, parameters: Mapping[str, Any] | None = None, contamination: float = 0.05
    ) -> None:
        self.scorer = scorer
        self.parameters = parameters
        self.contamination = contamination

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> OODEstimator:
        """Fit the scorer on features ``[N, D]`` of in-distribution rows and, where it needs them, labels ``[N]``.

        Raises:
            BadInput: if the scorer needs labels or logits and there is no ``y``, or ``contamination`` is out of range.
            MissingInput: if the scorer reads more than features, logits, labels, and a head.
        """
        if not 0 < self.contamination <= 0.5:
            raise BadInput(f"contamination must be in (0, 0.5], got {self.contamination}.")
        values = np.require(validate_data(self, X, dtype=np.float64, ensure_min_samples=2), requirements="W")
        scorer = create_scorer(self.scorer, **(self.parameters or {}))
        needed = {*scorer.needs, *scorer.fit_needs} & {"logits", "head", "labels"}
        if needed and y is None:
            raise BadInput(f"{self.scorer!r} needs {' and '.join(sorted(needed))}: pass the classes of the rows as y.")
        self.classes_, labels = None, None
        if needed:
            encoder = LabelEncoder()
            labels = encoder.fit_transform(np.asarray(y))
            self.classes_ = encoder.classes_
        feats = FeatureSet(values, labels=labels)
        if needed & {"logits", "head"}:
            feats = fit_linear_probe(feats)
        self.head_ = feats.head
        self.scorer_ = scorer.fit(feats) if scorer.fit_needs else scorer
        self.offset_ = float(np.quantile(self.score_samples(values), self.contamination))
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the scores of features ``[N, D]``, float64 ``[N]``; higher means more in-distribution."""
        check_is_fitted(self)
        feats = FeatureSet(np.require(validate_data(self, X, dtype=np.float64, reset=False), requirements="W"))
        scored = self.scorer_.score(feats if self.head_ is None else feats.with_head(self.head_))
        return np.asarray(scored)

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return ``score_samples - offset_``, float64 ``[N]``: negative for out-of-distribution rows."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return 1 for in-distribution and -1 for out-of-distribution rows, int64 ``[N]``."""
        return np.where(self.decision_function(X) >= 0, 1, -1)
