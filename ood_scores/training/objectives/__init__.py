"""Training objectives: losses that the trainer minimizes, by name or as objects.

Each family consists of pure functions of logits or features, and small ``Objective`` modules on top of them.

>>> from ood_scores.training.objectives import create_objective
>>> objective = create_objective("rna", class_counts=[5000, 500, 50], num_features=512)
>>> loss = objective(features, head, labels, ood_features)  # doctest: +SKIP
"""

from importlib import import_module
from pkgutil import iter_modules

from ood_scores.training.objectives.base import (
    Objective,
    create_objective,
    list_objectives,
    objective_class,
    register_objective,
)

__all__ = ["Objective", "create_objective", "list_objectives", "objective_class", "register_objective"]

for _module in iter_modules(__path__, f"{__name__}."):  # importing a module registers its objectives
    import_module(_module.name)
