"""Hashes of rows, and the rows that two feature sets share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.storage import statistics_store
from ood_scores.runtime import default_torch_state
from ood_scores.user_warnings import warn_user

VALUES = 2**17
"""The number of values that are hashed at a time: they fit the processor's caches."""

LEAST_DISTINCT = 2
"""Sets that share only copies of one row, such as that of a blank image, are not worth a warning."""


@dataclass(frozen=True)
class RowHashes:
    """A 64-bit hash of the features of each row as float32, int64 ``[N]``: equal rows have equal hashes."""

    reads: ClassVar[tuple[str, ...]] = ("features",)
    stored_as: ClassVar[type] = Tensor

    def start(self, feats: FeatureSet) -> RowHashesAccumulator:
        return RowHashesAccumulator(len(feats), feats.num_features)


ROW_HASHES = RowHashes()


def pending(feats: FeatureSet) -> RowHashesAccumulator | None:
    """Return an accumulator for the hashes of a set, or None if they are known."""
    statistics_store.recall(feats, [ROW_HASHES])
    return None if ROW_HASHES in feats.statistics else ROW_HASHES.start(feats)


@dataclass
class RowHashesAccumulator:
    """The hash is a sum of the 64-bit words of a row, each mixed and multiplied by an odd random number."""

    length: int
    width: int
    factors: np.ndarray = field(init=False)
    hashes: np.ndarray = field(init=False)
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        words = (self.width + 1) // 2
        self.factors = np.random.RandomState(0).randint(-(2**62), 2**62, words, dtype=np.int64) * 2 + 1
        self.hashes = np.empty(self.length, np.int64)
        self.rows = max(1, VALUES // max(self.width, 1))

    def update(self, block: Block) -> None:
        for start in range(0, len(block), self.rows):
            values = block.features[start : start + self.rows].float().cpu().numpy()
            values = np.pad(values, ((0, 0), (0, self.width % 2))) if self.width % 2 else np.ascontiguousarray(values)
            words = values.view(np.int64)
            mixed = words >> 32
            mixed ^= words
            first = block.start + start
            self.hashes[first : first + len(values)] = np.einsum("ij,j->i", mixed, self.factors)

    def result(self) -> Tensor:
        return torch.from_numpy(self.hashes)

    def keep(self, feats: FeatureSet) -> None:
        """Add the hashes to the statistics of the set, and store them beside its cache."""
        statistics_store.remember(feats, {ROW_HASHES: self.result()})


@dataclass(frozen=True)
class Overlap:
    """The rows that two sets share: ``rows`` of the ``of`` rows of ``other`` are in ``one``.

    Rows are the same if their features are identical, whatever their inputs. ``distinct`` counts copies once.
    """

    one: str
    other: str
    rows: int
    of: int
    distinct: int

    @property
    def matters(self) -> bool:
        """Whether the overlap is more than copies of a single row."""
        return self.distinct >= LEAST_DISTINCT or self.rows == self.of

    def __str__(self) -> str:
        return (
            f"the {self.one} shares {self.rows:,} of {self.of:,} rows with the {self.other} (identical features): "
            "use sets that have no row in common."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the overlap as plain data for JSON."""
        return {"set": self.one, "other": self.other, "rows": self.rows, "of": self.of}


@default_torch_state()
def row_hashes(feats: FeatureSet) -> Tensor:
    """Return ``RowHashes`` of a set, which are stored beside its cache. Features may be NaN or infinite."""
    accumulator = pending(feats)
    if accumulator:
        for block in feats.blocks(only=ROW_HASHES.reads):
            accumulator.update(block)
        accumulator.keep(feats)
    hashes: Tensor = feats.statistics[ROW_HASHES]
    return hashes


def shared_rows(one: FeatureSet, other: FeatureSet, name: str, other_name: str) -> Overlap:
    """Count the rows of a set that are in another set.

    Rows are compared by their features. If both sets are known to come from the same dataset, they share at least as
    many rows as they have together more than it, even if features differ in their last bits.
    """
    hashes = row_hashes(other).numpy()
    shared = hashes[np.isin(hashes, row_hashes(one).numpy())]
    rows, distinct = len(shared), len(np.unique(shared))
    here, there = one.provenance, other.provenance
    if here and there and here.data_sha256 == there.data_sha256 and there.dataset_rows:
        surplus = min(len(one) + len(other) - there.dataset_rows + len(there.skipped), len(other))
        rows, distinct = max(rows, surplus), max(distinct, surplus)
    return Overlap(name, other_name, rows, len(other), distinct)


def overlaps(
    fit: FeatureSet | None,
    id: FeatureSet,
    ood: Mapping[str, FeatureSet],
    covariate: Mapping[str, FeatureSet] = MappingProxyType({}),
    search: Mapping[str, FeatureSet] = MappingProxyType({}),
) -> list[Overlap]:
    """Return the overlaps that matter.

    They are those of the fit set and of each search set with each set that is scored, of the ID set and each
    covariate-shifted set with each other and with each OoD set; and OoD sets that are the same.
    """
    inside = {"ID set": id} | _titled("covariate-shifted set", covariate)
    scored = inside | _titled("OoD set", ood)
    chosen_on = ({} if fit is None else {"fit set": fit}) | _titled("search set", search)
    found = [shared_rows(chosen_on[one], scored[other], one, other) for one in chosen_on for other in scored]
    for one, other in combinations(scored, 2):
        overlap = shared_rows(scored[one], scored[other], one, other)
        same = overlap.rows == overlap.of == len(scored[one])
        found += [overlap] if one in inside or same else []
    return [overlap for overlap in found if overlap.matters]


def _titled(what: str, sets: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
    return {f"{what} {name!r}": feats for name, feats in sets.items()}


def warn_of_overlaps(found: Iterable[Overlap]) -> None:
    """Warn of each overlap that matters."""
    for overlap in filter(lambda each: each.matters, found):
        warn_user(str(overlap))
