"""A feature set seen from one of its layers."""

from __future__ import annotations

from ood_scores.features.featureset import FeatureSet


class LayerSet(FeatureSet):
    """A set in which an extra ``[N, K]`` takes the place of the features; nothing is copied.

    It has the logits and labels of the set, and no other columns. It has no head, because that of the set does not map
    the extra.
    """

    def __init__(self, feats: FeatureSet, extra: str) -> None:
        kept = {name: column for name, column in feats.columns.items() if name in ("logits", "labels")}
        self._columns = {"features": feats.columns[f"extras/{extra}"], **kept}
        self.provenance, self.device, self.block_rows = feats.provenance, feats.device, feats.block_rows
        self.head = None
        self.statistics = {}
