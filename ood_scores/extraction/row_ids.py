"""The ids of the rows of a loader: from its batches, or from its dataset if the order of the rows is known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ood_scores.data.row_ids import ids_of
from ood_scores.errors import BadInput, StaleCache
from ood_scores.extraction.loaders import ID_KEYS, Batches, as_partial, can_jump, is_in_order
from ood_scores.extraction.unreadable import Partial
from ood_scores.features import FeatureSet
from ood_scores.features.provenance import WHAT_TO_DO
from ood_scores.features.storage import cache as caches
from ood_scores.features.storage.checksums import checked
from ood_scores.features.storage.texts import IDS, as_bytes, packed, packed_width, padded, unpacked
from ood_scores.user_warnings import warn_user

SHOWN = 3
"""Number of repeated ids that a warning lists."""

AT_ONCE = 16384
"""Number of rows whose ids are compared at a time."""


def ids_in(batch: Any, rows: int) -> list[Any] | None:
    """Return the ids of the ``rows`` rows of a batch: those of a dict under one of ``ID_KEYS``; None if it has none.

    They are strings or integers, one for each row; entries of other shapes and types are something else.

    Raises:
        BadInput: if there are ids, but not one for each row.
    """
    if not isinstance(batch, Mapping):
        return None
    for key in ID_KEYS:
        values = batch.get(key)
        if isinstance(values, (Tensor, np.ndarray)):
            values = values.tolist() if values.ndim == 1 else None
        if isinstance(values, (list, tuple)) and all(isinstance(value, (str, int, os.PathLike)) for value in values):
            if len(values) != rows:
                raise BadInput(f"{key!r} of a batch has {len(values)} ids, but there are {rows} inputs.")
            return list(values)
    return None


@dataclass(frozen=True)
class RowIds:
    """The ids of the rows of a loader.

    Attributes:
        known: those of all rows of the dataset; None if they are in the batches, if the order of the rows is not known,
            or if there are none.
        exist: whether rows have ids; those of rows without one are then empty.
        width: the width of the column of those that are known, see ``ood_scores.features.storage.texts``.
    """

    known: Sequence[Any] | None
    exist: bool
    width: int = 1

    @classmethod
    def of(cls, batches: Batches) -> RowIds:
        """Return the ids of a loader whose first batches have been read.

        Raises:
            BadInput: if the number of ids is not that of the rows, or a dataset has two rows of one id.
        """
        loader, (_, example) = batches.loader, batches.example
        if ids_in(example, as_partial(example).rows) is not None:
            return cls(None, True)
        in_order = isinstance(loader, DataLoader) and is_in_order(loader) and can_jump(loader)
        ids = ids_of(loader.dataset, unique=True) if in_order else None  # type: ignore[attr-defined]
        return cls(ids, ids is not None, 1 if ids is None else packed_width(ids))

    def columns(self, start: int, part: Partial) -> dict[str, Tensor]:
        """Return the column with the ids of the readable rows of a batch; nothing if rows have no ids."""
        if not self.exist:
            return {}
        places = [place for place in range(part.rows) if place not in part.reasons]
        if self.known is not None:
            return {IDS: packed([self.known[start + place] for place in places], self.width)}
        return {IDS: packed(ids_in(part.batch, len(places)) or [""] * len(places))}

    def require_those_of(self, h5: h5py.File, path: Path, first: int = 0) -> None:
        """Check that the rows of a cache, the first of which is row ``first`` of the dataset, have these ids.

        Raises:
            StaleCache: if they have other ids.
        """
        if self.known is None or IDS not in h5:
            return
        state = caches.state(h5)
        skipped = state.provenance.skipped_rows if state.provenance else ()
        rows = np.setdiff1d(np.arange(first, first + state.rows + len(skipped)), skipped)[: state.rows]
        count, example = 0, (0, "")
        with checked(h5[IDS], "once" if state.finished else False) as check:
            for start in range(0, len(rows), AT_ONCE):
                part = rows[start : start + AT_ONCE]
                check(start, start + len(part))
                found = torch.from_numpy(as_bytes(h5[IDS][start : start + len(part)]))
                expected = packed((self.known[row] for row in part), found.shape[1])
                differ = (padded(found, expected.shape[1]) != expected).any(dim=1) & found.any(dim=1)  # a gap has no id
                places = differ.nonzero()[:, 0]
                if len(places) and not count:
                    example = int(part[places[0]]), str(unpacked(found[places[:1]])[0])
                count += len(places)
        if count:
            row, was = example
            raise StaleCache(
                f"{path} was created from other rows than those requested: row {row} was {was!r} and is now "
                f"{str(self.known[row])!r}; {count:,} rows differ.\n{WHAT_TO_DO}."
            )


NO_IDS = RowIds(None, False)


def warn_of_repeated_ids(feats: FeatureSet) -> None:
    """Warn of rows that have one id, by which they cannot be told apart."""
    if not feats.has(IDS):
        return
    counts: Counter[str] = Counter()
    for block in feats.blocks(only=[IDS]):
        counts.update(block.ids.tolist())
    repeated = [(name, count) for name, count in counts.items() if name and count > 1]
    if repeated:
        shown = ", ".join(f"{name!r} ({count} rows)" for name, count in repeated[:SHOWN])
        more = f", and {len(repeated) - SHOWN:,} more" if len(repeated) > SHOWN else ""
        warn_user(f"several rows have the same id: {shown}{more}. Their pictures cannot be told apart by it.")
