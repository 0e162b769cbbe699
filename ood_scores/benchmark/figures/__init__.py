"""Figures of papers: each is a part of a spec with a ``[figure]`` table, drawn from the results of the run."""

from ood_scores.benchmark.figures.page import write_figures
from ood_scores.benchmark.figures.plots import PLOTS

__all__ = ["PLOTS", "write_figures"]
