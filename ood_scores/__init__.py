"""Out-of-distribution scores for trained image classifiers: run the model once, score it with everything.

>>> import ood_scores
>>> feats = ood_scores.extract(model, loader, cache="val.h5")
>>> scores = ood_scores.score("gradnorm", feats)

A higher score means more in-distribution, everywhere.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ood_scores.version import __version__

if TYPE_CHECKING:
    from ood_scores import benchmark, metrics, probes, training
    from ood_scores.detector import Detector
    from ood_scores.detector.calibrate import calibrate
    from ood_scores.detector.shift import shift
    from ood_scores.evaluation import evaluate, sweep
    from ood_scores.extraction import extract
    from ood_scores.features import FeatureSet, Head, ensemble, load, zero_shot_head
    from ood_scores.features.linear_probe import fit_linear_probe
    from ood_scores.models.zero_shot.build import zero_shot_classifier
    from ood_scores.models.zero_shot.negatives import NegativeWords
    from ood_scores.scorers import Scorer, create_scorer, list_scorers, register_scorer, score
    from ood_scores.scorers.storage import load_scorer

__all__ = [
    "Detector",
    "FeatureSet",
    "Head",
    "NegativeWords",
    "Scorer",
    "__version__",
    "benchmark",
    "calibrate",
    "create_scorer",
    "ensemble",
    "evaluate",
    "extract",
    "fit_linear_probe",
    "list_scorers",
    "load",
    "load_scorer",
    "metrics",
    "probes",
    "register_scorer",
    "score",
    "shift",
    "sweep",
    "training",
    "zero_shot_classifier",
    "zero_shot_head",
]

_HOME = {
    "FeatureSet": "features",
    "Head": "features",
    "ensemble": "features",
    "fit_linear_probe": "features.linear_probe",
    "load": "features",
    "zero_shot_head": "features",
    "zero_shot_classifier": "models.zero_shot.build",
    "NegativeWords": "models.zero_shot.negatives",
    "extract": "extraction",
    "Scorer": "scorers",
    "create_scorer": "scorers",
    "list_scorers": "scorers",
    "load_scorer": "scorers.storage",
    "register_scorer": "scorers",
    "score": "scorers",
    "calibrate": "detector",
    "Detector": "detector",
    "shift": "detector.shift",
    "evaluate": "evaluation",
    "sweep": "evaluation",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``import ood_scores`` costs nothing."""
    if name in ("benchmark", "metrics", "probes", "training"):
        return import_module(f"ood_scores.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'ood_scores' has no attribute {name!r}")
    value = getattr(import_module(f"ood_scores.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
