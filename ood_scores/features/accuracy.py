"""The accuracy of a model, and warnings if labels do not seem to be its classes."""

from __future__ import annotations

from ood_scores.errors import BadLabels, NearChance
from ood_scores.features.featureset import FeatureSet
from ood_scores.runtime import default_torch_state
from ood_scores.user_warnings import warn_user

LEAST_ROWS = 50
"""The fewest rows whose accuracy can be near chance."""


@default_torch_state()
def accuracy_of(feats: FeatureSet) -> float | None:
    """Return the accuracy on a set; None without logits, or if the labels are not class indices of the model."""
    if not feats.has("logits") or why_not_classes(feats) is not None or not feats.has("labels"):
        return None
    blocks = feats.blocks(only=["logits", "labels"])
    return sum(int((block.prediction() == block.labels).sum()) for block in blocks) / len(feats)


def why_not_classes(feats: FeatureSet) -> str | None:
    """Return the reason why the labels of a set are not class indices of the model, or None if they are."""
    try:
        if feats.has("labels"):
            feats.class_labels()
    except BadLabels as error:
        return str(error)
    return None


def near_chance(accuracy: float | None, rows: int, classes: int | None, name: str) -> str | None:
    """Return a warning if an accuracy is near chance.

    Near chance is at most ``2 / classes``; with fewer than 10 classes, at most ``1 / classes + 0.1``.

    Args:
        accuracy: the accuracy; None if it is unknown.
        rows: the number of rows that it was measured on.
        classes: the number of classes of the model.
        name: the name of the set, such as ``ID set``.
    """
    if accuracy is None or not classes or classes < 2 or rows < LEAST_ROWS:
        return None
    if accuracy > 1 / classes + min(1 / classes, 0.1):
        return None
    return (
        f"the accuracy on the {name} is {accuracy:.2%}, near chance for {classes:,} classes: check that the set is "
        "in-distribution, and that its labels are in the order of the model's classes."
    )


def warn_of_chance(feats: FeatureSet) -> None:
    """Warn if the accuracy on a set that has just been extracted is near chance."""
    name = f"dataset {feats.provenance.dataset!r}" if feats.provenance else "dataset"
    text = near_chance(accuracy_of(feats), len(feats), feats.num_classes, name)
    if text:
        warn_user(f"{text} That of an OoD set means nothing.", NearChance)


def label_warnings(feats: FeatureSet, name: str, accuracy: float | None = None) -> list[str]:
    """Return a warning if the labels of an ID set are not class indices, or if the accuracy on it is near chance.

    Args:
        feats: the set.
        name: its name in the warning, such as ``ID set``.
        accuracy: the accuracy on it, if it is known already.
    """
    wrong = why_not_classes(feats)
    if wrong:
        return [f"the {name} has labels that are not classes of the model: {wrong}"]
    known = accuracy_of(feats) if accuracy is None else accuracy
    found = near_chance(known, len(feats), feats.num_classes, name)
    return [found] if found else []
