"""Neural collapse and singular values of feature sets, computed block by block in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, BadLabels, MissingInput, ShapeMismatch
from ood_scores.features import Block, FeatureSet, Sets, as_feature_set
from ood_scores.features.statistics.collapse import (
    equiangularity,
    equinormality,
    self_duality,
    variability_of_covariance,
)
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments, Moments
from ood_scores.registry import unknown
from ood_scores.runtime import default_torch_state

if TYPE_CHECKING:
    import pandas as pd

Duality = Literal["frobenius", "columns"]
Reference = Literal["prediction", "label"]


@dataclass(frozen=True)
class Collapse:
    """Measures of neural collapse; each is 0 if collapse is complete.

    Attributes:
        nc1: Variability within classes, relative to the variability between classes.
        en_means: Inequality of the norms of the centered class means (NC2, equinormality).
        en_classifier: Inequality of the norms of the classifier's weights.
        ea_means: Deviation of the angles between the centered class means from equal, maximal angles (NC2,
            equiangularity).
        ea_classifier: Deviation of the angles between the classifier's weights.
        nc3: Distance of the weights from the centered class means, up to a scale (self-duality).
        nc4: Share of rows whose nearest class mean is not that of the predicted class.
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
"""Titles of the measures by name."""


@default_torch_state()
def neural_collapse(
    feats: Sets,
    *,
    normalize: bool = False,
    nc1_over_classes: bool = True,
    nc3_norm: Duality = "frobenius",
    nc4_against: Reference = "prediction",
) -> Collapse:
    """Compute the seven measures of neural collapse of a labeled set with a head.

    The set is usually the training set, extracted in eval mode. There are C classes. ``M`` ``[C, D]`` are the class
    means minus ``mu_G``, the unweighted mean of the class means; ``W`` ``[C, D]`` are the weights of the head; ``S_W``
    ``[D, D]`` is the covariance around the class means over all N rows; and ``S_B = M^T M / C``::

        nc1 = tr(S_W S_B^+) / C
        en  = std_c ||v_c|| / mean_c ||v_c||                               v = M or W, std unbiased
        ea  = sum_{i != j} |cos(v_i, v_j) + 1/(C-1)| / (C (C-1))           v = M or W
        nc3 = || W / ||W||_F  -  M / ||M||_F ||_F^2
        nc4 = share of rows with argmin_c ||z - mu_c|| != argmax_c logits_c

    The rank of ``S_B`` is at most C-1, so its pseudo-inverse is truncated there. It is also truncated where a singular
    value of ``M`` is below the rounding error of the largest, because the inverse would be noise. A row that is equally
    close to two class means belongs to the first. A class mean or weight of zero has a cosine of 0 with all others.

    The features are read twice: for the moments, which are kept with the set, and for the nearest means. Logits are
    those of the set, or computed with the head if the set has none.

    Args:
        feats: Set with features, labels, a head, and usually logits.
        normalize: Whether to scale feature vectors to unit length first. This is the input of the classifier in a model
            trained with L2 normalization, which extraction does not keep.
        nc1_over_classes: Whether to divide by C, as in the text of Papyan et al. and Haas et al.; the code of Papyan et
            al. does not.
        nc3_norm: ``"frobenius"`` scales the whole matrices, as Papyan et al. define it; ``"columns"`` scales each
            ``w_c`` and ``mu_c - mu_G`` to unit length, as in the text of Haas et al. 2022 (Eq. 8).
        nc4_against: ``"prediction"`` compares the nearest class mean with the predicted class, as Papyan et al. define
            it; ``"label"`` compares it with the label, as in the text of Haas et al. 2022 (Eq. 9).

    Raises:
        BadLabels: if there are no labels, they are not class indices, or a class has no rows.
        MissingInput: if there is no head.
        BadInput: if there is only one class, all class means are equal, or the weight of the head is all zeros.
        NotFinite: if features or logits contain NaN or infinite values.
        UnknownName: if there is no such ``nc3_norm`` or ``nc4_against``.

    Source: Papyan, Han & Donoho 2020, "Prevalence of neural collapse during the terminal phase of deep learning
    training", and their code; Haas, Yolland & Rabus 2022, Eq. 4 to 9.
    """
    _known(nc3_norm, ("frobenius", "columns"))
    _known(nc4_against, ("prediction", "label"))
    feats = as_feature_set(feats)
    weight = _weight(feats)
    counts, class_means, scatter = _moments(feats, ClassMoments(normalize=normalize))
    _require_rows(counts)
    center = class_means.mean(dim=0)
    means = class_means - center
    _require_spread(means, class_means)
    nc1 = float(variability_of_covariance(scatter / len(feats), means))
    return Collapse(
        nc1=nc1 / len(means) if nc1_over_classes else nc1,
        en_means=float(equinormality(means)),
        en_classifier=float(equinormality(weight)),
        ea_means=float(equiangularity(means)),
        ea_classifier=float(equiangularity(weight)),
        nc3=float(self_duality(weight, means, columns=nc3_norm == "columns")),
        nc4=_disagreement(feats, normalize, center, means, nc4_against),
    )


