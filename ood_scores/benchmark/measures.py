"""Accuracy and other measures of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ood_scores.benchmark.spec import Part
from ood_scores.benchmark.unit_files import SetScores
from ood_scores.errors import OodScoresError
from ood_scores.evaluation.calibration_error import classifier_calibration
from ood_scores.evaluation.long_tail import long_tail_report
from ood_scores.evaluation.metrics import METRICS, Metric
from ood_scores.evaluation.neural_collapse import TITLES, neural_collapse
from ood_scores.features import FeatureSet
from ood_scores.registry import Registry
from ood_scores.scorers import create_scorer

Figures = Sequence[Mapping[str, Any]]


def accuracies(part: Part, scored: Mapping[str, SetScores], sets: Mapping[str, FeatureSet]) -> Figures:
    """Return ``accuracy`` on the ID set and ``accuracy on NAME`` for covariate-shifted sets, if they have labels."""
    names = {part.id: "accuracy"} | {name: f"accuracy on {name}" for name in part.covariate}
    found = {}
    for name, measure in names.items():
        if name in scored and sets[name].has("labels") and sets[name].has("logits"):
            sets[name].class_labels()
            found[measure] = float((scored[name].predictions == scored[name].labels).double().mean())
    return _rows(found)


def measured(
    part: Part, id: FeatureSet, fit: FeatureSet | None, ood: Sequence[FeatureSet] = ()
) -> Iterator[tuple[str, Figures, str]]:
    """Yield the name, the figures and, if they cannot be computed, the reason for each measure of the part."""
    for name in part.measures:
        try:
            yield name, _rows(MEASURES[name].figures(id, fit, ood, **part.measure_options(name))), ""
        except OodScoresError as error:
            yield name, [], str(error)


def _collapse(id: FeatureSet, fit: Any, ood: Sequence[FeatureSet], **options: Any) -> dict[str, float]:
    return asdict(neural_collapse(fit, **options))


def _long_tail(id: FeatureSet, fit: Any, ood: Sequence[FeatureSet]) -> dict[str, float]:
    counts = torch.bincount(fit.class_labels(), minlength=fit.num_classes or 0)
    report = long_tail_report(id, counts)
    groups = report.groups.set_index("group")
    return {
        "ece": report.ece,
        "activation_ratio": report.activation_ratio,
        **{f"accuracy_{group}": float(groups["accuracy"][group]) for group in ("many", "medium", "few")},
        "confidence": float(groups["confidence"]["all"]),
        "confidence_few": float(groups["confidence"]["few"]),
        **_means("confidence", "msp", {"ood": ood}),
    }


def _calibration(id: FeatureSet, fit: Any, ood: Sequence[FeatureSet], **options: Any) -> dict[str, float]:
    return asdict(classifier_calibration(id, **options))


def _representation(id: FeatureSet, fit: Any, ood: Sequence[FeatureSet]) -> dict[str, float]:
    """Return the mean norm of the features and the mean activation ratio, before pooling where the sets have it."""
    sets = {"id": [id], "ood": ood}
    of = "map" if all(feats.has("activations") for feats in (id, *ood)) else "features"
    return _means("representation_norm", "feature_norm", sets) | _means(
        "activation_ratio", "activation_ratio", sets, of=of
    )


def _means(figure: str, scorer: str, sets: Mapping[str, Sequence[FeatureSet]], **parameters: Any) -> dict[str, float]:
    """Return the unweighted mean over the sets of each group of the mean score, for groups that have sets."""
    created = create_scorer(scorer, **parameters)
    return {
        f"{figure}_{group}": sum(float(created.score(feats).mean()) for feats in those) / len(those)
        for group, those in sets.items()
        if those
    }


def _rows(figures: Mapping[str, float]) -> Figures:
    return [{"measure": name, "value": value} for name, value in figures.items()]


@dataclass(frozen=True)
class Measure:
    """A measure that a spec can name.

    Attributes:
        figures: function of the ID set, the fit set, the OoD sets, and of options, that returns figures by name.
        options: names of the options.
        needs_fit: whether it needs a fit set.
    """

    figures: Callable[..., dict[str, float]]
    options: tuple[str, ...] = ()
    needs_fit: bool = True


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


MEASURES: Registry[Measure] = Registry(
    "measure",
    {
        "neural_collapse": Measure(_collapse, _keywords(neural_collapse)),
        "long_tail": Measure(_long_tail),
        "calibration": Measure(_calibration, ("bins",), needs_fit=False),
        "representation": Measure(_representation, needs_fit=False),
    },
)
"""Measures by name. Accuracy is always measured."""


@dataclass(frozen=True)
class Figure:
    """Title and unit of a figure of a model."""

    title: str
    percent: bool = True

    @property
    def scale(self) -> int:
        return 100 if self.percent else 1


FIGURES = {
    "accuracy": Figure("ID accuracy"),
    **{name: Figure(title, percent=False) for name, title in TITLES.items()},
    **{name: Figure(name, percent=False) for name in ("brier", "nll")},
    **{name: Figure(name) for name in ("ece_equal_mass", "rms_debiased")},
    **{name: Figure(name) for name in ("ece", "activation_ratio", "accuracy_many", "accuracy_medium", "accuracy_few")},
    **{name: Figure(name) for name in ("confidence", "confidence_few", "confidence_ood")},
    **{f"activation_ratio_{group}": Figure(f"activation_ratio_{group}") for group in ("id", "ood")},
    **{
        f"representation_norm_{group}": Figure(f"representation_norm_{group}", percent=False) for group in ("id", "ood")
    },
}
"""Figures of models by the name that published numbers use."""


def shown_as(name: str) -> Metric | Figure:
    """Find the title and unit of a metric or of a figure of a model."""
    return METRICS.get(name) or FIGURES.get(name) or Figure(name)
