"""The ratio of the gaps to the running means of the last BatchNorm, against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores import FeatureSet
from ood_scores.benchmark.measures import MEASURES, MeasuredSets
from ood_scores.errors import EmptyInput, MissingInput, ProbeDoesNotApply
from ood_scores.evaluation.batch_norm_gaps import batch_norm_gap_ratio

GENERATOR = torch.Generator().manual_seed(3)


class Network(nn.Module):
    """Two BatchNorm layers, the second with running means of its own, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.last = nn.BatchNorm2d(5, affine=False)  # named first, and run last
            self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
            self.fc = nn.Linear(5, 3)
            nn.init.normal_(self.last.running_mean)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.last(self.conv(images)).relu().mean(dim=(2, 3)))


def images(rows: int, shift: float) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=GENERATOR) + shift


def extracted(model: nn.Module, inputs: Tensor, batch: int = 4) -> FeatureSet:
    loader = DataLoader(TensorDataset(inputs), batch)
    return ood_scores.extract(model, loader, probes=["batch_norm_gap"], device="cpu", progress=False)


def test_gaps_and_their_ratio_are_those_of_the_formula() -> None:
    model = Network().eval()
    inputs = [images(10, 0.0), images(6, 1.0), images(9, -0.5)]
    sets = [extracted(model, each) for each in inputs]
    assert model.last.running_mean is not None
    mean = model.last.running_mean.double().numpy()
    with torch.no_grad():
        before = [model.conv(each).double().mean(dim=(2, 3)).numpy() for each in inputs]
    for feats, expected in zip(sets, before, strict=True):
        np.testing.assert_allclose(feats.extras["batch_norm_gap"], expected - mean, atol=1e-5)
    outside = (before[1].mean(axis=0) + before[2].mean(axis=0)) / 2
    expected = np.linalg.norm(before[0].mean(axis=0) - mean) / np.linalg.norm(outside - mean)
    assert batch_norm_gap_ratio(sets[0], sets[1:]) == pytest.approx(expected, rel=1e-5)
    figures = MEASURES["batch_norm_gaps"].figures(MeasuredSets(sets[0], ood={"a": sets[1], "b": sets[2]}))
    assert figures == {"gap_ratio": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("outside", [4, 16])
def test_running_means_of_a_mixed_batch_have_the_ratio_of_the_numbers_of_images(outside: int) -> None:
    model = Network()
    id, ood = images(8, 0.0), images(outside, 1.0)
    with torch.no_grad():
        maps = model.eval().conv(torch.cat([id, ood]))
        batch_norm(maps, model.last.running_mean, model.last.running_var, training=True, momentum=1.0)
    ratio = batch_norm_gap_ratio(extracted(model, id), [extracted(model, ood)])
    assert ratio == pytest.approx(outside / 8, rel=1e-4)


def test_gaps_of_vectors() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    inputs = torch.randn(7, 4, generator=GENERATOR)
    with torch.no_grad():
        expected = model[0](inputs) - model[1].running_mean
    torch.testing.assert_close(extracted(model, inputs).extras["batch_norm_gap"], expected)


def test_gaps_need_a_batch_norm_and_the_probe() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    with pytest.raises(ProbeDoesNotApply, match="no BatchNorm module with running statistics"):
        extracted(model, torch.randn(7, 4, generator=GENERATOR))
    plain = FeatureSet(torch.zeros(3, 4))
    with pytest.raises(MissingInput, match=r"extract\(\.\.\., probes=\['batch_norm_gap'\]\)"):
        batch_norm_gap_ratio(plain, [plain])
    with pytest.raises(EmptyInput, match="there is no OoD set"):
        batch_norm_gap_ratio(plain, [])
    with pytest.raises(MissingInput, match=r'probes = \["batch_norm_gap"\]'):
        MEASURES["batch_norm_gaps"].figures(MeasuredSets(plain, ood={"a": plain}))
