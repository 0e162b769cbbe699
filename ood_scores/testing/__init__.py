"""Checks that a scorer or a probe keeps what all of its kind promise, for tests of your own classes."""

from ood_scores.testing.probes import check_probe, probe_checks
from ood_scores.testing.scorers import check_scorer, scorer_checks

__all__ = ["check_probe", "check_scorer", "probe_checks", "scorer_checks"]
