"""Detector: a fitted scorer with a calibrated threshold and the model it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from ood_scores.detector.bundle import load_parts, save_parts
from ood_scores.detector.inputs import file_names, input_batches, inputs_of, warn_of_unreadable
from ood_scores.detector.parts import DetectorParts, require_weights
from ood_scores.detector.prediction import Prediction, scores_and_predictions
from ood_scores.detector.preprocessing import Preprocessing
from ood_scores.errors import BadInput, NotFinite
from ood_scores.extraction.loaders import NamedInputs, input_key
from ood_scores.extraction.options import ON_ERROR
from ood_scores.features import FeatureSet, OneSet
from ood_scores.models.running import architecture, choose_device, model_dtype
from ood_scores.notebook import facts_html
from ood_scores.runtime import default_torch_state
from ood_scores.scorers.base import Scorer

if TYPE_CHECKING:
    from ood_scores.detector.explanation import Explanations
    from ood_scores.detector.graph import DetectorGraph
    from ood_scores.detector.monitor import Monitor


@dataclass(eq=False)
class Detector(DetectorParts):
    """A classifier that flags images that are out of distribution; created by ``calibrate`` or ``load``.

    If several threads call detectors of one model, they wait for each other; copies in other processes (by pickle) are
    independent. The attributes are those of ``DetectorParts``.
    """

    @default_torch_state()
    def predict(self, images: Any, *, on_error: Literal["skip", "raise"] = "skip") -> Prediction:
        """Classify images and flag those that are out of distribution.

        Args:
            images: a batch in any of the forms that ``ood_scores.detector.inputs.input_batches`` lists: floating-point
                tensors ``[B, C, H, W]`` are inputs of the model; uint8 arrays and tensors, PIL images, paths, and bytes
                are images to which the model's preprocessing is applied. A model with several inputs takes a
                dictionary, whose other tensors are passed to the parameters of ``forward`` that have their names.
            on_error: ``"skip"`` to go on if images of a list cannot be decoded, with a warning: their rows have
                NaN scores, and ``Prediction.errors`` lists them. ``"raise"`` stops at the first one, as a missing file
                and a fault of the file system always do.

        Returns:
            The predictions, one row for each image, in the same order.

        Raises:
            EmptyInput: if there is no image, or none that can be read.
            UnreadableImage: if an image cannot be decoded, with ``on_error="raise"`` or if it is the only one.
            MissingData, FileSystemFault: if a file does not exist, or the operating system does not deliver it.
            BadInput, ShapeMismatch: if these are not images, or the model cannot take their shape.
            NotFinite: if an image, a feature, or a logit is NaN or infinite.
        """
        if on_error not in ON_ERROR:
            raise BadInput(f"on_error must be 'skip' or 'raise', got {on_error!r}.")
        errors: dict[int, str] = {}
        batches = self._batches(images, errors if on_error == "skip" else None)
        parts = [self._decide_on_batch(batch, start) for start, batch, _ in batches]
        found = (parts[0] if len(parts) == 1 else Prediction.joined(parts)).with_unreadable(errors)
        warn_of_unreadable(
            errors,
            len(found),
            "their scores are NaN, they are not accepted (is_ood is True), and errors has the reasons",
        )
        names = file_names(images)
        return found if names is None else replace(found, id=names)

    def _decide_on_batch(self, batch: Any, start: int) -> Prediction:
        """Return the predictions for a batch; the host waits once for the device, which checks what it scores."""
        feats = self.forward.feature_set(batch, start, checked=False)
        try:
            return self.decide(feats)
        except NotFinite:
            feats.check_finite(start)
            raise

    def _batches(self, images: Any, errors: dict[int, str] | None) -> Iterator[tuple[int, Any, torch.Tensor]]:
        """Yield the number of the first image of each batch, the batch for the model, and the inputs in it."""
        start, (given, key, further) = 0, inputs_of(images, self.model)
        for inputs in input_batches(given, self.transform, errors):
            left_out = list(errors or ())
            rows = np.delete(np.arange(start + len(inputs) + len(left_out)), left_out)[start:]
            others = {name: values[rows] for name, values in further.items()}
            yield start, inputs if key is None else NamedInputs({key: inputs, **others}, key, None), inputs
            start += len(inputs)

    @default_torch_state()
    def explain(
        self,
        images: Any,
        *,
        fit: OneSet | None = None,
        id: OneSet | None = None,
        scorers: Sequence[str | Scorer] = (),
        neighbors: int = 5,
        pictures: Any = None,
        most: int = 50,
    ) -> Explanations:
        """Explain why images are rejected: classes, p-values, similar training images, and where the score comes from.

        Images pass through the model once, as in ``predict``; those that are not rejected are left out.

        Args:
            images: a batch in any of the forms that ``predict`` accepts. Images of a list that cannot be decoded are
                left out.
            fit: a feature set of the training data, or the path of its cache, in which similar rows are found; None for
                no similar rows.
            id: a feature set of held-out ID data, or the path of its cache, among which ``scorers`` have p-values.
            scorers: other scorers whose p-values are computed, as names or Scorers. They are fitted on ``fit``.
            neighbors: the number of similar rows.
            pictures: where the pictures of ``fit`` are, as in ``ood_scores.evaluation.pictures.pictures_of``; None for
                the dataset that the set records, if this process has opened it.
            most: the most images to explain, those with the lowest scores.

        Raises:
            OtherModel: if a set was extracted with other weights.
            BadInput: if ``scorers`` lack the set that they need, or a number is below 1.
            MissingInput: if a set lacks what a scorer reads. Other errors are those of ``predict``.
        """
        from ood_scores.detector.explanation import explain

        errors: dict[int, str] = {}
        found = explain(
            self,
            self._batches(images, errors),
            file_names(images),
            errors,
            fit=fit,
            id=id,
            scorers=scorers,
            neighbors=neighbors,
            pictures=pictures,
            most=most,
        )
        warn_of_unreadable(errors, found.images + len(errors), "they are left out")
        return found

    @default_torch_state()
    def decide(self, feats: FeatureSet) -> Prediction:
        """Return the same as ``predict`` for a feature set of this model, without running the model.

        Raises:
            OtherModel: if the set was extracted with other weights.
            MissingInput, ShapeMismatch, NotFinite, EmptyInput: see ``Scorer.score``.
        """
        require_weights(self.model, self.weights, feats, "this set")
        self.scorer.check_ready(feats)
        rule, sets = self.label_sets, list[tuple[str | int, ...]]()
        read_logits = None if rule is None else lambda logits: sets.extend(rule.labels(logits, self.classes))
        (scores,), label, probability = scores_and_predictions([self.scorer], feats, read_logits)
        return Prediction(
            label=label,
            probability=probability,
            score=scores,
            p_value=self.calibration.p_values(scores, label),
            is_ood=self.calibration.rejects(scores, label),
            class_name=None if self.classes is None or label is None else np.array(self.classes)[label],
            label_set=np.fromiter(sets, dtype=object) if rule else None,
            id=feats.ids,
        )

    def __call__(self, batch: Any) -> Any:
        """Predict a batch of columns, for functions that map over batches.

        For a dict (Ray Data) or a pandas frame (Spark's mapInPandas, Ray Data), the columns are added to the batch. For
        other mappings, such as the lazy batches of ``datasets.map(det, batched=True)``, and for arrays (Spark's
        ``predict_batch_udf``), a dict of the new columns is returned. The columns have the names of the attributes of
        ``Prediction``, except for ``predicted_label``: many datasets store the true label under ``label``.

        The images must be under one of ``ood_scores.extraction.loaders.INPUT_KEYS``: ``pixel_values``, ``image``, …

        Raises:
            BadInput: if there is no such key. Other errors are those of ``predict``.
        """
        is_frame = hasattr(batch, "assign")
        images = batch[input_key(batch)] if is_frame else batch
        columns: dict[str, Any] = self.predict(images, on_error="raise").columns()
        columns.pop("id", None)  # the batch itself has the files
        if "label" in columns:
            columns = {"predicted_label": columns.pop("label"), **columns}
        if is_frame:
            return batch.assign(**columns)
        return batch | columns if type(batch) is dict else columns

    @default_torch_state()
    def to(self, device: str | torch.device) -> Detector:
        """Move the model, and return the detector. ``"auto"`` has the same meaning as in ``ood_scores.extract``.

        With ``"auto"``, a model that is on a GPU, or on several, stays where it is.
        """
        found = choose_device(self.model, device)
        if device != "auto" or found != self.device:
            self.model.to(found)
        return self

    def monitor(self, *, seed: int = 0) -> Monitor:
        """Create a monitor that detects whether a stream of ``prediction.score`` drifts from the calibration data.

        It monitors the share of all images that a single threshold rejects, even if each class has its own threshold.

        Raises:
            BadInput: if there are too few calibration rows for any row to be rejected.
        """
        from ood_scores.detector.monitor import Monitor

        calibration = self.calibration
        return Monitor.of(calibration.scores, calibration.keep, delta=calibration.delta, seed=seed)

    @default_torch_state()
    def export_onnx(self, path: str | os.PathLike[str], images: Any = None) -> None:
        """Write an ONNX file that maps images to ``logits``, ``score``, and ``is_ood``.

        See ``ood_scores.detector.export``.

        Args:
            path: the file, which is replaced atomically.
            images: images in any form that ``predict`` accepts, for which the outputs of onnxruntime and of this
                detector are compared. By default noise, whose scores are less similar to those of real images.

        Raises:
            MissingInput: if onnx, onnxscript, or onnxruntime is not installed.
            BadInput: if the model or the scorer, named in the message, cannot be exported, or the outputs differ.
            CacheWriteFailed: if the file cannot be written.
        """
        from ood_scores.detector.export import export_onnx

        graph, inputs = self._graph(images)
        facts = {
            "architecture": architecture(self.model),
            "weights_sha256": self.weights,
            "preprocessing": json.dumps(self.stored_preprocessing),
        }
        export_onnx(graph, inputs, path, facts | ({"classes": json.dumps(self.classes)} if self.classes else {}))

    @default_torch_state()
    def export(self, images: Any = None) -> torch.export.ExportedProgram:
        """Return the same graph from ``torch.export``, for batches of any size; ``torch.export.save`` writes it.

        Raises:
            BadInput: if the model or the scorer, named in the message, cannot be exported.
        """
        from ood_scores.detector.export import export_program

        return export_program(*self._graph(images))

    def _graph(self, images: Any) -> tuple[DetectorGraph, torch.Tensor]:
        from ood_scores.detector.export import noise
        from ood_scores.detector.graph import DetectorGraph

        options = self.forward.options
        if options.amp is not None:
            raise BadInput(
                f"a graph cannot run in mixed precision ({options.amp}), as the calibration data were extracted: "
                "calibrate on sets extracted without amp."
            )
        given, _, further = inputs_of(noise(self.transform) if images is None else images, self.model)
        if further:
            raise BadInput(
                f"a graph has one input, but the batch also has {', '.join(further)}: calibrate a module whose forward "
                "computes everything from its first input."
            )
        inputs = next(input_batches(given, self.transform))
        if inputs.is_floating_point():
            inputs = inputs.to(model_dtype(self.model))
        limits = torch.tensor([each.value for each in self.calibration.thresholds], dtype=torch.float64)
        threshold = limits if self.calibration.predicted is not None else limits[0]
        if options.pool is not None:
            raise BadInput("a graph has the logits of a classifier, not a pooling: export a model that pools itself.")
        stored = getattr(torch, options.dtype)
        return DetectorGraph(self.model, self.scorer, threshold, inputs, head=options.head, stored=stored), inputs

    def save(
        self, path: str | os.PathLike[str], *, with_model: bool = True, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """Write the detector to a folder, replacing a detector that is already there.

        The files are ``detector.json``, ``scorer.safetensors``, ``calibration.safetensors``, and, for a model that
        ``load`` can create again (of timm, transformers, or ``load_model``), ``model.safetensors``. Nothing is pickled.

        Args:
            path: the folder, which must be new, empty, or contain a detector.
            with_model: whether to save the model, so that ``load`` does not need it. A model that cannot be created
                again exactly is left out with a warning. So is a preprocessing that is a function.
            arguments: the arguments of ``timm.create_model`` with which the model was created, beyond ``num_classes``.

        Raises:
            ForeignFile: if the folder contains other files.
            CacheBusy: if another process is saving a detector to the folder.
            BadInput: if the scorer is not registered, or contains something that cannot be stored.
            CacheWriteFailed: if the files cannot be written; a previous detector is then still there.
        """
        if arguments is not None:
            self.arguments = _as_json(arguments)
        save_parts(self, path, with_model)

    @staticmethod
    @default_torch_state()
    def load(
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        device: str | torch.device = "auto",
    ) -> Detector:
        """Load a detector that ``save`` wrote; its predictions are the same, bit for bit.

        Args:
            path: the folder.
            model: the classifier; None to use the one in the folder.
            preprocessing: the preprocessing with which the detector was calibrated, in any form that ``calibrate``
                accepts; None to use the one in the folder. A detector without one only accepts tensors.
            device: the device to run on, with the same meaning as in ``calibrate``.

        Raises:
            FileNotFoundError: if there is no such folder.
            ForeignFile: if it is not a detector, or was written by a newer version of this package.
            DamagedCache: if a file is missing, truncated, or altered.
            BadInput: if the folder contains no model and none is passed, or if the preprocessing returns another input
                for an image of noise than the one with which the detector was calibrated.
            MissingInput: if the preprocessing is an image processor, and transformers is not installed.
            OtherModel: if the model that is passed has other weights.
            UnknownName: if the scorer or the timm model is not known.
        """
        found = load_parts(path, model, preprocessing)
        return Detector(**{each.name: getattr(found, each.name) for each in fields(found) if each.init}).to(device)

    def push_to_hub(self, repository: str, *, private: bool | None = None) -> str:
        """Upload the detector to the Hugging Face hub, with a card that describes it; return the commit's address.

        Args:
            repository: ``OWNER/NAME``, which is created if there is no such repository. A detector that is there is
                replaced in one commit; its revision keeps it.
            private: whether a new repository is private; None for the owner's default.

        Raises:
            BadInput: if the repository cannot be written to.
            ForeignFile: if it has other files than a detector. Other errors are those of ``save``.
        """
        from ood_scores.detector.hub import push

        return push(self, self._facts(), repository, private)

    @staticmethod
    def from_pretrained(
        repository: str,
        model: nn.Module | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        device: str | torch.device = "auto",
    ) -> Detector:
        """Load a detector from the Hugging Face hub. Nothing in it is executed or unpickled.

        Args:
            repository: ``OWNER/NAME``, or ``OWNER/NAME@REVISION`` for the state at a tag, a branch, or a commit.
            model, preprocessing, device: as for ``load``.

        Raises:
            UnknownName: if there is no such repository.
            CheckpointError: if it is neither cached nor can be fetched. Other errors are those of ``load``.
        """
        from ood_scores.detector.hub import fetched

        return Detector.load(fetched(repository), model, preprocessing=preprocessing, device=device)

    def _repr_html_(self) -> str:
        return facts_html("Detector", self._facts())

    def _facts(self) -> dict[str, object]:
        """What a reader wants to know, by name; None for what there is not."""
        calibration = self.calibration
        limits = sorted({each.value for each in calibration.thresholds})
        return {
            "model": architecture(self.model),
            "scorer": self.scorer.name,
            "threshold": f"{limits[0]:.6g}" + (f" … {limits[-1]:.6g}, by predicted class" if len(limits) > 1 else ""),
            "guarantee": calibration.guarantee,
            "calibrated on": f"{len(calibration.scores):,} rows" + (f" of {self.data.dataset}" if self.data else ""),
            "sets of labels": self.label_sets.guarantee if self.label_sets else None,
            "passes": self.passes,
        }

    def __repr__(self) -> str:
        return f"Detector({self.scorer.name} on {architecture(self.model)}: {self.calibration}; {self.passes})"


def _as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(json.dumps(dict(arguments)))
    except TypeError as error:
        raise BadInput(
            f"arguments cannot be stored as JSON ({error}): leave them out, and pass the model to load."
        ) from error
    return stored
