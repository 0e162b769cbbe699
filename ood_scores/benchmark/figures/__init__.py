"""Figures of papers: each is a part of a spec with a ``[figure]`` table, drawn from the results of the run."""

from ood_scores.optional_packages import require

require("figures of papers need", "report", "matplotlib", "jinja2", "markdown_it")

from ood_scores.benchmark.figures.page import write_figures  # noqa: E402  says what is missing first
from ood_scores.benchmark.figures.plots import PLOTS  # noqa: E402

__all__ = ["PLOTS", "write_figures"]
