"""Scorers map each row of a feature set to a score; higher = more in-distribution.

The docstring of a module that defines scorers starts with "Title: description", which lists and reference pages show.
"""

from importlib import import_module
from pkgutil import walk_packages

from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import create_scorer, list_scorers, register_scorer
from ood_scores.scorers.scoring import score

__all__ = ["Scorer", "create_scorer", "list_scorers", "register_scorer", "score"]

for _module in walk_packages(__path__, f"{__name__}."):  # importing a module registers its scorers
    import_module(_module.name)
