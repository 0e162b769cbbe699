"""Features that differ by little compared with their length: float32 loses nothing that float64 keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ood_scores import FeatureSet, Head, create_scorer
from ood_scores.scorers.one_pass import fit_all, score_all

CLASSES, WIDTH = 6, 16


def features(rows: int, seed: int, spread: float, offset: float = 0.0, length: float = 5.0) -> Tensor:
    """Rows around class means, float32: ``spread`` is their standard deviation around these."""
    means = length * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return means[labels(rows)] + spread * noise + offset


def labels(rows: int) -> Tensor:
    return torch.arange(rows) % CLASSES


def in_both_precisions(name: str, fit: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of the rows, which are float32, and of the same rows in float64."""
    head = Head(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(3)), torch.zeros(CLASSES))
    native, double = (
        create_scorer(name)
        .fit(FeatureSet(fit.to(dtype), labels=labels(len(fit)), head=head))
        .score(FeatureSet(rows.to(dtype), head=head))
        for dtype in (torch.float32, torch.float64)
    )
    return native, double


@pytest.mark.parametrize(
    "name", ["mahalanobis", "mahalanobis_pp", "relative_mahalanobis", "wdiscood", "ctm", "knn", "lid", "pnml"]
)
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_collapsed_classes(name: str, spread: float) -> None:
    native, double = in_both_precisions(name, features(600, 0, spread), features(200, 1, 1.3 * spread))
    torch.testing.assert_close(native, double, rtol=0, atol=2e-3 * float(double.std()))


@pytest.mark.parametrize("name", ["mahalanobis", "ctm", "knn", "lid", "pnml"])
@pytest.mark.parametrize("offset", [300.0, 3000.0])
def test_a_common_offset(name: str, offset: float) -> None:
    fit, rows = features(600, 0, 0.5, offset, 1.0), features(200, 1, 1.0, offset, 1.0)
    native, double = in_both_precisions(name, fit, rows)
    torch.testing.assert_close(native, double, rtol=0, atol=2e-3 * float(double.std()))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_neighbors_are_exact_alone_and_beside_others(offset: float) -> None:
    fit, rows = features(900, 0, 0.01, offset), features(100, 1, 0.011, offset)
    bank = FeatureSet(fit, labels=labels(len(fit)))
    together = [create_scorer("knn", k=20), create_scorer("lid"), create_scorer("dknn", k=40)]
    fit_all(together, bank)
    _, lid, dknn = score_all(together, FeatureSet(rows))

    def distances(left: Tensor, right: Tensor) -> Tensor:
        return torch.cdist(left.double(), right.double(), compute_mode="donot_use_mm_for_euclid_dist")

    logs = distances(rows, fit).sort(dim=1).values[:, :20].log()
    torch.testing.assert_close(lid, -1 / (logs[:, -1:] - logs).mean(dim=1), rtol=1e-9, atol=0)
    directions = [torch.nn.functional.normalize(each.double()).float() for each in (rows, fit)]
    nearest = distances(*directions).argsort(dim=1)[:, :40]
    shares = torch.nn.functional.one_hot(labels(len(fit))[nearest]).double().mean(dim=1).amax(dim=1)
    torch.testing.assert_close(dknn, shares, rtol=0, atol=0.026)  # one neighbor of 40, which rounding may exchange
    for scorer, expected in ((together[1], lid), (together[2], dknn)):
        assert scorer.score(FeatureSet(rows)).equal(expected)
