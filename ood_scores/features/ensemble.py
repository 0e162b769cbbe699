"""Ensembles: the outputs of several models for the same data as one feature set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, EmptyInput, ShapeMismatch
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.head import Head
from ood_scores.features.loading import load
from ood_scores.features.provenance import Provenance
from ood_scores.features.storage import columns as col

OneSet: TypeAlias = FeatureSet | str | os.PathLike[str]
"""A feature set, or the path of a cache."""

Sets: TypeAlias = OneSet | Sequence[OneSet]
"""One set, or the sets of several models for the same data, which are an ensemble."""


def ensemble(members: Sequence[OneSet]) -> FeatureSet:
    """Combine the sets of several models on the same data into the set of one model that averages their logits.

    The features are the concatenated features of the members. The head has their concatenated weights, divided by the
    number of members, so that ``head(features)`` are the logits and every scorer works. The predictive distribution of
    a deep ensemble (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles") averages probabilities instead. It is the extra ``ensemble.mean`` ``[N, C]``; the extra
    ``ensemble.entropy`` ``[N]`` is the mean entropy of the members. The scorer ``ensemble`` reads both. All columns are
    computed when they are read; members on disk stay there.

    Args:
        members: Feature sets, or paths of caches.

    Raises:
        EmptyInput: if there is no member.
        BadInput: if the members are not sets of the same data: their numbers of rows, labels, ids, or names differ, or
            rows are in random order.
        ShapeMismatch: if the models have different numbers of classes.
    """
    return _combined([_member(member) for member in members])


def _combined(members: Sequence[FeatureSet]) -> FeatureSet:
    _check_same_data(members)
    features = col.CombinedColumn(tuple(member.columns["features"] for member in members), _side_by_side)
    columns: dict[str, col.Column] = {}
    if all(member.has("logits") for member in members):
        logits = tuple(member.columns["logits"] for member in members)
        if len({column.shape[1] for column in logits}) > 1:
            numbers = ", ".join(str(column.shape[1]) for column in logits)
            raise ShapeMismatch(f"the models have {numbers} classes: all must have the same classes.")
        columns = {"logits": col.CombinedColumn(logits, _mean)}
        columns["ensemble.mean"] = col.CombinedColumn(logits, _mean_softmax)
        columns["ensemble.entropy"] = col.CombinedColumn(logits, _mean_entropy)
    labels, ids = (next((each.columns[name] for each in members if each.has(name)), None) for name in ("labels", "ids"))
    made = [member.provenance for member in members if member.provenance]
    origin = Provenance.of_members(made) if len(made) == len(members) else None
    joint = FeatureSet(features, columns.pop("logits", None), labels, _joint_head(members), columns, origin, ids)
    joint.device = members[0].device
    return joint


def as_feature_set(feats: Sets) -> FeatureSet:
    """Return a feature set as it is, open the path of a cache, and combine a list of either as an ensemble.

    Raises:
        BadInput: if it is something else; the message says how to create a feature set.
    """
    return ensemble(feats) if isinstance(feats, (list, tuple)) else _member(feats)  # type: ignore[arg-type]


def _member(feats: OneSet) -> FeatureSet:
    if isinstance(feats, (str, os.PathLike)):
        return load(feats)
    if not isinstance(feats, FeatureSet):
        raise BadInput(
            f"expected a feature set or the path of a cache, got {type(feats).__name__}: call extract(model, loader), "
            "load(path), or FeatureSet(features, logits)."
        )
    return feats


def _check_same_data(members: Sequence[FeatureSet]) -> None:
    if not members:
        raise EmptyInput("an ensemble needs at least one feature set.")
    rows = {len(member) for member in members}
    names = {member.provenance.dataset for member in members if member.provenance}
    if len(rows) > 1 or len(names) > 1:
        found = [
            f"{member.provenance.dataset if member.provenance else 'a set'} ({len(member):,})" for member in members
        ]
        raise BadInput(f"the members of an ensemble must be sets of the same data, got {', '.join(found)}.")
    if any(member.provenance and member.provenance.shuffled for member in members):
        raise BadInput("the rows of a member are in random order: extract it with shuffle=False.")
    if len({member.provenance.skipped_rows for member in members if member.provenance}) > 1:
        raise BadInput("the members of an ensemble lack different rows: extract them again from the same data.")
    labels = [labels.cpu() for labels in (member.labels for member in members) if labels is not None]
    if any(not torch.equal(labels[0], other) for other in labels[1:]):
        raise BadInput("the members of an ensemble have different labels: all must be sets of the same data.")
    ids = [ids for ids in (member.ids for member in members) if ids is not None]
    if any(not np.array_equal(ids[0], other) for other in ids[1:]):
        raise BadInput("the members of an ensemble have different ids: all must be sets of the same data.")


def _joint_head(members: Sequence[FeatureSet]) -> Head | None:
    heads = [member.head for member in members if member.head]
    if len(heads) < len(members):
        return None
    heads = [head.to(heads[0].weight.device) for head in heads]
    weight = torch.cat([head.weight for head in heads], dim=1) / len(heads)
    return Head(weight, torch.stack([head.bias for head in heads]).mean(dim=0))


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double() for part in parts]).mean(dim=0)


def _mean_softmax(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double().softmax(dim=1) for part in parts]).mean(dim=0)


def _mean_entropy(parts: Sequence[Tensor]) -> Tensor:
    log_softmaxes = [part.double().log_softmax(dim=1) for part in parts]
    return torch.stack([-(logs.exp() * logs).sum(dim=1) for logs in log_softmaxes]).mean(dim=0)
