"""calibrate: from a scorer, a model and in-distribution data to a detector."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ood_scores.detector.calibration import Calibration
from ood_scores.detector.detector import Detector, require_weights
from ood_scores.detector.inputs import data_config
from ood_scores.detector.prediction import predictions_of
from ood_scores.errors import BadInput, NotFitted
from ood_scores.extraction import extract
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.options import ExtractionOptions, takes_options
from ood_scores.features import FeatureSet
from ood_scores.models.running import uncompiled, weights_sha256
from ood_scores.scorers.base import Scorer, as_scorer
from ood_scores.scorers.requirements import probes_for

Data = FeatureSet | Iterable[Any]


@takes_options
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
    **options: Any,
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
        **options: how loaders are run through the model, as for ``extract``; the probes that the scorer reads are added
            where they are missing. The detector runs the model in the way that the ``id`` set was extracted.

    Raises:
        OtherModel: a set, or the fit of the scorer, comes from other weights than the model's.
        NotFitted: the scorer is to be fitted, and there is no ``fit``.
        MissingInput: the sets lack what the scorer reads.
        BadInput: the scorer reads what no single model gives; a share out of range; as many names as there are not
            classes.
        EmptyInput, NotFinite, HeadNotFound: as ``extract`` and ``Scorer.score``.
    """
    ready = copy.deepcopy(as_scorer(scorer))
    names = [probe.name for probe in probes_for(ready.needs)]
    if not ready.is_fitted and fit is None:
        raise NotFitted(f"{ready.name!r} is fitted on in-distribution data: pass fit=, a feature set or a loader.")
    model = uncompiled(model)
    weights = weights_sha256(model)

    def as_set(data: Data, name: str, needs: Iterable[str]) -> FeatureSet:
        """A feature set as it is, if it comes from the model; a loader run through it."""
        if isinstance(data, FeatureSet):
            require_weights(model, weights, data, name)
            return data
        given = ExtractionOptions(**options)
        known = [probe.name for probe in given.all_probes]
        missing = [probe for probe in probes_for(needs) if probe.name not in known]
        return extract(model, data, device=device, **options | {"probes": [*given.probes, *missing]})

    if options and isinstance(id, FeatureSet) and isinstance(fit, FeatureSet | None):
        raise BadInput(f"{', '.join(options)} decide how loaders are run, and there are only feature sets.")
    if fit is not None and ready.fit_needs:
        fit_set = as_set(fit, "fit", (*ready.fit_needs, *ready.needs))
        ready.fit(fit_set)
        fit_rows = len(fit_set)
    else:
        fit_rows = 1
    id_set = as_set(id, "id", ready.needs)
    _warn_of_same_data(ready, fit is id, fit_rows, id_set)
    scores = ready.score(id_set).numpy()
    label, _ = predictions_of(id_set)
    num_classes = id_set.num_classes or 0
    if classes is not None and len(classes) != num_classes:
        raise BadInput(f"the model has {num_classes} classes, and there are names for {len(classes)}.")
    detector = Detector(
        forward=Forward(model, _options_of(id_set, names)),
        scorer=ready,
        calibration=Calibration.of(scores, label, num_classes, keep, delta, per_class),
        weights=weights,
        preprocessing=data_config(model, preprocessing),
        classes=None if classes is None else tuple(classes),
        data=id_set.provenance,
    )
    _warn_of_other_preprocessing(detector)
    return detector.to(device)


def _options_of(feats: FeatureSet, probes: Sequence[str]) -> ExtractionOptions:
    """The options with which a set was extracted, with the named probes alone.

    Raises BadInput if the set does not describe one of these probes.
    """
    known = {record.parameters["name"] for record in feats.provenance.probes} if feats.provenance else set()
    for name in probes:
        if name not in known:
            raise BadInput(
                f"the set of ID data holds {name}, but not how it was computed: make it with ood_scores.extract(..., "
                f"probes=[{name!r}]) and leave its provenance with it."
            )
    return ExtractionOptions.of(feats.provenance, probes) if feats.provenance else ExtractionOptions()


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