@default_torch_state()
def singular_values(
    feats: Sets,
    others: Mapping[str, Sets] | None = None,
    *,
    name: str = "train",
    center: bool = False,
    per_row: bool = True,
) -> pd.DataFrame:
    """Compute the singular values of the features, and the extent of other sets in the same directions.

    With ``Z = U S V^T`` ``[N, D]`` the features of ``feats``, the value at rank k of a set with features ``X`` is
    ``||X v_k||``, which is the k-th singular value for ``Z`` itself. The values of other sets show how far they reach
    in directions that the training features hardly use. Values are computed from ``Z^T Z`` in a single pass, so values
    below 1e-8 of the largest are rounding errors.

    Args:
        feats: Set that determines the directions, usually the training set.
        others: More sets of the same model by name.
        name: Name of ``feats`` in the data frame.
        center: Whether to subtract the mean of ``feats`` from all sets. The paper decomposes the features themselves
            and finds as many large values as classes; for centered features there would be one less.
        per_row: Whether to divide by the square root of the number of rows, which makes sets of different sizes
            comparable. Otherwise, values are the singular values of the matrix.

    Returns:
        A tidy data frame with one row for each set and rank: ``set``, ``rank`` (1 to D, values descending), ``value``.

    Raises:
        BadInput: if another set is called ``name``.
        ShapeMismatch: if a set has a different number of features.
        NotFinite: if features contain NaN or infinite values.

    Source: Haas, Yolland & Rabus 2022, Appendix A.3, Fig. 6.
    """
    import pandas as pd

    feats = as_feature_set(feats)
    more = {each: as_feature_set(other) for each, other in (others or {}).items()}
    if name in more:
        raise BadInput(f"two sets are called {name!r}: pass another name= for the first set.")
    for other_name, other in more.items():
        if other.num_features != feats.num_features:
            raise ShapeMismatch(
                f"{other_name!r} has {other.num_features} features, {name!r} has {feats.num_features}: pass sets of "
                "the same model."
            )
    mean = _moments(feats, GlobalMoments())[1][0]
    origin = mean if center else torch.zeros_like(mean)
    directions = torch.linalg.eigh(_gram(feats, origin)).eigenvectors.flip(1)
    values = {each: _reach(_gram(of, origin), directions) for each, of in {name: feats, **more}.items()}
    if per_row:
        values = {each: of / len(more.get(each, feats)) ** 0.5 for each, of in values.items()}
    rank = np.arange(1, feats.num_features + 1)
    frames = [pd.DataFrame({"set": each, "rank": rank, "value": of.numpy()}) for each, of in values.items()]
    return pd.concat(frames, ignore_index=True)


def _known(name: str, there_are: Iterable[str]) -> None:
    if name not in there_are:
        raise unknown("there is no", name, there_are)


def _weight(feats: FeatureSet) -> Tensor:
    """Return the weight of the head, float64 ``[C, D]``; raise if it is not that of a trained classifier."""
    if feats.head is None:
        raise MissingInput("neural collapse needs a head, and this feature set has none: extract it.")
    weight = feats.head.weight.double().cpu()
    if not weight.any():
        raise BadInput("the weight of the head is all zeros: use a trained model.")
    return weight


def _require_rows(counts: Tensor) -> None:
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise BadLabels(
            f"{len(empty)} of {len(counts)} classes have no rows ({shown}), so they have no mean: pass a set with rows "
            "of all classes, such as the training set."
        )


def _require_spread(centered: Tensor, means: Tensor) -> None:
    """Raise if all class means are equal up to rounding, since they have no angles and no variance between them."""
    rounding = len(means) * torch.finfo(torch.float64).eps * means.abs().max()
    if centered.abs().max() <= rounding:
        raise BadInput("all class means are equal: pass the features that the head reads, with their labels.")


def _disagreement(feats: FeatureSet, normalize: bool, center: Tensor, means: Tensor, against: Reference) -> float:
    labels = feats.class_labels().cpu() if against == "label" else None
    half_squares = means.square().sum(dim=1) / 2
    wrong = 0
    for block in finite_blocks(feats, "features", *(() if labels is not None else ("logits",))):
        nearest = ((block.space("features", normalize) - center) @ means.T - half_squares).argmax(dim=1)
        expected = _predicted(block, feats) if labels is None else labels[block.start : block.start + len(block)]
        wrong += int((nearest != expected).sum())
    return wrong / len(feats)


def _predicted(block: Block, feats: FeatureSet) -> Tensor:
    return block.prediction() if feats.has("logits") else block.head(block.features).argmax(dim=1)


def finite_blocks(feats: FeatureSet, *only: str) -> Iterator[Block]:
    """Iterate over blocks on the CPU; raise NotFinite if a block contains NaN or infinite values."""
    for block in feats.blocks(device="cpu", only=only):
        block.require_finite()
        yield block


def _moments(feats: FeatureSet, wanted: ClassMoments | GlobalMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts, means and scatter on the CPU."""
    moments: Moments = collect(feats, [wanted])[wanted]
    return moments.counts.cpu(), moments.means.cpu(), moments.scatter.cpu()


def _gram(feats: FeatureSet, origin: Tensor) -> Tensor:
    """Return ``Z^T Z`` of the features minus ``origin``, float64 ``[D, D]``."""
    _, means, scatter = _moments(feats, GlobalMoments())
    shift = means[0] - origin
    return scatter + len(feats) * torch.outer(shift, shift)


def _reach(gram: Tensor, directions: Tensor) -> Tensor:
    """Return ``||Z v_k||`` for the columns ``v_k``."""
    return ((gram @ directions) * directions).sum(dim=0).clamp_min(0).sqrt()
