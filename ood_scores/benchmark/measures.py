"""Accuracy and other measures of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ood_scores.benchmark.spec import Part
from ood_scores.benchmark.unit_files import SetScores
from ood_scores.errors import MissingInput, OodScoresError
from ood_scores.evaluation.batch_norm_gaps import GAP, batch_norm_gap_ratio
from ood_scores.evaluation.calibration_error import classifier_calibration
from ood_scores.evaluation.exposure_gradients import exposure_gradients
from ood_scores.evaluation.long_tail import GROUPS, class_fpr95_ood, class_groups, long_tail_report
from ood_scores.evaluation.metrics import METRICS, Metric, Rule
from ood_scores.evaluation.neural_collapse import TITLES, neural_collapse
from ood_scores.features import FeatureSet
from ood_scores.registry import Registry
from ood_scores.scorers import create_scorer
from ood_scores.scorers.requirements import Requirement

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


@dataclass(frozen=True)
class MeasuredSets:
    """What measures read: the sets of a part for one checkpoint.

    Attributes:
        id: the ID test set.
        fit: the fit set, or None.
        ood: the OoD sets without rows that show an ID class, by name.
        auxiliary: the OoD images that the model was trained with, or None.
        scores: scores of the rows of ``id`` and of ``ood``, by scorer and by ``"id"`` or the name of the OoD set.
        rule: the threshold of FPR95.
    """

    id: FeatureSet
    fit: FeatureSet | None = None
    ood: Mapping[str, FeatureSet] = field(default_factory=dict)
    auxiliary: FeatureSet | None = None
    scores: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    rule: Rule = "first"


def measured(part: Part, sets: MeasuredSets) -> Iterator[tuple[str, Figures, str]]:
    """Yield the name, the figures and, if they cannot be computed, the reason for each measure of the part."""
    for name in part.measures:
        try:
            yield name, _rows(MEASURES[name].figures(sets, **part.measure_options(name))), ""
        except OodScoresError as error:
            yield name, [], str(error)


def _collapse(sets: MeasuredSets, **options: Any) -> dict[str, float]:
    return asdict(neural_collapse(_fit(sets), **options))


def _long_tail(sets: MeasuredSets, *, fpr95: bool = False) -> dict[str, float]:
    """Return calibration, confidence and accuracy by group of classes and, if asked for, FPR95 by group."""
    counts = _class_counts(sets)
    report = long_tail_report(sets.id, counts)
    groups = report.groups.set_index("group")
    return {
        "ece": report.ece,
        _activation_ratio([sets.id]): report.activation_ratio,
        **{f"accuracy_{group}": float(groups["accuracy"][group]) for group in GROUPS},
        "confidence": float(groups["confidence"]["all"]),
        "confidence_few": float(groups["confidence"]["few"]),
        **_means("confidence", "msp", {"ood": [*sets.ood.values()]}),
        **(_fpr95_by_group(sets, counts) if fpr95 else {}),
    }


def _calibration(sets: MeasuredSets, **options: Any) -> dict[str, float]:
    return asdict(classifier_calibration(sets.id, **options))


def _fpr95_by_group(sets: MeasuredSets, counts: Tensor) -> dict[str, float]:
    """Return the mean over the classes of each group of the FPR95 with OoD positive, for each scorer and OoD set."""
    labels, group_of = sets.id.class_labels().cpu(), class_groups(counts)
    found = {}
    for scorer, scores in sets.scores.items():
        for name in sets.ood:
            of_class = class_fpr95_ood(scores["id"], scores[name], labels, len(counts), rule=sets.rule)
            for number, group in enumerate(GROUPS):
                found[of_scorer(f"fpr95_ood_{group}", scorer, name)] = float(np.nanmean(of_class[group_of == number]))
    return found


def of_scorer(figure: str, scorer: str, ood: str) -> str:
    """Return the name of a figure of a scorer and an OoD set among the figures of a model."""
    return f"{figure} of {scorer} on {ood}"


def _representation(sets: MeasuredSets) -> dict[str, float]:
    """Return means of feature norms and activation ratios, before pooling where the sets have it, and the norms' SD."""
    groups = {
        "id": [sets.id],
        "ood": [*sets.ood.values()],
        "fit": [sets.fit] if sets.fit is not None else [],
        "auxiliary": [sets.auxiliary] if sets.auxiliary is not None else [],
    }
    tested = {group: groups[group] for group in ("id", "ood")}
    return {
        **_means("representation_norm", "feature_norm", groups),
        "representation_norm_sd": float(create_scorer("feature_norm").score(sets.id).std()),
        **_means(_activation_ratio([sets.id, *sets.ood.values()]), "activation_ratio", tested),
    }


def _activation_ratio(sets: Sequence[FeatureSet]) -> str:
    """Return the name of the ratio that these sets have: without maps, it is another quantity."""
    return "activation_ratio" if all(feats.has("activations") for feats in sets) else "pooled_activation_ratio"


