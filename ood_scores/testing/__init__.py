"""Checks that a scorer keeps what all scorers promise, for tests of your own classes."""

from ood_scores.testing.scorers import check_scorer, scorer_checks

__all__ = ["check_scorer", "scorer_checks"]
