"""Metrics, the evaluation of scorers on OoD sets, and parameter sweeps."""

from ood_scores.evaluation import metrics
from ood_scores.evaluation.evaluate import evaluate, evaluate_details
from ood_scores.evaluation.sweep import sweep

__all__ = ["evaluate", "evaluate_details", "metrics", "sweep"]
