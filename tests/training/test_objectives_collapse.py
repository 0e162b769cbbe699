"""The neural collapse loss compared with NumPy, and its value at collapse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ood_scores.errors import BadLabels
from ood_scores.training.objectives.collapse import NCLoss, collapse_terms, nc_loss

Array = NDArray[np.float64]


def simplex(classes: int, width: int, scale: float = 3.0) -> Tensor:
    """Return the vertices ``[C, D]`` of a randomly rotated simplex equiangular tight frame."""
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q[:classes]
    return scale * (torch.eye(classes).double() - 1 / classes) @ turn


def collapsed(classes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return collapsed features, a self-dual classifier, and labels; the mean of the features is not 0."""
    torch.manual_seed(0)
    vertices = simplex(classes, width)
    labels = torch.arange(classes).repeat(4)
    return vertices[labels] + torch.randn(width).double(), 0.7 * vertices, labels


def scattered(classes: int = 4, width: int = 6, rows: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (rows - classes,))])
    means = 2 * torch.randn(classes, width).double()
    return means[labels] + torch.randn(rows, width).double(), torch.randn(classes, width).double(), labels


def numpy_terms(z: Array, w: Array, y: NDArray[np.int64], columns: bool) -> list[float]:
    """Compute the definitions literally, with D x D covariances and a pseudo-inverse truncated at rank C-1."""
    classes = len(w)
    mu = np.stack([z[y == c].mean(axis=0) for c in range(classes)])
    m = mu - mu.mean(axis=0)
    within = (z - mu[y]).T @ (z - mu[y]) / len(z)
    values, vectors = np.linalg.eigh(m.T @ m / classes)
    values, vectors = values[::-1][: classes - 1], vectors[:, ::-1][:, : classes - 1]
    nc1 = np.trace(within @ (vectors / values) @ vectors.T) / classes

    def en(rows: Array) -> float:
        lengths = np.linalg.norm(rows, axis=1)
        return float(lengths.std(ddof=1) / lengths.mean())

    def ea(rows: Array) -> float:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs = [abs(unit[i] @ unit[j] + 1 / (classes - 1)) for i in range(classes) for j in range(classes) if i != j]
        return float(np.mean(pairs))

    def scaled(rows: Array) -> Array:
        return rows / (np.linalg.norm(rows, axis=1, keepdims=True) if columns else np.linalg.norm(rows))

    return [float(nc1), en(m), en(w), ea(m), ea(w), float(((scaled(w) - scaled(m)) ** 2).sum())]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("classes", "width"), [(4, 6), (2, 5), (6, 6)])
def test_collapse_terms_match_their_definitions(classes: int, width: int, columns: bool) -> None:
    z, w, y = scattered(classes, width)
    expected = numpy_terms(z.numpy(), w.numpy(), y.numpy(), columns)
    assert [term.item() for term in collapse_terms(z, w, y, columns)] == pytest.approx(expected, rel=1e-9)
    assert nc_loss(z, w, y, columns).item() == pytest.approx(sum(expected), rel=1e-9)


def test_nc_loss_objective_reads_features_and_weight() -> None:
    z, w, y = scattered()
    head = nn.Linear(6, 4).double()
    head.weight.data = w
    assert NCLoss()(z, head, y).item() == nc_loss(z, w, y).item()
    assert NCLoss(normalize_columns=True)(z, head, y).item() == nc_loss(z, w, y, normalize_columns=True).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("classes", "width"), [(2, 3), (5, 5), (10, 64)])
def test_all_collapse_terms_are_zero_at_collapse(classes: int, width: int, dtype: torch.dtype) -> None:
    z, w, y = collapsed(classes, width)
    z, w = z.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    terms = collapse_terms(z, w, y)
    assert max(term.item() for term in terms) < 100 * torch.finfo(dtype).eps
    torch.stack(terms).sum().backward()
    assert z.grad is not None
    assert w.grad is not None
    assert z.grad.isfinite().all()
    assert w.grad.isfinite().all()


def test_collapse_terms_stay_zero_when_classes_are_missing_from_the_batch() -> None:
    z, w, y = collapsed(6, 8)
    seen = (y != 2) & (y != 5)
    assert max(term.item() for term in collapse_terms(z[seen], w, y[seen])) < 1e-13


def test_class_with_one_sample_has_no_scatter() -> None:
    z, w, y = scattered()
    rows = torch.cat([(y != 3).nonzero()[:, 0], (y == 3).nonzero()[:1, 0]])
    expected = numpy_terms(z[rows].numpy(), w.numpy(), y[rows].numpy(), columns=False)
    assert [term.item() for term in collapse_terms(z[rows], w, y[rows])] == pytest.approx(expected, rel=1e-9)


def test_nc1_with_fewer_features_than_classes() -> None:
    z, w, y = scattered(classes=6, width=3)
    mu = np.stack([z.numpy()[y.numpy() == c].mean(axis=0) for c in range(6)])
    m, d = mu - mu.mean(axis=0), z.numpy() - mu[y.numpy()]
    expected = np.trace(d.T @ d / len(d) @ np.linalg.inv(m.T @ m / 6)) / 6
    assert collapse_terms(z, w, y).nc1.item() == pytest.approx(expected, rel=1e-9)


def test_nc_loss_in_single_precision_is_close_to_double() -> None:
    z, w, y = scattered(classes=10, width=64, rows=200)
    single = nc_loss(z.float(), w.float(), y)
    assert single.item() == pytest.approx(nc_loss(z, w, y).item(), rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert nc_loss(z.float(), w.float(), y).item() == single.item()


@pytest.mark.parametrize("columns", [False, True])
def test_gradients_of_nc_loss(columns: bool) -> None:
    z, w, y = scattered(rows=12)
    assert torch.autograd.gradcheck(
        lambda features, weight: nc_loss(features, weight, y, columns), (z.requires_grad_(), w.requires_grad_())
    )


def test_nc_loss_refuses_a_batch_of_one_class() -> None:
    z, w, _ = scattered()
    with pytest.raises(BadLabels, match="the batch has 1"):
        nc_loss(z, w, torch.zeros(len(z), dtype=torch.int64))
