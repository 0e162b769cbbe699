"""Gradients of outlier exposure at the classifier, against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_features import random_set
from torch.nn import functional as F

from ood_scores import FeatureSet
from ood_scores.errors import BadInput, MissingInput, ShapeMismatch
from ood_scores.evaluation.exposure_gradients import exposure_gradients
from ood_scores.training.objectives.exposure import outlier_exposure


def test_gradients_are_those_of_autograd() -> None:
    id, ood = random_set(4, 6, rows=50, seed=1), random_set(4, 6, rows=30, seed=2)
    table = exposure_gradients(id, ood, weight=0.3)
    norms = []
    for feats, loss in ((id, None), (ood, outlier_exposure)):
        head = feats.head
        assert head is not None
        weight = head.weight.double().requires_grad_()
        logits = torch.as_tensor(feats.features[:]).double() @ weight.T + head.bias.double()
        value = F.cross_entropy(logits, feats.class_labels()) if loss is None else 0.3 * loss(logits)
        norms.append(torch.autograd.grad(value, weight)[0].norm(dim=1).numpy())
    np.testing.assert_allclose(table["id_norm"], norms[0], rtol=1e-5)
    np.testing.assert_allclose(table["ood_norm"], norms[1], rtol=1e-5)
    np.testing.assert_allclose(table["log_ratio"], np.log(norms[0] / norms[1]), rtol=1e-4, atol=1e-6)
    assert table["rows"].tolist() == torch.bincount(id.class_labels(), minlength=4).tolist()


def test_gradients_need_logits_of_one_model_and_a_positive_weight() -> None:
    id = random_set(4, 6)
    with pytest.raises(BadInput, match="weight must be positive"):
        exposure_gradients(id, id, weight=0)
    with pytest.raises(MissingInput, match="need logits"):
        exposure_gradients(id, FeatureSet(torch.zeros(3, 6)))
    with pytest.raises(ShapeMismatch, match="pass sets of one model"):
        exposure_gradients(id, random_set(5, 6))
