"""Detectors on disk: a folder of safetensors and JSON. Nothing is pickled, so that loading one runs no code from it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from ood_scores.atomic import replacing, user_path
from ood_scores.detector.calibration import Calibration
from ood_scores.detector.conformal import Threshold
from ood_scores.detector.folder import DESCRIPTION, NewFiles, read_description, replacing_detector, verified_files
from ood_scores.detector.inputs import input_batches
from ood_scores.detector.label_sets import LabelSets
from ood_scores.detector.parts import DetectorParts
from ood_scores.detector.preprocessing import Preprocessing, Transform, example_input, preprocessing_of
from ood_scores.errors import BadInput, DamagedCache, OodScoresError, OtherModel
from ood_scores.extraction.encoders import pool_text
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.probes.base import class_of, probe_of, record_of
from ood_scores.features import Head, Provenance
from ood_scores.features.migration import migrated
from ood_scores.features.provenance import ProbeRecord
from ood_scores.models.opening import load_stored_model, require_known
from ood_scores.models.origin import network_of, origin_of
from ood_scores.models.running import architecture, model_device, unwrapped, weights_sha256
from ood_scores.runtime import versions_of
from ood_scores.scorers.storage import load_scorer
from ood_scores.user_code import code_to_import, not_imported
from ood_scores.user_warnings import warn_user

PACKAGES = ("ood_scores", "torch", "timm", "numpy")

NEGATIVE = "negatives."
"""The start of the names of the negatives of a given head."""

EXAMPLE_VALUES = 50
"""Number of values, about, that are stored of an input for an image of noise."""

CLOSE = 0.02
"""How much these values may differ between versions of libraries, relative to the largest."""


def save_parts(detector: DetectorParts, path: str | os.PathLike[str], with_model: bool) -> None:
    """Write a detector to a folder, replacing the detector in it in one step; see ``Detector.save``."""
    if weights_sha256(detector.model) != detector.weights:
        raise OtherModel("the model's weights have changed since the calibration: calibrate again.")
    with replacing_detector(user_path(path)) as new:
        detector.scorer.save(new.place("scorer"))
        _write_calibration(detector.calibration, detector.label_sets, new.place("calibration"))
        _write_head(detector.forward.options.head, new)
        if with_model:
            _write_model(detector, new.place("model"))
        new.describe(_describe(detector))
    transform, own = detector.transform, _own_transform(detector.model)
    if transform is not None and transform is not own and detector.stored_preprocessing is None:
        warn_user(
            f"the preprocessing is a function, {detector.transform_text}, which is not saved with the detector: pass "
            "it to Detector.load(path, preprocessing=...), or calibrate with an image processor, weights.transforms(), "
            "or a dictionary.",
        )


def load_parts(
    path: str | os.PathLike[str], model: nn.Module | None = None, preprocessing: Preprocessing | None = None
) -> DetectorParts:
    """Load a detector that ``save_parts`` wrote; see ``Detector.load``."""
    folder = user_path(path)
    with _damage_named(folder):
        described = read_description(folder)
        files = verified_files(folder, described)
        _require_code(described, model is None)
        if model is None:
            model = _model_in(folder, files.get("model"), described["model"])
        else:
            model = unwrapped(model)
            _require_weights(model, described["model"], folder)
        stored = described["preprocessing"]
        if stored is None and described.get("example") and preprocessing is None:
            preprocessing = _own_transform(model)
        parts = DetectorParts(
            forward=Forward(model, _read_options(described["run"], files.get("head"))),
            scorer=load_scorer(files["scorer"]),
            calibration=_read_calibration(files["calibration"], described["keep"], described["delta"]),
            weights=described["model"]["weights_sha256"],
            preprocessing=stored if preprocessing is None else preprocessing_of(model, preprocessing),
            classes=None if described["classes"] is None else tuple(described["classes"]),
            data=Provenance.from_attributes(described["data"] or {}),
            arguments=described["model"]["arguments"],
            label_sets=_read_label_sets(files["calibration"], described.get("sets")),
        )
        _require_example(parts, described.get("example"), folder)
        return parts


def _require_code(described: Mapping[str, Any], with_model: bool) -> None:
    """Raise one error for all code of the user that the scorer, the model, and the probes need."""
    network = described["model"].get("network") if with_model else None
    if missing := not_imported(filter(None, (described["scorer"], network))):
        records = [ProbeRecord(**record) for record in migrated(described["run"])["probes"]]
        kinds = ", ".join(record.kind for record in records if class_of(record) is None)
        raise BadInput(f"{code_to_import(missing)}{f' Import what defines its probe {kinds}, too.' if kinds else ''}")


def _own_transform(model: nn.Module) -> Transform | None:
    """Return the transform that comes with a model of the user's own code."""
    origin = origin_of(model)
    return origin.transform if origin else None


