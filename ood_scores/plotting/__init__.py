"""Figures of scores, feature norms and neural collapse."""

from ood_scores.optional_packages import require

require("figures need", "report", "matplotlib")