def _batch_norm_gaps(sets: MeasuredSets) -> dict[str, float]:
    """Return the distance of ID images from the running means of the last BatchNorm, relative to that of OoD images."""
    lacking = [feats for feats in (sets.id, *sets.ood.values()) if not feats.has(GAP)]
    if lacking:
        raise MissingInput(f"batch_norm_gaps needs {GAP!r}: {Requirement(GAP).how_to_get('benchmark')}.")
    return {"gap_ratio": batch_norm_gap_ratio(sets.id, [*sets.ood.values()])}


def _training(sets: MeasuredSets) -> dict[str, float]:
    """Return cross-entropy and accuracy on the fit set, in eval mode and without augmentation."""
    fit = _fit(sets)
    if not fit.has("logits"):
        raise MissingInput("training needs logits of the fit set, and it has none: extract them.")
    labels, loss, correct = fit.class_labels().cpu(), 0.0, 0
    for block in fit.blocks(device="cpu", only=["logits"]):
        of_block = labels[block.start : block.start + len(block)]
        loss += float(F.cross_entropy(block.logits64(), of_block, reduction="sum"))
        correct += int((block.prediction() == of_block).sum())
    return {"training_cross_entropy": loss / len(fit), "training_accuracy": correct / len(fit)}


def _classifier_gradients(sets: MeasuredSets, *, weight: float = 0.5, classes: int = 3) -> dict[str, float]:
    """Return the mean log-ratio of ID and OoD gradients of the classes with most and fewest training rows."""
    if sets.auxiliary is None:
        raise MissingInput("classifier_gradients needs the OoD images of the training: write auxiliary = ….")
    table = exposure_gradients(_fit(sets), sets.auxiliary, weight=weight)
    ratios = table.sort_values("rows", ascending=False, kind="stable")["log_ratio"]
    return {
        "gradient_ratio_head": float(ratios[:classes].mean()),
        "gradient_ratio_tail": float(ratios[-classes:].mean()),
    }


def _fit(sets: MeasuredSets) -> FeatureSet:
    assert sets.fit is not None, "checks refuse a spec without a fit set"
    return sets.fit


def _class_counts(sets: MeasuredSets) -> Tensor:
    fit = _fit(sets)
    return torch.bincount(fit.class_labels(), minlength=fit.num_classes or 0)


def _means(figure: str, scorer: str, sets: Mapping[str, Sequence[FeatureSet]]) -> dict[str, float]:
    """Return the unweighted mean over the sets of each group of the mean score, for groups that have sets."""
    created = create_scorer(scorer).decided_for([feats for those in sets.values() for feats in those])
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
        figures: function of the sets, and of options, that returns figures by name.
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
        "long_tail": Measure(_long_tail, _keywords(_long_tail)),
        "calibration": Measure(_calibration, ("bins",), needs_fit=False),
        "representation": Measure(_representation, needs_fit=False),
        "batch_norm_gaps": Measure(_batch_norm_gaps, needs_fit=False),
        "training": Measure(_training),
        "classifier_gradients": Measure(_classifier_gradients, _keywords(_classifier_gradients)),
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


FIGURES: dict[str, Metric | Figure] = {
    "accuracy": Figure("ID accuracy"),
    "training_accuracy": Figure("accuracy, training images"),
    "training_cross_entropy": Figure("cross-entropy, training images", percent=False),
    **{name: Figure(title, percent=False) for name, title in TITLES.items()},
    **{name: METRICS[name] for name in ("brier", "nll", "ece", "ece_equal_mass", "rms_debiased")},
    **{name: Figure(name) for name in ("accuracy_many", "accuracy_medium", "accuracy_few")},
    **{name: Figure(name) for name in ("confidence", "confidence_few", "confidence_ood")},
    **{
        f"{pooled}activation_ratio{group}": Figure(f"{pooled}activation_ratio{group}")
        for pooled in ("", "pooled_")
        for group in ("", "_id", "_ood")
    },
    "gap_ratio": Figure("ratio of the gaps to the last BatchNorm, ID to OoD", percent=False),
    **{
        f"representation_norm_{group}": Figure(title, percent=False)
        for group, title in {
            "id": "norm of test images, ID",
            "ood": "norm of test images, OoD",
            "fit": "norm of training images, ID",
            "auxiliary": "norm of training images, OoD",
            "sd": "SD of the norms of test images, ID",
        }.items()
    },
    **{
        f"gradient_ratio_{group}": Figure(f"log-ratio of gradients, {group} classes", percent=False)
        for group in ("head", "tail")
    },
}
"""Figures of models by the name that published numbers use."""


OF_SCORERS = tuple(f"fpr95_ood_{group}" for group in GROUPS)
"""Figures of a model that belong to a scorer and an OoD set, see ``of_scorer``."""


def shown_as(name: str) -> Metric | Figure:
    """Find the title and unit of a metric or of a figure of a model."""
    return METRICS.get(name) or FIGURES.get(name) or Figure(name)
