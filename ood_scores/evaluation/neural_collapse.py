"""Neural collapse and singular values: measured on feature sets, block by block, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, BadLabels, MissingInput, ShapeMismatch, UnknownName
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.collapse import (
    equiangularity,
    equinormality,
    self_duality,
    variability_of_covariance,
)
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments, Moments

if TYPE_CHECKING:
    import pandas as pd

Duality = Literal["frobenius", "columns"]
Reference = Literal["prediction", "label"]


@dataclass(frozen=True)
class Collapse:
    """How far a classifier is from neural collapse; every measure is 0 where it is complete.

    Attributes:
        nc1: variability within the classes, relative to that between them.
        en_means: how unequal the norms of the centred class means are (NC2, equinormality).
        en_classifier: the same of the classifier's weights.
        ea_means: how far the angles between the centred class means are from equal and largest (NC2, equiangularity).
        ea_classifier: the same of the classifier's weights.
        nc3: how far the weights are from the centred class means, up to a scale (self-duality).
        nc4: share of rows whose nearest class mean is not the class that the network predicts.
    """

    nc1: float
    en_means: float
    en_classifier: float
    ea_means: float
    ea_classifier: float
    nc3: float
    nc4: float


TITLES = {
    "nc1": "NC1: variability within classes",
    "en_means": "NC2: unequal norms, means",
    "en_classifier": "NC2: unequal norms, classifier",
    "ea_means": "NC2: unequal angles, means",
    "ea_classifier": "NC2: unequal angles, classifier",
    "nc3": "NC3: classifier from means",
    "nc4": "NC4: nearest mean disagrees",
}
"""Titles of the measures."""


def neural_collapse(
    feats: FeatureSet,
    *,
    normalize: bool = False,
    nc1_over_classes: bool = True,
    nc3_norm: Duality = "frobenius",
    nc4_against: Reference = "prediction",
) -> Collapse:
    """The seven measures of neural collapse, of a labelled set with a head: usually the training set, in eval mode.

    With C classes, ``M`` ``[C, D]`` the class means less ``mu_G``, the unweighted mean of the class means, ``W``
    ``[C, D]`` the weights of the head, ``S_W`` ``[D, D]`` the covariance around the class means, over all N rows, and
    ``S_B = M^T M / C``::

        nc1 = tr(S_W S_B^+) / C
        en  = std_c ||v_c|| / mean_c ||v_c||                               v = M or W, std unbiased
        ea  = sum_{i != j} |cos(v_i, v_j) + 1/(C-1)| / (C (C-1))           v = M or W
        nc3 = || W / ||W||_F  -  M / ||M||_F ||_F^2
        nc4 = share of rows with argmin_c ||z - mu_c|| != argmax_c logits_c

    ``S_B`` has rank C-1 at most, so that its pseudo-inverse is truncated there, and where a singular value of ``M`` is
    below the rounding of the largest: the inverse of what rounding leaves there would be noise. A row as near to two
    class means belongs to the first. A class mean or weight of zero has the cosine 0 with all others.

    Reads the features twice: for the moments, which are kept with the set, and for the nearest means. Logits are those
    of the set, else those of the head.

    Args:
        feats: features, labels, a head, and usually logits.
        normalize: True scales every feature vector to length one first: what the classifier of a model trained with L2
            normalisation saw, which extraction does not keep.
        nc1_over_classes: False leaves the division by C away, as the code of Papyan et al. does; their text and that
            of Haas et al. have it.
        nc3_norm: ``"columns"`` scales each ``w_c`` and ``mu_c - mu_G`` to length one instead of the whole matrices, as
            the text of Haas et al. 2022 says (Eq. 8); the default is Papyan's definition.
        nc4_against: ``"label"`` compares the nearest class mean with the label, as the text of Haas et al. 2022 says
            (Eq. 9); the default, with the network's prediction, is Papyan's.

    Raises:
        BadLabels: there are no labels, they are not class indices, or a class has no row.
        MissingInput: there is no head.
        BadInput: there is one class only; all class means are the same; or the head's weight is all zeros.
        NotFinite: features or logits hold NaN or infinite values.
        UnknownName: another ``nc3_norm`` or ``nc4_against``.

    Source: Papyan, Han & Donoho 2020, "Prevalence of neural collapse during the terminal phase of deep learning
    training", and their code; Haas, Yolland & Rabus 2022, Eq. 4 to 9.
    """
    _known(nc3_norm, ("frobenius", "columns"))
    _known(nc4_against, ("prediction", "label"))
    weight = _weight(feats)
    counts, class_means, scatter = _moments(feats, ClassMoments(normalize=normalize))
    _require_rows(counts)
    centre = class_means.mean(dim=0)
    means = class_means - centre
    _require_spread(means, class_means)
    nc1 = float(variability_of_covariance(scatter / len(feats), means))
    return Collapse(
        nc1=nc1 / len(means) if nc1_over_classes else nc1,
        en_means=float(equinormality(means)),
        en_classifier=float(equinormality(weight)),
        ea_means=float(equiangularity(means)),
        ea_classifier=float(equiangularity(weight)),
        nc3=float(self_duality(weight, means, columns=nc3_norm == "columns")),
        nc4=_disagreement(feats, normalize, centre, means, nc4_against),
    )


def singular_values(
    feats: FeatureSet,
    others: Mapping[str, FeatureSet] | None = None,
    *,
    name: str = "train",
    centre: bool = False,
    per_row: bool = True,
) -> pd.DataFrame:
    """Singular values of the features, and what other sets have in the directions that belong to them.

    With ``Z = U S V^T`` ``[N, D]`` of ``feats``, the value of a set with features ``X`` at rank k is ``||X v_k||``,
    which is the k-th singular value for ``Z`` itself: how far the set reaches in the directions that the training
    features hardly use.

    Args:
        feats: the set that gives the directions, usually the training set.
        others: further sets by name, of the same model.
        name: what ``feats`` is called in the frame.
        centre: True takes the mean of ``feats`` off all sets. The paper's text decomposes the embeddings themselves,
            and finds as many large values as there are classes; of centred features they would be one less.
        per_row: True divides by the square root of the set's number of rows, so that sets of different sizes compare;
            False gives the singular values of the matrix.

    Returns:
        A tidy frame, one row for each set and rank: ``set``, ``rank`` (1 to D, descending), ``value``.

    The values come from ``Z^T Z``, which a single pass gives: below 1e-8 of the largest they are rounding.

    Raises:
        BadInput: another set is called ``name``.
        ShapeMismatch: a set has another number of features.
        NotFinite: features hold NaN or infinite values.

    Source: Haas, Yolland & Rabus 2022, Appendix A.3, Fig. 6.
    """
    import pandas as pd

    others = others or {}
    if name in others:
        raise BadInput(f"two sets are called {name!r}: give the set that the directions come from another name=.")
    for other_name, other in others.items():
        if other.num_features != feats.num_features:
            raise ShapeMismatch(
                f"{other_name!r} has {other.num_features} features, {name!r} has {feats.num_features}: all sets must "
                "come from the same model."
            )
    mean = _moments(feats, GlobalMoments())[1][0]
    origin = mean if centre else torch.zeros_like(mean)
    directions = torch.linalg.eigh(_gram(feats, origin)).eigenvectors.flip(1)
    values = {each: _reach(_gram(of, origin), directions) for each, of in {name: feats, **others}.items()}
    if per_row:
        values = {each: of / len(others.get(each, feats)) ** 0.5 for each, of in values.items()}
    rank = np.arange(1, feats.num_features + 1)
    frames = [pd.DataFrame({"set": each, "rank": rank, "value": of.numpy()}) for each, of in values.items()]
    return pd.concat(frames, ignore_index=True)


def _known(name: str, there_are: Iterable[str]) -> None:
    if name not in there_are:
        raise UnknownName(f"no {name!r} here; there are: {', '.join(there_are)}")


def _weight(feats: FeatureSet) -> Tensor:
    """The weight of the head, float64 ``[C, D]``, checked to be that of a classifier."""
    if feats.head is None:
        raise MissingInput("neural collapse is measured on the head too, and this feature set has none: extract it.")
    weight = feats.head.weight.double().cpu()
    if len(weight) < 2:
        raise BadInput("neural collapse compares classes, and the head has only one.")
    if not weight.any():
        raise BadInput("the weight of the head is all zeros: is the model trained?")
    return weight


def _require_rows(counts: Tensor) -> None:
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise BadLabels(
            f"{len(empty)} of {len(counts)} classes have no rows ({shown}), so they have no mean: pass a set with rows "
            "of every class, such as the training set."
        )


def _require_spread(centred: Tensor, means: Tensor) -> None:
    """All class means the same, up to rounding, have no angles, and no variance between them to compare with."""
    rounding = len(means) * torch.finfo(torch.float64).eps * means.abs().max()
    if centred.abs().max() <= rounding:
        raise BadInput("all class means are the same: are these the features that the head reads, and their labels?")


def _disagreement(feats: FeatureSet, normalize: bool, centre: Tensor, means: Tensor, against: Reference) -> float:
    labels = feats.class_labels().cpu() if against == "label" else None
    half_squares = means.square().sum(dim=1) / 2
    wrong = 0
    for block in finite_blocks(feats, "features", *(() if labels is not None else ("logits",))):
        nearest = ((block.space("features", normalize) - centre) @ means.T - half_squares).argmax(dim=1)
        expected = _predicted(block, feats) if labels is None else labels[block.start : block.start + len(block)]
        wrong += int((nearest != expected).sum())
    return wrong / len(feats)


def _predicted(block: Block, feats: FeatureSet) -> Tensor:
    return block.prediction() if feats.has("logits") else block.head(block.features).argmax(dim=1)


def finite_blocks(feats: FeatureSet, *only: str) -> Iterator[Block]:
    for block in feats.blocks(device="cpu", only=only):
        block.require_finite()
        yield block


def _moments(feats: FeatureSet, wanted: ClassMoments | GlobalMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and scatter, on the CPU."""
    moments: Moments = collect(feats, [wanted])[wanted]
    return moments.counts.cpu(), moments.means.cpu(), moments.scatter.cpu()


def _gram(feats: FeatureSet, origin: Tensor) -> Tensor:
    """``Z^T Z`` of the features less ``origin``, float64 ``[D, D]``."""
    _, means, scatter = _moments(feats, GlobalMoments())
    shift = means[0] - origin
    return scatter + len(feats) * torch.outer(shift, shift)


def _reach(gram: Tensor, directions: Tensor) -> Tensor:
    """``||Z v_k||`` for the columns ``v_k``."""
    return ((gram @ directions) * directions).sum(dim=0).clamp_min(0).sqrt()
