"""Where extracted rows go when no cache is asked for: arrays in memory, with the writer's interface."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ood_scores.features import FeatureSet, Head, Provenance


class MemorySink:
    """Collects rows in preallocated arrays; where the length is unknown they double as they fill."""

    def __init__(self, rows: int | None, head: Head | None, provenance: Provenance) -> None:
        self._capacity = rows or 0
        self._arrays: dict[str, Tensor] = {}
        self._head, self._provenance = head, provenance
        self.rows = 0

    def append(self, rows: Mapping[str, Tensor]) -> None:
        stop = self.rows + len(rows["features"])
        if stop > self._capacity or not self._arrays:
            self._grow(max(stop, 2 * self._capacity if self._arrays else self._capacity), rows)
        for name, values in rows.items():
            self._arrays[name].numpy()[self.rows : stop] = values.numpy()
        self.rows = stop

    def finish(self) -> None:
        """Cuts the arrays to the rows that came."""
        self._arrays = {name: array[: self.rows] for name, array in self._arrays.items()}

    def feature_set(self) -> FeatureSet:
        """What was collected."""
        columns, head = self._arrays, self._head
        if head:
            head = Head(head.weight.clone(), head.bias.clone())  # made in inference mode: of no use under autograd
        extras = {name.removeprefix("extras/"): columns[name] for name in columns if name.startswith("extras/")}
        return FeatureSet(columns["features"], columns["logits"], columns.get("labels"), head, extras, self._provenance)

    def _grow(self, capacity: int, like: Mapping[str, Tensor]) -> None:
        old = self._arrays
        self._arrays = {
            name: torch.empty((capacity, *values.shape[1:]), dtype=values.dtype) for name, values in like.items()
        }
        for name, array in old.items():
            self._arrays[name][: self.rows] = array[: self.rows]
        self._capacity = capacity
