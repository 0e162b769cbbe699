"""Detector: a fitted scorer with a calibrated threshold and the model it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ood_scores.detector.bundle import load_parts, save_parts
from ood_scores.detector.inputs import images_in, input_batches
from ood_scores.detector.parts import DetectorParts
from ood_scores.detector.prediction import Prediction, predictions_of
from ood_scores.errors import BadInput, OtherModel
from ood_scores.features import FeatureSet
from ood_scores.models.running import architecture, choose_device, model_dtype

if TYPE_CHECKING:
    from ood_scores.detector.export import DetectorGraph
    from ood_scores.detector.monitor import Monitor


@dataclass(eq=False)
class Detector(DetectorParts):
    """A classifier that says of every image whether it is out of distribution; made by ``calibrate`` or ``load``.

    Calls of detectors of one model from several threads take turns at it; copies in other processes (by pickle) are
    independent.

    Attributes: see ``DetectorParts``.
    """

    def predict(self, images: Any) -> Prediction:
        """What each image shows, and whether it is out of distribution.

        Args:
            images: a batch, in any of the forms that ``ood_scores.detector.inputs.input_batches`` lists: tensors
                ``[B, C, H, W]`` of floating point are what the model takes; uint8 arrays and tensors, PIL images, paths
                and bytes are images that still go through the model's preprocessing.

        Raises:
            EmptyInput: no image.
            BadInput, MissingData, ShapeMismatch: not images, or not of a shape that the model takes.
            NotFinite: an image, a feature or a logit is NaN or infinite.
        """
        parts: list[Prediction] = []
        for inputs in input_batches(images, self.transform):
            parts.append(self.decide(self.forward.feature_set(inputs, sum(map(len, parts)))))
        return parts[0] if len(parts) == 1 else Prediction.joined(parts)

    def decide(self, feats: FeatureSet) -> Prediction:
        """The same for a feature set of this model, without running it.

        Raises:
            OtherModel: the set comes from other weights.
            MissingInput, ShapeMismatch, NotFinite, EmptyInput: see ``Scorer.score``.
        """
        require_weights(self.model, self.weights, feats, "this set")
        scores = self.scorer.score(feats).numpy()
        label, probability = predictions_of(feats)
        return Prediction(
            label=label,
            probability=probability,
            score=scores,
            p_value=self.calibration.p_values(scores, label),
            is_ood=self.calibration.rejects(scores, label),
            class_name=None if self.classes is None else np.array(self.classes)[label],
        )

    def __call__(self, batch: Any) -> Any:
        """The predictions for a batch of columns, for functions that map over batches.

        A dict (Ray Data) comes back with the columns added, a pandas frame (Spark's mapInPandas, Ray Data) too. Other
        mappings, such as the lazy batches of ``datasets.map(det, batched=True)``, and arrays (Spark's
        ``predict_batch_udf``) give a dict of the new columns alone. They are called as in ``Prediction``, but for
        ``predicted_label``: many data sets have the truth under ``label``.

        Images are looked for under ``ood_scores.extraction.loaders.IMAGE_KEYS``: ``pixel_values``, ``image``, …

        Raises:
            BadInput: no such key; and whatever ``predict`` raises.
        """
        is_frame = hasattr(batch, "assign")
        named = isinstance(batch, Mapping) or is_frame
        columns: dict[str, Any] = self.predict(images_in(batch) if named else batch).columns()
        columns = {"predicted_label": columns.pop("label"), **columns}
        if is_frame:
            return batch.assign(**columns)
        return batch | columns if type(batch) is dict else columns

    def to(self, device: str | torch.device) -> Detector:
        """Moves the model, and returns the detector. ``"auto"`` as in ``ood_scores.extract``."""
        self.model.to(choose_device(self.model, device))
        return self

    def monitor(self, *, seed: int = 0) -> Monitor:
        """A fresh watch over a stream, to be fed ``prediction.score``: has it drifted from the calibration data?

        It watches the share of all images that a single threshold rejects, also where each class has its own.

        Raises:
            BadInput: there are too few calibration rows for any to be rejected.
        """
        from ood_scores.detector.monitor import Monitor

        calibration = self.calibration
        return Monitor.of(calibration.scores, calibration.keep, delta=calibration.delta, seed=seed)

    def export_onnx(self, path: str | os.PathLike[str], images: Any = None) -> None:
        """One ONNX file from images to ``logits``, ``score`` and ``is_ood``: see ``ood_scores.detector.export``.

        Args:
            path: of the file, replaced in one step.
            images: some, as ``predict`` takes them: what onnxruntime says of them is compared with what is said here.
                Noise where there are none, on which scores are less like those of real images.

        Raises:
            MissingInput: onnx, onnxscript or onnxruntime is not installed.
            BadInput: the model or the scorer cannot be exported, which the message says by name, or differs.
            CacheWriteFailed: the disk refused.
        """
        from ood_scores.detector.export import export_onnx

        graph, inputs = self._graph(images)
        facts = {
            "architecture": architecture(self.model),
            "weights_sha256": self.weights,
            "preprocessing": json.dumps(self.preprocessing),
        }
        export_onnx(graph, inputs, path, facts | ({"classes": json.dumps(self.classes)} if self.classes else {}))

    def export(self, images: Any = None) -> torch.export.ExportedProgram:
        """The same graph by ``torch.export``, for batches of any size; ``torch.export.save`` writes it.

        Raises:
            BadInput: the model or the scorer cannot be exported, which the message says by name.
        """
        from ood_scores.detector.export import export_program

        return export_program(*self._graph(images))

    def _graph(self, images: Any) -> tuple[DetectorGraph, torch.Tensor]:
        from ood_scores.detector.export import DetectorGraph, noise

        options = self.forward.options
        if options.amp is not None:
            raise BadInput(
                f"the detector runs in mixed precision ({options.amp}), as its calibration data were extracted; a "
                "graph does not: calibrate it on sets extracted without amp."
            )
        given = noise(self.preprocessing) if images is None else next(input_batches(images, self.transform))
        inputs = given.to(model_dtype(self.model))
        limits = torch.tensor([each.value for each in self.calibration.thresholds], dtype=torch.float64)
        threshold = limits if self.calibration.predicted is not None else limits[0]
        stored = getattr(torch, options.dtype)
        return DetectorGraph(self.model, self.scorer, threshold, inputs, head=options.head, stored=stored), inputs

    def save(
        self, path: str | os.PathLike[str], *, with_model: bool = True, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the detector into a folder, replacing a detector that is already there.

        ``detector.json``, ``scorer.safetensors``, ``calibration.safetensors`` and, for a timm model that ``load`` can
        make again, ``model.safetensors``. Nothing is pickled.

        Args:
            path: the folder, new, empty or of a detector.
            with_model: also the model, so that ``load`` needs none. One that timm does not make again as it is, which
                is tried, is left out with a warning.
            arguments: of ``timm.create_model``, where the model was made with some beyond ``num_classes``.

        Raises:
            ForeignFile: the folder holds something else.
            BadInput: the scorer is not registered, or holds something that cannot be stored.
            CacheWriteFailed: the disk refused; a detector that was there before is still there.
        """
        if arguments is not None:
            self.arguments = _as_json(arguments)
        save_parts(self, path, with_model)

    @staticmethod
    def load(
        path: str | os.PathLike[str], model: nn.Module | None = None, *, device: str | torch.device = "auto"
    ) -> Detector:
        """Opens what ``save`` wrote: a detector with the same predictions, bit for bit.

        Args:
            path: the folder.
            model: the classifier; None where the folder has it.
            device: as in ``calibrate``.

        Raises:
            FileNotFoundError: there is no such folder.
            ForeignFile: it is not a detector, or was written by a newer version of this package.
            DamagedCache: a file is missing, truncated or altered.
            BadInput: the folder has no model and none is given.
            OtherModel: the given model has other weights.
            UnknownName: its scorer or its timm model is not known here.
        """
        found = load_parts(path, model)
        return Detector(**{each.name: getattr(found, each.name) for each in fields(found) if each.init}).to(device)

    def __repr__(self) -> str:
        return f"Detector({self.scorer.name} on {architecture(self.model)}: {self.calibration}; {self.passes})"


def _as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(arguments)))
    except TypeError as error:
        raise BadInput(
            f"arguments are what JSON can hold: {error}. Leave them out, and pass the model to load."
        ) from error


def require_weights(model: nn.Module, weights: str, feats: FeatureSet, name: str) -> None:
    if feats.provenance and feats.provenance.weights_sha256 != weights:
        raise OtherModel(
            f"{name} comes from {feats.provenance.architecture} with weights {feats.provenance.weights_sha256[:12]}…, "
            f"the model is {architecture(model)} with weights {weights[:12]}…: extract it again with this model."
        )
