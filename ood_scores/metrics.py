"""Short path to the metrics: ``from ood_scores.metrics import auroc``. See ``ood_scores.evaluation.metrics``."""

from ood_scores.evaluation.metrics import (
    METRICS,
    Metric,
    Metrics,
    aupr_in,
    aupr_out,
    auroc,
    compare,
    fpr95_id,
    fpr95_ood,
    fpr_at_tpr_id,
    fpr_at_tpr_ood,
)
from ood_scores.evaluation.threshold_counts import RocCounts, roc_counts

__all__ = [
    "METRICS",
    "Metric",
    "Metrics",
    "RocCounts",
    "aupr_in",
    "aupr_out",
    "auroc",
    "compare",
    "fpr95_id",
    "fpr95_ood",
    "fpr_at_tpr_id",
    "fpr_at_tpr_ood",
    "roc_counts",
]
