"""Columns of logits that are computed as they are read: those of a head, and the two logits of a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.features.head import Head, as_two_classes
from ood_scores.features.storage.columns import Column, CombinedColumn


def logits_of(head: Head, features: Column) -> CombinedColumn:
    """Return the logits that a head computes from a column of features."""
    return CombinedColumn((features,), _LogitsOf(head))


def with_two_classes(logits: Column) -> Column:
    """Return the logits; a single logit z per row becomes (0, z) when it is read."""
    is_single = len(logits.shape) == 2 and logits.shape[1] == 1
    return CombinedColumn((logits,), _two_classes_of) if is_single else logits


@dataclass(frozen=True)
class _LogitsOf:
    """The logits of a head, as a function of columns."""

    head: Head

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        return self.head(parts[0].to(torch.promote_types(parts[0].dtype, torch.float32)))


def _two_classes_of(parts: Sequence[Tensor]) -> Tensor:
    return as_two_classes(parts[0])
