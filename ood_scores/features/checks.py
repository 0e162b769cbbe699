"""Checks that the columns of a feature set fit each other and its head."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ood_scores.errors import BadInput, BadLabels, ShapeMismatch
from ood_scores.features.head import Head
from ood_scores.features.storage import columns as col


def check_columns(columns: Mapping[str, col.Column], head: Head | None) -> None:
    """Check that the columns of a feature set and its head fit each other.

    Raises:
        ShapeMismatch: if the shapes do not fit.
        BadInput: if features or logits are not floating point.
        BadLabels: if labels are not integers.
    """
    for name in ("features", "logits"):
        if name not in columns:
            continue
        if len(columns[name].shape) != 2:
            raise ShapeMismatch(
                f"{name} must be [rows, width], got {tuple(columns[name].shape)}: pool or flatten first."
            )
        if not columns[name].dtype.is_floating_point:
            raise BadInput(f"{name} must be floating point, got {columns[name].dtype}.")
    if "labels" in columns:
        _check_labels(columns["labels"])
    rows = columns["features"].shape[0]
    for name, column in columns.items():
        if tuple(column.shape[:1]) != (rows,):
            raise ShapeMismatch(f"features have {rows} rows, but {name} has shape {tuple(column.shape)}.")
    if head is not None:
        _check_head(columns, head)


def _check_labels(labels: col.Column) -> None:
    if len(labels.shape) != 1:
        raise ShapeMismatch(f"labels must be [rows], got {tuple(labels.shape)}.")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise BadLabels(f"labels must be integer class indices, got {labels.dtype}.")


def _check_head(columns: Mapping[str, col.Column], head: Head) -> None:
    if head.num_features != columns["features"].shape[1]:
        raise ShapeMismatch(
            f"the head has {head.num_features} inputs, but the set has {columns['features'].shape[1]} features."
        )
    if "logits" in columns and head.num_classes != columns["logits"].shape[1]:
        raise ShapeMismatch(
            f"the head has {head.num_classes} classes, but the set has {columns['logits'].shape[1]} logits."
        )