def _describe(detector: DetectorParts) -> dict[str, Any]:
    """Describe everything but tensors as JSON; some entries are only information for the reader."""
    calibration = detector.calibration
    return {
        "scorer": detector.scorer.name,
        "keep": calibration.keep,
        "delta": calibration.delta,
        "per_class": calibration.predicted is not None,
        "threshold": None if calibration.predicted is not None else str(calibration.thresholds[0].value),
        "rows": len(calibration.scores),
        "sets": None if detector.label_sets is None else detector.label_sets.described,
        "passes": detector.passes,
        "classes": detector.classes,
        "model": {
            "architecture": architecture(detector.model),
            "weights_sha256": detector.weights,
            "network": _network_of(detector)[0],
            "arguments": dict(detector.arguments),
            "channels_last": _is_channels_last(detector.model),
        },
        "run": _describe_options(detector.forward.options),
        "preprocessing": detector.stored_preprocessing,
        "example": None if detector.transform is None else _example(detector.transform),
        "data": detector.data.to_attributes() if detector.data else None,
        "versions": versions_of(PACKAGES),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _example(transform: Transform) -> dict[str, Any]:
    """Return the shape, and some values, of the input that a transform returns for an image of noise."""
    found = example_input(transform)
    values = found.double().flatten()
    return {"shape": list(found.shape), "values": values[:: max(1, len(values) // EXAMPLE_VALUES)].tolist()}


def _require_example(parts: DetectorParts, expected: Mapping[str, Any] | None, folder: Path) -> None:
    """Check that the transform returns the same input for an image of noise as when the detector was saved."""
    if parts.transform is None or expected is None:
        return
    found = _example(parts.transform)
    if found["shape"] != expected["shape"]:
        difference = f"shape {found['shape']} instead of {expected['shape']}"
    elif np.allclose(found["values"], expected["values"], rtol=0, atol=CLOSE * np.abs(expected["values"]).max()):
        return
    else:
        difference = f"values differ by up to {np.abs(np.subtract(found['values'], expected['values'])).max():.3g}"
    raise BadInput(
        f"the preprocessing returns another input for an image of noise than when {folder} was saved ({difference}): "
        "pass the preprocessing with which it was calibrated as Detector.load(path, preprocessing=...)."
    )


def _describe_options(options: ExtractionOptions) -> dict[str, Any]:
    """Return the fields of the options as JSON."""
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    head = options.head.digest if isinstance(options.head, Head) else options.head
    probes = [asdict(record_of(probe)) for probe in options.all_probes]
    return values | {"head": head, "layers": None, "pool": pool_text(options.pool), "probes": probes}


def _read_options(described: Mapping[str, Any], head: Path | None) -> ExtractionOptions:
    """Return the options that ``_describe_options``, or an earlier version, described."""
    known = migrated(described) | ({"head": _read_head(head)} if head else {})
    return ExtractionOptions(**known | {"probes": [probe_of(ProbeRecord(**record)) for record in known["probes"]]})


def _write_head(head: Any, new: NewFiles) -> None:
    """Write a head that was given to the extraction, not found in the model."""
    if isinstance(head, Head):
        with replacing(new.place("head")) as content:
            words = {f"{NEGATIVE}{kind}": values for kind, values in head.negatives.items()}
            tensors = {"weight": head.weight, "bias": head.bias, **words}
            content.write(safetensors.torch.save({name: values.cpu().contiguous() for name, values in tensors.items()}))


def _read_head(file: Path) -> Head:
    tensors = safetensors.torch.load_file(file)
    words = {name.removeprefix(NEGATIVE): values for name, values in tensors.items() if name not in ("weight", "bias")}
    return Head(tensors["weight"], tensors["bias"], words)


def _write_calibration(calibration: Calibration, label_sets: LabelSets | None, file: Path) -> None:
    tensors = {
        "scores": torch.from_numpy(calibration.scores),
        "thresholds": torch.tensor([each.value for each in calibration.thresholds], dtype=torch.float64),
        "ranks": torch.tensor([each.rank for each in calibration.thresholds]),
        "rows": torch.tensor([each.n for each in calibration.thresholds]),
    }
    if calibration.predicted is not None:
        tensors["predicted"] = torch.from_numpy(calibration.predicted)
    if label_sets is not None:
        tensors["set_limits"] = torch.from_numpy(label_sets.limits)
    with replacing(file) as content:
        content.write(safetensors.torch.save(tensors))


def _read_label_sets(file: Path, described: Mapping[str, Any] | None) -> LabelSets | None:
    """Return the rule for sets of labels; None for a detector without one, or of an earlier version."""
    if described is None:
        return None
    limits = safetensors.torch.load_file(file)["set_limits"].numpy()
    if np.isnan(limits).any():
        raise DamagedCache(f"{file} contains NaN: save the detector again.")
    return LabelSets(limits=limits, **described)


def _read_calibration(file: Path, keep: float, delta: float | None) -> Calibration:
    stored = {name: values.numpy() for name, values in safetensors.torch.load_file(file).items()}
    if any(np.isnan(stored[name]).any() for name in ("scores", "thresholds")):
        raise DamagedCache(f"{file} contains NaN: save the detector again.")
    columns = (stored[name].tolist() for name in ("thresholds", "rows", "ranks"))
    thresholds = tuple(Threshold(value, keep, rows, rank, delta) for value, rows, rank in zip(*columns, strict=True))
    return Calibration(stored["scores"], thresholds, stored.get("predicted"))


def _write_model(detector: DetectorParts, file: Path) -> None:
    """Write the weights as a checkpoint of ``ood_scores.training``, if ``load_model`` restores the model from it."""
    model = detector.model
    name, arguments = _network_of(detector)
    if network_of(model)[0] is None and not (hasattr(model, "pretrained_cfg") and timm.is_model(name)):
        warn_user(
            f"the {name} is not saved with the detector, because only models of timm and transformers, and those of "
            "load_model, can be created again: pass the model to Detector.load(path, model); save(..., "
            "with_model=False) leaves it out without this warning.",
        )
        return
    if detector.arguments:
        require_known(name, arguments)
    facts = {"architecture": json.dumps(name), "arguments": json.dumps(arguments)}
    state = {key: values.detach().cpu().contiguous().clone() for key, values in model.state_dict().items()}
    with replacing(file) as content:
        content.write(safetensors.torch.save(state, facts))
    reason = _difference(detector, file)
    if reason:
        file.unlink()
        warn_user(
            f"the model is not saved with the detector, because {reason}: if it was created with arguments of "
            "timm.create_model, pass save(..., arguments={...}); else pass the model to Detector.load(path, model).",
        )


def _network_of(detector: DetectorParts) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments that create the detector's network again."""
    network, arguments = network_of(detector.model)
    return network or architecture(detector.model), {**arguments, **detector.arguments}


def _difference(detector: DetectorParts, file: Path) -> str:
    """Return how the saved model differs from the detector's; "" if it does not."""
    model = detector.model
    try:
        again = _load_network(file, _network_of(detector)[0], _is_channels_last(model)).to(model_device(model))
    except OodScoresError as error:
        return str(error).rstrip(".")
    if weights_sha256(again) != detector.weights:
        return f"{architecture(model)} is created with other weights or buffers from its checkpoint"
    if _attention(again) != _attention(model):
        return f"{architecture(model)} is created with the attention {_attention(again)}, not {_attention(model)}"
    if detector.transform and not torch.equal(_outputs(detector, model), _outputs(detector, again)):
        return f"{architecture(model)} is created with other logits"
    return ""


def _attention(model: nn.Module) -> str | None:
    """Return how a model of transformers computes its attention, which its configuration does not store."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _outputs(detector: DetectorParts, model: nn.Module) -> Tensor:
    """Return the logits, or the features of an encoder, of two images of noise, from the model or from a copy."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    (inputs,) = input_batches(noise, detector.transform)
    options = replace(detector.forward.options, compile=False, dtype="float64", probes=())
    feats = Forward(model, options).feature_set(inputs)
    return feats.features if feats.logits is None else feats.logits


def _load_network(file: Path, name: str, channels_last: bool) -> nn.Module:
    model = load_stored_model(name, file)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _is_channels_last(model: nn.Module) -> bool:
    """Whether weights are in the channels-last memory format, which changes the order, and so the rounding, of sums."""
    weights = [values for values in model.parameters() if values.ndim == 4 and not values.is_contiguous()]
    return any(values.is_contiguous(memory_format=torch.channels_last) for values in weights)


def _model_in(folder: Path, file: Path | None, described: Mapping[str, Any]) -> nn.Module:
    if file is None:
        raise BadInput(
            f"{folder} contains no model: pass the {described['architecture']} that it was calibrated with, "
            "Detector.load(path, model)."
        )
    name = described.get("network", described["architecture"])
    model = _load_network(file, name, described["channels_last"])
    if weights_sha256(model) != described["weights_sha256"]:
        raise DamagedCache(
            f"timm {timm.__version__} creates a different {described['architecture']} from {file} than the "
            "one that was saved: pass the model, Detector.load(path, model)."
        )
    return model


def _require_weights(model: nn.Module, described: Mapping[str, Any], folder: Path) -> None:
    found = weights_sha256(model)
    if found != described["weights_sha256"]:
        raise OtherModel(
            f"{folder} was calibrated with {described['architecture']} with weights "
            f"{described['weights_sha256'][:12]}…, but the model passed is {architecture(model)} with weights "
            f"{found[:12]}…: pass the same model, or calibrate again."
        )


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turn errors caused by a damaged description into DamagedCache."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCache(f"{folder / DESCRIPTION} is damaged ({error!r}): save the detector again.") from error
