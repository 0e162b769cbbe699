"""Whether feature sets come from the same model and settings: weights, pooling, head, probes, and widths of columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ood_scores.errors import OtherModel
from ood_scores.features import FeatureSet, Provenance
from ood_scores.features.provenance import JOINT, ProbeRecord

ADDRESS = " at 0x"
"""What the description of a function contains, which differs between processes."""

ROUNDING = 1e-2
"""The share of the largest weight by which stored heads may differ: one may be in half precision."""


def require_same_features(one: Provenance | None, other: Provenance | None, name: str, other_name: str) -> None:
    """Raise OtherModel, with both names, if two sets are known to come from different weights or poolings."""
    if not one or not other:
        return
    if one.weights_sha256 != other.weights_sha256:
        raise OtherModel(
            f"{name} comes from {_model(one)}, {other_name} from {_model(other)}: both must come from the same model, "
            f"so {_what_to_do(one, other)}."
        )
    if one.pool != other.pool:
        raise OtherModel(
            f"the pooling of {name} is {one.pooling!r}, that of {other_name} {other.pooling!r}: extract one of them "
            "again with the same pooling."
        )


def require_same_head(one: FeatureSet, other: FeatureSet, name: str, other_name: str) -> None:
    """Raise OtherModel, with both names, if two sets of equal widths have different heads."""
    if one.head is None or other.head is None:
        return
    mine, theirs = one.head.to("cpu"), other.head.to("cpu")
    for part, of_other in ((mine.weight, theirs.weight), (mine.bias, theirs.bias)):
        largest = float(of_other.double().abs().max())
        if float((part.double() - of_other.double()).abs().max()) > ROUNDING * largest:
            raise OtherModel(
                f"{name} has another head than {other_name}: both must have the same, from the model or from with_head."
            )


def require_same_probes(
    one: Provenance | None, other: Provenance | None, name: str, other_name: str, read: Iterable[str]
) -> None:
    """Raise OtherModel, with both names, if extras that are read come from probes with different parameters."""
    if not one or not other:
        return
    mine, theirs = ({str(each.parameters["name"]): each for each in origin.probes} for origin in (one, other))
    stems = {need.partition(".")[0] for need in read}
    for probe in sorted(mine.keys() & theirs.keys() & stems):
        if _settings(mine[probe]) != _settings(theirs[probe]):
            raise OtherModel(
                f"{probe!r} of {name} comes from {mine[probe]}, that of {other_name} from {theirs[probe]}: extract one "
                "of them again with the same parameters."
            )


def other_preprocessing(one: Provenance | None, other: Provenance | None, name: str, other_name: str) -> list[str]:
    """Return a warning, with both names, if two sets are known to be preprocessed in different ways."""
    if not one or not other or one.preprocessing == other.preprocessing:
        return []
    texts = one.preprocessing, other.preprocessing
    if "" in texts or any(ADDRESS in text for text in texts):
        return []
    return [
        f"{name} was preprocessed in another way, {texts[0]}, than {other_name}, {texts[1]}: extract one of them "
        "again, unless their images differ in this way."
    ]


def _settings(record: ProbeRecord) -> tuple[str, dict[str, Any]]:
    """The kind and the parameters, without the path of a file that the probe identifies."""
    unneeded = {"fit"} if record.parameters.get("identity") else set()
    return record.kind, {name: value for name, value in record.parameters.items() if name not in unneeded}


def _model(provenance: Provenance) -> str:
    weights = JOINT.join(f"{each[:12]}…" for each in provenance.members)
    return f"{provenance.architecture} with weights {weights}"


def _what_to_do(one: Provenance, other: Provenance) -> str:
    if sorted(one.members) == sorted(other.members):
        return "list them in the same order"
    return "extract one of them again"


def widths(feats: FeatureSet) -> dict[str, int]:
    """Return the widths of the features and of the logits, if there are any."""
    found = {"features": feats.num_features, "logits": feats.num_classes}
    return {name: width for name, width in found.items() if width is not None}
