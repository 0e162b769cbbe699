"""Feature sets, in memory or on disk, read in blocks."""

from ood_scores.features.block import Block
from ood_scores.features.ensemble import OneSet, Sets, as_feature_set, ensemble
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.head import Head, zero_shot_head
from ood_scores.features.loading import load
from ood_scores.features.provenance import Provenance

__all__ = [
    "Block",
    "FeatureSet",
    "Head",
    "OneSet",
    "Provenance",
    "Sets",
    "as_feature_set",
    "ensemble",
    "load",
    "zero_shot_head",
]
