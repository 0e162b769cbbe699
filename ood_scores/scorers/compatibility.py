"""Whether feature sets come from the same model: their weights and the widths of their columns."""

from __future__ import annotations

from ood_scores.errors import OtherModel
from ood_scores.features import FeatureSet, Provenance


def require_same_weights(one: Provenance | None, other: Provenance | None, name: str, other_name: str) -> None:
    """Raise OtherModel, with both names, if two sets are known to come from different weights."""
    if one and other and one.weights_sha256 != other.weights_sha256:
        raise OtherModel(
            f"{name} comes from {_model(one)}, {other_name} from {_model(other)}: both must come from the same model, "
            "so extract one of them again."
        )


def _model(provenance: Provenance) -> str:
    return f"{provenance.architecture} with weights {provenance.weights_sha256[:12]}…"


def widths(feats: FeatureSet) -> dict[str, int]:
    """Return the widths of the features and of the logits, if there are any."""
    found = {"features": feats.num_features, "logits": feats.num_classes}
    return {name: width for name, width in found.items() if width is not None}
