"""Checks for tests of your own scorers and probes: whether they have the properties that all of them must have."""

from ood_scores.testing.probes import check_probe, probe_checks
from ood_scores.testing.scorers import check_scorer, scorer_checks

__all__ = ["check_probe", "check_scorer", "probe_checks", "scorer_checks"]
