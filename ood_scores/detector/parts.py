"""The parts of a detector that are saved, and the properties that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ood_scores.detector.calibration import Calibration
from ood_scores.detector.label_sets import LabelSets
from ood_scores.detector.preprocessing import Preprocessing, Transform, transform_of
from ood_scores.errors import OtherModel
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.probes import LayerProbe, Probe
from ood_scores.features import FeatureSet, Provenance
from ood_scores.models.running import architecture, model_device
from ood_scores.scorers.base import Scorer


@dataclass(eq=False)
class DetectorParts:
    """The parts of a detector.

    Attributes:
        forward: the classifier, and how it is run. Its weights must stay those that the detector was calibrated with.
        scorer: the scorer, fitted.
        calibration: the scores of held-out ID data, and the threshold that follows from them.
        weights: SHA-256 of the model's weights.
        preprocessing: how an image becomes an input of the model, as a description or a function; see
            ``ood_scores.detector.preprocessing``. None if unknown.
        classes: the names of the classes, or None.
        data: where the calibration data came from, or None.
        arguments: the arguments of ``timm.create_model`` beyond ``num_classes``, if they were passed to ``save``.
        label_sets: the rule for sets of labels, or None.
        transform: the preprocessing, from a PIL image to ``[C, H, W]``, or None.
    """

    forward: Forward
    scorer: Scorer
    calibration: Calibration
    weights: str
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    data: Provenance | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    label_sets: LabelSets | None = None
    transform: Transform | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.preprocessing is not None:
            self.transform = transform_of(self.model, self.preprocessing)

    @property
    def model(self) -> nn.Module:
        """The classifier."""
        return self.forward.model

    @property
    def stored_preprocessing(self) -> Mapping[str, Any] | None:
        """The preprocessing as ``save`` stores it; None if it is unknown, or a function that has no description."""
        return self.preprocessing if isinstance(self.preprocessing, Mapping) else None

    @property
    def transform_text(self) -> str:
        """The transform in one line, as the provenance of feature sets describes that of their images."""
        return " ".join(repr(self.transform).split())

    @property
    def passes(self) -> str:
        """The passes of a batch through the model: ``one forward pass``, and those that the scorer's probes add."""
        return _cost(self.forward.options.all_probes)

    @property
    def device(self) -> torch.device:
        """The device that the model is on; it runs there, and scores are computed there."""
        return model_device(self.model)


def require_weights(model: nn.Module, weights: str, feats: FeatureSet, name: str) -> None:
    """Check that a feature set, if it has provenance, was extracted with these weights.

    Raises:
        OtherModel: if it was not.
    """
    if feats.provenance and feats.provenance.weights_sha256 != weights:
        raise OtherModel(
            f"{name} was extracted with {feats.provenance.architecture} with weights "
            f"{feats.provenance.weights_sha256[:12]}…, but the model is {architecture(model)} with weights "
            f"{weights[:12]}…: extract it again with this model."
        )


def _cost(probes: Iterable[Probe]) -> str:
    """Return the passes of a batch through the model, in words."""
    again = [probe for probe in probes if type(probe).columns is not LayerProbe.columns]
    backward = [probe.name for probe in again if probe.gradients]
    forward = [probe.name for probe in again if not probe.gradients]
    parts = ["one forward pass"]
    parts += [f"backward passes for {', '.join(backward)}"] if backward else []
    parts += [f"further forward passes for {', '.join(forward)}"] if forward else []
    return ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
