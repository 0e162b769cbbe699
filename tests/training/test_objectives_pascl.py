"""Partial and asymmetric contrastive learning: the loss, the tail classes, and the second stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ood_scores.models.networks  # noqa: F401  (registers the networks)
from ood_scores.errors import HeadNotFound, ShapeMismatch
from ood_scores.training.objectives.classification import CrossEntropy, LogitAdjustment
from ood_scores.training.objectives.contrastive import (
    PASCL,
    partial_asymmetric_contrast,
    second_stage_parameters,
    tail_classes,
)
from ood_scores.training.objectives.exposure import outlier_exposure

COUNTS = [70, 20, 9, 4, 1]


def unit_rows(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def contrast_by_loops(u: Tensor, labels: list[int], o: Tensor, temperature: float) -> float:
    losses = []
    for i in range(len(u)):
        others = [*(u[k] for k in range(len(u)) if k != i), *o]
        total = sum(np.exp(float(u[i] @ other) / temperature) for other in others)
        positives = [j for j in range(len(u)) if j != i and labels[j] == labels[i]]
        terms = [-np.log(np.exp(float(u[i] @ u[j]) / temperature) / total) for j in positives]
        losses.append(np.mean(terms) if terms else 0.0)
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.parametrize("labels", [[1, 2, 2, 1, 2, 2], [1, 1, 1, 1, 1, 1], [0, 1, 2, 2, 2, 1]])
def test_contrast_matches_explicit_loops(labels: list[int], temperature: float) -> None:
    u, o = unit_rows(6, 0), unit_rows(4, 1)
    expected = contrast_by_loops(u, labels, o, temperature)
    found = partial_asymmetric_contrast(u, torch.tensor(labels), o, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_contrast_of_a_row_alone_in_its_class_is_zero() -> None:
    u, o = unit_rows(1, 0), unit_rows(4, 1)
    assert partial_asymmetric_contrast(u, torch.tensor([3]), o).item() == 0


def test_contrast_without_tail_images_is_zero_with_a_gradient() -> None:
    o = unit_rows(4, 1).requires_grad_()
    loss = partial_asymmetric_contrast(unit_rows(0, 0), torch.zeros(0, dtype=torch.int64), o)
    loss.backward()
    assert loss.item() == 0
    assert o.grad is not None
    assert not o.grad.any()


def test_gradients_of_the_contrast() -> None:
    labels = torch.tensor([1, 2, 2, 1, 2])
    assert torch.autograd.gradcheck(
        lambda u, o: partial_asymmetric_contrast(u, labels, o, 0.2),
        (unit_rows(5, 0).requires_grad_(), unit_rows(4, 1).requires_grad_()),
    )


@pytest.mark.parametrize(
    ("counts", "share", "tail"),
    [
        (range(10, 0, -1), 0.4, [6, 7, 8, 9]),
        (range(1, 11), 0.4, [0, 1, 2, 3]),
        ([5, 5, 5, 5, 5], 0.4, [3, 4]),
        ([3, 9, 1], 0.4, [2]),
        ([3, 9, 1], 1.0, [0, 1, 2]),
        ([3, 9, 1], 0.0, []),
    ],
)
def test_tail_classes_are_the_smallest_classes(counts: list[int], share: float, tail: list[int]) -> None:
    assert tail_classes(torch.tensor(list(counts)), share).nonzero()[:, 0].tolist() == tail


# ---- the objective


def example() -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(4)
    features, ood = torch.randn(8, 6).double() * 3, torch.randn(3, 6).double() * 3
    return features, nn.Linear(6, 5).double(), torch.tensor([0, 3, 4, 3]).repeat(2), ood


def test_pascl_is_the_sum_of_its_terms() -> None:
    features, head, labels, ood = example()
    objective = PASCL(COUNTS, 6, contrast_weight=0.3, temperature=0.2).double()
    in_tail = torch.tensor([1, 2, 3, 5, 6, 7])
    u, o = (F.normalize(objective.projector(rows), dim=1).detach() for rows in (features[in_tail], ood))
    expected = CrossEntropy()(features, head, labels).item() + 0.5 * outlier_exposure(head(ood)).item()
    expected += 0.3 * contrast_by_loops(u, labels[in_tail].tolist(), o, 0.2)
    assert objective(features, head, labels, ood).item() == pytest.approx(expected, rel=1e-12)


def test_pascl_without_tail_images_is_cross_entropy_and_exposure() -> None:
    features, head, _, ood = example()
    labels = torch.tensor([0, 1, 2, 0]).repeat(2)
    expected = CrossEntropy()(features, head, labels) + 0.5 * outlier_exposure(head(ood))
    objective = PASCL(COUNTS, 6).double()
    loss = objective(features, head, labels, ood)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_gradients_of_pascl() -> None:
    features, head, labels, ood = example()
    objective = PASCL(COUNTS, 6, temperature=0.5, width=4).double()
    assert torch.autograd.gradcheck(
        lambda z, o: objective(z, head, labels, o), (features.requires_grad_(), ood.requires_grad_())
    )


def test_pascl_refuses_counts_of_other_classes() -> None:
    features, head, labels, ood = example()
    with pytest.raises(ShapeMismatch, match="4 classes, but the head has 5"):
        PASCL(COUNTS[:4], 6).double()(features, head, labels, ood)


# ---- the second stage


def test_second_stage_tunes_batchnorm_and_classifier() -> None:
    model = timm.create_model("cifar_resnet20")
    tuned = {id(parameter) for parameter in second_stage_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in tuned}
    assert names == {name for name, _ in model.named_parameters() if "bn" in name or "linear" in name}
    assert len(second_stage_parameters(model)) == len(names) == 2 * 19 + 2


def test_second_stage_changes_nothing_else() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("cifar_resnet20", num_classes=5).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(second_stage_parameters(model), 5e-4)
    features = model.forward_head(model.forward_features(torch.randn(4, 3, 16, 16)), pre_logits=True)
    LogitAdjustment(COUNTS)(features, model.get_classifier(), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "bn" in name or "linear" in name}


def test_second_stage_skips_batchnorm_without_parameters() -> None:
    model: Any = timm.create_model("rna_resnet18", num_classes=5)
    found = second_stage_parameters(model)
    assert model.fc.weight is found[-2]
    assert len(found) < 2 * sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_second_stage_needs_a_linear_classifier() -> None:
    with pytest.raises(HeadNotFound):
        second_stage_parameters(timm.create_model("cifar_resnet20", num_classes=0))
