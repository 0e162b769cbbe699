"""Detector: a fitted scorer with a calibrated threshold and the model it belongs to."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ood_scores.detector.calibration import Calibration
from ood_scores.detector.inputs import Transform, data_config, images_in, input_batches
from ood_scores.detector.prediction import Prediction, predictions_of
from ood_scores.detector.runner import Runner, cost, extra_stems, model_dtype
from ood_scores.errors import BadInput, NotFitted, OtherModel
from ood_scores.extraction import extract
from ood_scores.features import FeatureSet, Provenance
from ood_scores.models.opening import preprocessing as transform_of
from ood_scores.models.running import architecture, choose_device, model_device, weights_sha256
from ood_scores.scorers.base import Scorer, as_scorer

if TYPE_CHECKING:
    from ood_scores.detector.export import DetectorGraph
    from ood_scores.detector.monitor import Monitor

Data = FeatureSet | Iterable[Any]


@dataclass(eq=False)
class Detector:
    """A classifier that says of every image whether it is out of distribution; made by ``calibrate`` or ``load``.

    Calls of detectors of one model from several threads take turns at it; copies in other processes (by pickle) are
    independent.

    Attributes:
        model: the classifier. Its weights must stay those that it was calibrated with.
        scorer: fitted.
        calibration: the scores of held-out ID data, and the threshold that follows from them.
        runner: how the model is run.
        weights: SHA-256 of the model's weights.
        preprocessing: from an image to what the model takes, as timm's data configuration; None if it is not known.
        classes: the names of the classes, or None.
        data: where the calibration data came from, or None.
        arguments: of ``timm.create_model`` beyond ``num_classes``, as far as ``save`` was told.
        transform: the preprocessing, from a PIL image to ``[C, H, W]``, or None.
    """

    model: nn.Module
    scorer: Scorer
    calibration: Calibration
    runner: Runner
    weights: str
    preprocessing: Mapping[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    data: Provenance | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    transform: Transform | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.preprocessing is not None:
            self.transform = transform_of(self.model, **self.preprocessing)
        self._names = None if self.classes is None else np.array(self.classes)

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
            parts.append(self.decide(self.runner(inputs, sum(map(len, parts)))))
        return parts[0] if len(parts) == 1 else Prediction.joined(parts)

    def decide(self, feats: FeatureSet) -> Prediction:
        """The same for a feature set of this model, without running it.

        Raises:
            OtherModel: the set comes from other weights.
            MissingInput, ShapeMismatch, NotFinite, EmptyInput: see ``Scorer.score``.
        """
        _require_weights(self.model, self.weights, feats, "this set")
        scores = self.scorer.score(feats).numpy()
        label, probability = predictions_of(feats)
        return Prediction(
            label=label,
            probability=probability,
            score=scores,
            p_value=self.calibration.p_values(scores, label),
            is_ood=self.calibration.rejects(scores, label),
            class_name=None if self._names is None else self._names[label],
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

    @property
    def passes(self) -> str:
        """How often a batch goes through the model: ``one forward pass``, and what the scorer's probes add to it."""
        return cost(self.runner.probes)

    @property
    def device(self) -> torch.device:
        """Where the model is, and runs. Scores are computed on the CPU."""
        return model_device(self.model)

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

        if self.runner.amp is not None:
            raise BadInput(
                f"the detector runs in mixed precision ({self.runner.amp}), as its calibration data were extracted; a "
                "graph does not: calibrate it on sets extracted without amp."
            )
        given = noise(self.preprocessing) if images is None else next(input_batches(images, self.transform))
        inputs = given.to(model_dtype(self.model))
        limits = torch.tensor([each.value for each in self.calibration.thresholds], dtype=torch.float64)
        threshold = limits if self.calibration.predicted is not None else limits[0]
        stored = getattr(torch, self.runner.dtype)
        return DetectorGraph(self.model, self.scorer, threshold, inputs, head=self.runner.head, stored=stored), inputs

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
        from ood_scores.detector.bundle import save_detector

        if arguments is not None:
            self.arguments = _as_json(arguments)
        save_detector(self, path, with_model)

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
        from ood_scores.detector.bundle import load_detector

        return load_detector(path, model).to(device)

    def __repr__(self) -> str:
        return f"Detector({self.scorer.name} on {architecture(self.model)}: {self.calibration}; {self.passes})"


