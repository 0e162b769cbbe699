"""The cost of metrics, compared with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

from benchmarks.speed.measure import Line, paired, scaled
from ood_scores.evaluation.metrics import compare

SAME = 1e-12


def metrics(scale: float) -> Iterator[Line]:
    """Measure all five metrics of the same scores, and check that the values are equal."""
    rows = scaled(scale, 10_000_000)
    generator = np.random.default_rng(0)
    id_scores, ood_scores = generator.normal(1.0, 1.0, rows), generator.normal(0.0, 1.0, rows)
    is_id = np.repeat([True, False], rows)
    scores = np.concatenate([id_scores, ood_scores])
    ours = compare(id_scores, ood_scores)
    found = [ours.auroc, ours.aupr_in, ours.aupr_out, ours.fpr95_id, ours.fpr95_ood]
    np.testing.assert_allclose(found, _by_sklearn(is_id, scores), rtol=0, atol=SAME)
    yield paired(
        f"AUROC, AUPR-in, AUPR-out and both FPR95, {rows:,} ID and {rows:,} OoD scores",
        lambda: compare(id_scores, ood_scores),
        f"scikit-learn's roc_curve and twice average_precision_score (equal to {SAME:g})",
        lambda: _by_sklearn(is_id, scores),
        better="higher",
        asked=3,
        pairs=3,
    )


def _by_sklearn(is_id: NDArray[np.bool_], scores: NDArray[np.float64]) -> list[float]:
    kept_ood, kept_id, _ = sk.roc_curve(is_id, scores, drop_intermediate=False)
    return [
        sk.auc(kept_ood, kept_id),
        sk.average_precision_score(is_id, scores),
        sk.average_precision_score(~is_id, -scores),
        kept_ood[np.searchsorted(kept_id, 0.95)],
        1 - kept_id[np.searchsorted(kept_ood, 1 - 0.95, side="right") - 1],
    ]
