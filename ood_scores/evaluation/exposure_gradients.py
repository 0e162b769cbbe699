"""Gradients of outlier exposure at the classifier, separately for ID and OoD images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ood_scores.errors import BadInput, MissingInput, ShapeMismatch
from ood_scores.evaluation.neural_collapse import finite_blocks
from ood_scores.features import FeatureSet, Sets, as_feature_set
from ood_scores.runtime import default_torch_state

if TYPE_CHECKING:
    import pandas as pd


@default_torch_state()
def exposure_gradients(id: Sets, ood: Sets, *, weight: float = 0.5) -> pd.DataFrame:
    """Compute the gradients of outlier exposure with respect to the classifier's weights, by class.

    The loss is the cross-entropy of ID rows plus ``weight`` times the cross-entropy to the uniform distribution of OoD
    rows. With softmax outputs p, features z and labels y, the two parts of the gradient at the weights ``w_c`` are::

        g_id  = mean_i (p_ic - [y_i = c]) z_i            g_ood = weight  mean_j (p_jc - 1/C) z_j

    Args:
        id: Training set with features, logits and labels.
        ood: Auxiliary OoD images with features and logits of the same model.
        weight: Weight of the OoD term.

    Returns:
        A data frame with one row for each class: ``label``, ``rows`` (ID rows of the class), ``id_norm``, ``ood_norm``,
        and ``log_ratio``, the natural logarithm of ``id_norm / ood_norm``. Below 0, OoD images move the weights more.

    Departures: the paper measures batches during training; here the means run over all rows, with the features of a
    checkpoint in eval mode. Averages over all rows lack the noise of a batch, so both norms are smaller.

    Raises:
        BadInput: if ``weight`` is not positive.
        MissingInput: if a set has no logits.
        BadLabels: if the ID set has no labels, or they are not class indices.
        ShapeMismatch: if the sets differ in the number of features or classes.
        NotFinite: if features or logits contain NaN or infinite values.

    Source: Shin et al. 2024, "Representation norm amplification", Eq. 3 and Fig. 2(a).
    """
    import pandas as pd

    id, ood = as_feature_set(id), as_feature_set(ood)
    if not weight > 0:
        raise BadInput(f"weight must be positive, got {weight}.")
    for feats in (id, ood):
        if not feats.has("logits"):
            raise MissingInput("the gradients need logits, and a feature set has none: extract them.")
    shapes = {(feats.num_features, feats.num_classes) for feats in (id, ood)}
    if len(shapes) > 1:
        raise ShapeMismatch(f"the sets have (features, classes) = {sorted(map(str, shapes))}: pass sets of one model.")
    labels = id.class_labels().cpu()
    classes = int(id.num_classes or 0)
    id_norm = _mean_gradient(id, torch.nn.functional.one_hot(labels, classes).double()).norm(dim=1)
    ood_norm = weight * _mean_gradient(ood, torch.full((len(ood), classes), 1 / classes).double()).norm(dim=1)
    return pd.DataFrame(
        {
            "label": range(classes),
            "rows": torch.bincount(labels, minlength=classes).numpy(),
            "id_norm": id_norm.numpy(),
            "ood_norm": ood_norm.numpy(),
            "log_ratio": (id_norm / ood_norm).log().numpy(),
        }
    )


def _mean_gradient(feats: FeatureSet, targets: Tensor) -> Tensor:
    """Return ``mean_i (p_i - t_i) z_i^T``, float64 ``[C, D]``, for targets ``[N, C]``."""
    total = torch.zeros(targets.shape[1], feats.num_features, dtype=torch.float64)
    for block in finite_blocks(feats, "features", "logits"):
        here = slice(block.start, block.start + len(block))
        total += (torch.softmax(block.logits64(), dim=1) - targets[here]).T @ block.space("features")
    return total / len(feats)