def calibrate(
    scorer: str | Scorer,
    model: nn.Module,
    *,
    fit: Data | None = None,
    id: Data,
    keep: float = 0.95,
    delta: float | None = None,
    per_class: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device = "auto",
) -> Detector:
    """A detector whose threshold keeps the asked share of in-distribution images.

    The threshold is that of split conformal prediction: for images exchangeable with those of ``id`` it keeps a share
    of at least ``keep`` in expectation, whatever the model and the scorer; with ``delta``, at least ``keep`` with
    probability 1 - delta over the choice of ``id``. See ``ood_scores.detector.conformal``.

    Args:
        scorer: a registered name, or a Scorer, which is copied. One that is fitted already needs no ``fit``.
        model: the classifier. It is moved to ``device`` and stays there.
        fit: ID data that a fitted scorer is fitted on, usually the training set: a feature set, or a loader, which is
            run through the model.
        id: held-out ID data for the threshold, likewise: neither ``fit`` nor what the model was trained on. A feature
            set that does not say from which weights it comes is taken to be of this model.
        keep: the share of ID images to keep, in (0, 1).
        delta: the share of calibration sets that may give less than that; None for the guarantee in expectation.
        per_class: a threshold, and p-values, for each predicted class, so that the share is kept in each.
        preprocessing: entries of timm's data configuration in place of the model's own (``input_size``, ``mean``,
            ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``). A model that is not timm's has none: without them
            its detector takes tensors only.
        classes: names of the classes, in the order of the logits.
        device: where the detector runs; ``"auto"`` takes a GPU if there is one, else the model's own device.

    Raises:
        OtherModel: a set, or the fit of the scorer, comes from other weights than the model's.
        NotFitted: the scorer is to be fitted, and there is no ``fit``.
        MissingInput: the sets lack what the scorer reads.
        BadInput: the scorer reads what no single model gives; a share out of range; as many names as there are not
            classes.
        EmptyInput, NotFinite, HeadNotFound: as ``extract`` and ``Scorer.score``.
    """
    ready = copy.deepcopy(as_scorer(scorer))
    extra_stems(ready.needs)
    if not ready.is_fitted and fit is None:
        raise NotFitted(f"{ready.name!r} is fitted on in-distribution data: pass fit=, a feature set or a loader.")
    weights = weights_sha256(model)
    if fit is not None and ready.fit_needs:
        fit_set = _as_set(fit, model, weights, (*ready.fit_needs, *ready.needs), device, "fit")
        ready.fit(fit_set)
        fit_rows = len(fit_set)
    else:
        fit_rows = 1
    id_set = _as_set(id, model, weights, ready.needs, device, "id")
    _warn_of_same_data(ready, fit is id, fit_rows, id_set)
    scores = ready.score(id_set).numpy()
    label, _ = predictions_of(id_set)
    num_classes = id_set.num_classes or 0
    if classes is not None and len(classes) != num_classes:
        raise BadInput(f"the model has {num_classes} classes, and there are names for {len(classes)}.")
    detector = Detector(
        model=model,
        scorer=ready,
        calibration=Calibration.of(scores, label, num_classes, keep, delta, per_class),
        runner=Runner.like(model, id_set, ready.needs),
        weights=weights,
        preprocessing=data_config(model, preprocessing),
        classes=None if classes is None else tuple(classes),
        data=id_set.provenance,
    )
    _warn_of_other_preprocessing(detector)
    return detector.to(device)


def _as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(arguments)))
    except TypeError as error:
        raise BadInput(
            f"arguments are what JSON can hold: {error}. Leave them out, and pass the model to load."
        ) from error


def _as_set(
    data: Data, model: nn.Module, weights: str, needs: Iterable[str], device: str | torch.device, name: str
) -> FeatureSet:
    """A feature set as it is, if it comes from the model; a loader run through it."""
    if isinstance(data, FeatureSet):
        _require_weights(model, weights, data, name)
        return data
    return extract(model, data, device=device, probes=extra_stems(needs))


def _require_weights(model: nn.Module, weights: str, feats: FeatureSet, name: str) -> None:
    if feats.provenance and feats.provenance.weights_sha256 != weights:
        raise OtherModel(
            f"{name} comes from {feats.provenance.architecture} with weights {feats.provenance.weights_sha256[:12]}…, "
            f"the model is {architecture(model)} with weights {weights[:12]}…: extract it again with this model."
        )


def _warn_of_same_data(scorer: Scorer, same: bool, fit_rows: int, id_set: FeatureSet) -> None:
    """Warns where rows of the calibration set must have been among those that the scorer was fitted on."""
    fitted, found = scorer.fitted_on, id_set.provenance
    if fitted and found and fitted.data_sha256 == found.data_sha256:
        rows = found.dataset_rows or max(fit_rows, len(id_set))
        same = same or fit_rows + len(id_set) > rows
    if same and scorer.fit_needs:
        warnings.warn(
            f"the threshold is calibrated on rows that {scorer.name!r} was fitted on. New images have other scores, so "
            "that it keeps another share of them: pass held-out data as id=.",
            stacklevel=3,
        )


def _warn_of_other_preprocessing(detector: Detector) -> None:
    """Warns where images would not be treated as those of the calibration set were, as far as that is known."""
    known = detector.data.preprocessing if detector.data else ""
    own = " ".join(repr(detector.transform).split())
    if known and detector.transform is not None and known != own:
        warnings.warn(
            f"the calibration images went through {known}, and images given to predict will go through {own}. Unless "
            "both do the same, the threshold does not hold: pass preprocessing={...}, or tensors.",
            stacklevel=3,
        )
