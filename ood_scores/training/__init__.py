"""Training: recipes, the trainer, and training objectives.

>>> import ood_scores.training
>>> trained = ood_scores.training.train("benchmarks/recipes/digits.toml")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_scores.training.recipe import Recipe
    from ood_scores.training.recipe_file import load_recipe
    from ood_scores.training.trainer import Trained, train

__all__ = ["Recipe", "Trained", "load_recipe", "train"]

_PLACES = {"Recipe": "recipe", "load_recipe": "recipe_file", "Trained": "trainer", "train": "trainer"}


def __getattr__(name: str) -> Any:
    """Import the trainer on first use, because objectives do not need it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
