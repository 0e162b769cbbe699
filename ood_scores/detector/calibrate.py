"""``calibrate``: create a detector from a scorer, a model, and in-distribution data."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from ood_scores.data.class_names import ordered
from ood_scores.detector.calibration import Calibration
from ood_scores.detector.detector import Detector
from ood_scores.detector.image_check import check_preprocessing
from ood_scores.detector.label_sets import Among, Method, calibrate_sets_on, check_rule
from ood_scores.detector.parts import require_weights
from ood_scores.detector.prediction import predictions_of
from ood_scores.detector.preprocessing import Preprocessing, preprocessing_of
from ood_scores.errors import BadInput, NearChance, NotFitted, UnknownName
from ood_scores.extraction import extract
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.options import ExtractionOptions, options_from, takes_options
from ood_scores.features import FeatureSet, OneSet, as_feature_set
from ood_scores.features.accuracy import label_warnings
from ood_scores.features.statistics.row_hashes import shared_rows
from ood_scores.models.class_names import listed_class_names, own_class_names
from ood_scores.models.running import unwrapped, weights_sha256
from ood_scores.runtime import default_torch_state
from ood_scores.scorers.base import Scorer, as_scorer
from ood_scores.scorers.compatibility import other_preprocessing
from ood_scores.scorers.one_pass import fit_all
from ood_scores.scorers.requirements import probes_for
from ood_scores.user_warnings import warn_user

Data = OneSet | Iterable[Any]

OPTIONS = inspect.signature(ExtractionOptions).parameters


@takes_options
@default_torch_state()
def calibrate(
    scorer: str | Scorer,
    model: nn.Module,
    *,
    fit: Data | None = None,
    id: Data,
    keep: float = 0.95,
    delta: float | None = None,
    per_class: bool = False,
    sets: Method | None = None,
    alpha: float = 0.1,
    sets_among: Among = "all",
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | Mapping[Any, Any] | None = None,
    images: Any = None,
    device: str | torch.device = "auto",
    **options: Any,
) -> Detector:
    """Create a detector whose threshold keeps a requested share of in-distribution images.

    The threshold is that of split conformal prediction: for images exchangeable with those of ``id``, it keeps a share
    of at least ``keep`` in expectation, whatever the model and the scorer; with ``delta``, at least ``keep`` with
    probability 1 - delta over the choice of ``id``. See ``ood_scores.detector.conformal``.

    Args:
        scorer: a registered name, or a Scorer, which is copied. A scorer that is already fitted needs no ``fit``.
        model: the classifier. It is moved to ``device`` and stays there.
        fit: the ID data on which the scorer is fitted, usually the training set: a feature set or the path of its
            cache, or a loader, which is run through the model.
        id: held-out ID data for the threshold, given like ``fit``; neither ``fit`` nor the data that the model
            was trained on. A feature set without provenance is assumed to come from this model.
        keep: the share of ID images to keep, in (0, 1).
        delta: the share of calibration sets for which less may be kept; None for the guarantee in expectation.
        per_class: whether each predicted class has its own threshold and p-values, so that the share is kept in each.
        sets: how to make a set of labels for each image, ``"lac"``, ``"aps"``, ``"raps"`` or ``"saps"``; None for no
            sets. They are calibrated on the labels of ``id``; see ``ood_scores.detector.label_sets``.
        alpha: the share of ID images whose set may lack the label, in (0, 1). A share of at least ``keep - alpha`` of
            ID images is kept with a set that has the label.
        sets_among: the images for which that holds: ``"all"``, those of each ``"class"``, or of each ``"cluster"`` of
            classes.
        preprocessing: how an image becomes an input of the model: an image processor of Hugging Face's transformers;
            torchvision's ``weights.transforms()``; any other function from a PIL image to ``[C, H, W]``; or entries of
            timm's data configuration that replace the model's own (``input_size``, ``mean``, ``std``, ``crop_pct``,
            ``crop_mode``, ``interpolation``), all of which a model that is not from timm needs. Without this argument,
            the detector of such a model accepts only tensors.
        classes: the names of the classes, in the order of the logits; or a mapping from numbers to names
            (``id2label``) or from names to numbers (``class_to_idx``). By default those that come with the
            model, such as a Hugging Face model's ``id2label``, or else those that the dataset of the loader ``id``
            lists (``folder:PATH?classes=FILE``), if there are any.
        images: the images that ``id`` was extracted from, in order: a dataset, a loader, or a text such as
            ``folder:PATH``. Features of a few, computed through the preprocessing, are compared with those of the set.
            By default they are those of the loader ``id``. For a set they are those of the dataset that it names, but
            only if this process has opened that dataset itself: a cache from somebody else can name any path.
        device: the device of the detector; ``"auto"`` uses a GPU if there is one, else the model's own device.
        **options: how loaders are run through the model: the options of ``extract``. Probes that the scorer needs are
            added if they are missing. The detector runs the model with the options of the ``id`` set.

    Raises:
        OtherModel: if a set, or the fit of the scorer, comes from other weights than the model's.
        NotFitted: if the scorer needs a fit, and there is no ``fit``.
        MissingInput: if the sets lack something that the scorer needs.
        UnknownName: if there are no such ``sets`` or ``sets_among``, or no such option, such as a parameter of the
            scorer, which ``create_scorer`` takes.
        BadLabels: if there are sets of labels, and ``id`` has no labels that are class indices of the model.
        BadInput: if the scorer needs something that a single model cannot compute, a share is out of range, the number
            of names is not the number of classes, there are options but no loader, or the preprocessing does not
            reproduce the features of the ID set.
        EmptyInput, NotFinite, HeadNotFound: as in ``extract`` and ``Scorer.score``.
    """
    ready = copy.deepcopy(as_scorer(scorer))
    given = _checked_options(options, ready)
    if sets:
        check_rule(sets, alpha, sets_among)
    id, fit = _opened(id), None if fit is None else _opened(fit)
    probes_for(ready.needs)  # refuses what a single model cannot compute
    if not ready.is_fitted and fit is None:
        raise NotFitted(f"{ready.name!r} needs to be fitted on ID data: pass fit=, a feature set or a loader.")
    model = unwrapped(model)
    weights = weights_sha256(model)

    def as_set(data: FeatureSet | Iterable[Any], name: str, needs: Iterable[str]) -> FeatureSet:
        """Return a feature set unchanged, if it comes from the model; run a loader through the model."""
        if isinstance(data, FeatureSet):
            require_weights(model, weights, data, name)
            return data
        known = [probe.name for probe in given.all_probes]
        missing = [probe for probe in probes_for(needs) if probe.name not in known]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NearChance)  # warned of below
            return extract(model, data, device=device, **options | {"probes": [*given.probes, *missing]})

    if options and isinstance(id, FeatureSet) and isinstance(fit, FeatureSet | None):
        raise BadInput(f"{', '.join(options)} apply to loaders, but there are only feature sets: leave them out.")
    fit_set = None
    if fit is not None and ready.fit_needs:
        fit_set = as_set(fit, "fit", (*ready.fit_needs, *ready.needs))
        fit_all([ready], fit_set, hashed=True)
    id_set = as_set(id, "id", ready.needs)
    ready = ready.decided_for([id_set])
    _warn_of_same_data(ready, fit_set, id_set, fit is id)
    other = other_preprocessing(id_set.provenance, ready.fitted_on, "the ID set", "the fit set")
    for text in (*label_warnings(id_set, "ID set"), *other):
        warn_user(text)
    scores = ready.score(id_set).numpy()
    label, _ = predictions_of(id_set)
    num_classes = id_set.num_classes or 0
    own = own_class_names(model) or listed_class_names(getattr(id, "dataset", None)) or []
    known = tuple(own) if len(own) == num_classes else None
    names_of_classes = known if classes is None else ordered(classes, num_classes)
    if len(scores) > 1 and scores.min() == scores.max():
        warn_user(
            f"{ready.name!r} gives all ID images the same score, so that the detector may reject nothing: choose "
            "another scorer, or check the model.",
        )
    detector = Detector(
        forward=Forward(model, _options_of(id_set, [probe.name for probe in probes_for(ready.needs)])),
        scorer=ready,
        calibration=Calibration.of(scores, label, num_classes, keep, delta, per_class),
        weights=weights,
        preprocessing=preprocessing_of(model, preprocessing),
        classes=names_of_classes,
        data=id_set.provenance,
        label_sets=calibrate_sets_on(id_set, sets, alpha, sets_among) if sets else None,
    )
    detector.to(device)
    check_preprocessing(detector, id_set, id, images)
    return detector


def _checked_options(options: Mapping[str, Any], scorer: Scorer) -> ExtractionOptions:
    """Return the options of an extraction; raise UnknownName if there are others, such as parameters of the scorer."""
    own = inspect.signature(type(scorer)).parameters
    meant = {name: value for name, value in options.items() if name in own and name not in OPTIONS}
    if meant:
        values = ", ".join(f"{name}={value!r}" for name, value in meant.items())
        raise UnknownName(
            f"calibrate takes no parameters of the scorer {scorer.name!r}, such as {', '.join(meant)}: pass the scorer "
            f"with them, ood_scores.create_scorer({scorer.name!r}, {values})."
        )
    return options_from(options, calibrate)


def _opened(data: Data) -> FeatureSet | Iterable[Any]:
    """Open the path of a cache; return other data as they are."""
    return as_feature_set(data) if isinstance(data, (str, PathLike)) else data


def _options_of(feats: FeatureSet, probes: Sequence[str]) -> ExtractionOptions:
    """Return the options with which a set was extracted, with only the named probes.

    Raises:
        BadInput: if the provenance of the set does not describe one of these probes.
    """
    known = {record.parameters["name"] for record in feats.provenance.probes} if feats.provenance else set()
    for name in probes:
        if name not in known:
            raise BadInput(
                f"the ID set contains {name}, but its provenance does not describe how it was computed: create it with "
                f"ood_scores.extract(..., probes=[{name!r}])."
            )
    return ExtractionOptions.of(feats.provenance, probes, feats.head) if feats.provenance else ExtractionOptions()


def _warn_of_same_data(scorer: Scorer, fit: FeatureSet | None, id: FeatureSet, same: bool) -> None:
    """Warn if rows of the calibration set are among those that the scorer was fitted on."""
    if not scorer.fit_needs:
        return
    rows = _rows_fitted_on(scorer, fit, id)
    if same or rows:
        warn_user(
            f"the threshold is calibrated on {rows or len(id):,} of {len(id):,} rows that {scorer.name!r} was fitted "
            "on, whose scores differ from those of new images, so that it keeps a different share of these: pass "
            "held-out data as id=.",
        )


def _rows_fitted_on(scorer: Scorer, fit: FeatureSet | None, id: FeatureSet) -> int:
    """Count the rows of a set that a scorer was fitted on; all, if it was fitted on the same dataset before."""
    if fit is not None:
        overlap = shared_rows(fit, id, "fit set", "ID set")
        return overlap.rows if overlap.matters else 0
    fitted, found = scorer.fitted_on, id.provenance
    same = (
        fitted
        and found
        and fitted.data_sha256 == found.data_sha256
        and len(id) >= (found.dataset_rows or 0) - len(found.skipped)
    )
    return len(id) if same else 0
