"""Sets that are not compared: of other weights, members in another order, poolings, heads, or parameters of probes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ood_scores
from ood_scores import FeatureSet, Head
from ood_scores.errors import OtherModel

ROWS, CLASSES = 60, 4

pytestmark = pytest.mark.filterwarnings("ignore:.*near chance")


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def extracted(model: nn.Module, images: int, **options: Any) -> FeatureSet:
    inputs = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(images))
    labels = torch.arange(ROWS) % CLASSES
    return ood_scores.extract(model, [(inputs, labels)], name=f"images {images}", progress=False, **options)


def members(images: int) -> list[FeatureSet]:
    return [extracted(network(seed), images) for seed in (0, 1, 2)]


def test_members_of_an_ensemble_are_those_that_were_fitted_in_their_order() -> None:
    a, b, _ = members(0)
    scorer = ood_scores.create_scorer("mahalanobis").fit([a, b])
    one, two, three = members(1)
    whole = FeatureSet(torch.cat([one.features, two.features], dim=1))
    assert torch.equal(scorer.score([one, two]), scorer.score(whole))
    with pytest.raises(OtherModel, match="so list them in the same order"):
        scorer.score([two, one])
    with pytest.raises(OtherModel, match=r"Sequential \+ Sequential with weights .*so extract one of them again"):
        scorer.score([one, three])
    with pytest.raises(OtherModel):
        ood_scores.score("mahalanobis", [two], fit=[a])
    with pytest.raises(OtherModel, match="the OoD set 'far'"):
        ood_scores.evaluate(["energy"], id=[a, b], ood={"far": [two, one]}, progress=False)
    assert ood_scores.score("mahalanobis", [one], fit=a).equal(ood_scores.score("mahalanobis", one, fit=a))


def test_a_joint_set_on_disk_keeps_its_members(tmp_path: Any) -> None:
    first, second, _ = members(0)
    ood_scores.ensemble([first, second]).save(tmp_path / "joint.h5")
    joint = ood_scores.load(tmp_path / "joint.h5")
    scorer = ood_scores.create_scorer("knn").fit(joint)
    assert scorer.score([first, second]).shape == (ROWS,)
    with pytest.raises(OtherModel):
        scorer.score([second, first])


class Encoder(nn.Module):
    """Maps an image to tokens ``[N, 10, 8]``."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.conv(inputs[:, None]).transpose(1, 2)


def test_features_of_another_pooling_are_refused() -> None:
    model = Encoder()
    mean, other = extracted(model, 0, pool="mean"), extracted(model, 1, pool="cls")
    assert ood_scores.score("knn", extracted(model, 1, pool="mean"), fit=mean, k=3).shape == (ROWS,)
    with pytest.raises(OtherModel, match=r"the pooling of this set is 'cls', .* 'mean': extract one of them again"):
        ood_scores.score("knn", other, fit=mean, k=3)
    with pytest.raises(OtherModel, match="the pooling of the OoD set 'far' is 'cls'"):
        ood_scores.evaluate(["feature_norm"], id=mean, ood={"far": other}, progress=False)


def test_sets_with_other_heads_are_not_compared() -> None:
    model = network(0)
    inside, outside = extracted(model, 0), extracted(model, 1)
    probe = Head(torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(CLASSES))
    with pytest.raises(OtherModel, match="the OoD set 'far' has another head than the ID set"):
        ood_scores.evaluate(["energy"], id=inside, ood={"far": outside.with_head(probe)}, progress=False)
    half = Head(probe.weight.half(), probe.bias.half())
    for head in (probe, half):
        far = {"far": outside.with_head(head)}
        assert len(ood_scores.evaluate(["energy"], id=inside.with_head(probe), ood=far, progress=False)) == 1


def test_extras_of_probes_with_other_parameters_are_not_compared() -> None:
    model = network(0)
    inside = extracted(model, 0, probes=["odin:epsilon=0"])
    outside = extracted(model, 1, probes=["odin:epsilon=0.5"])
    with pytest.raises(
        OtherModel, match=r"'odin' of the OoD set 'far' comes from ODIN\(.*epsilon=0.5.*ID set from ODIN\("
    ):
        ood_scores.evaluate(["odin"], id=inside, ood={"far": outside}, progress=False)
    assert len(ood_scores.evaluate(["energy"], id=inside, ood={"far": outside}, progress=False)) == 1


class Scaled(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random inputs, multiplied by a transform that has a description."""

    def __init__(self, seed: int, transform: nn.Module) -> None:
        self.inputs = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(seed))
        self.transform = transform

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.inputs[row]), row % CLASSES


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


def test_another_preprocessing_is_named() -> None:
    model = network(0)

    def made(seed: int, factor: float) -> FeatureSet:
        loader = torch.utils.data.DataLoader(Scaled(seed, Scale(factor)), batch_size=20)
        return ood_scores.extract(model, loader, progress=False)

    inside, same, other = made(0, 1.0), made(1, 1.0), made(2, 3.0)
    said = r"was preprocessed in another way, Scale\(3.0\), than the ID set, Scale\(1.0\)"
    with pytest.warns(UserWarning, match=f"the OoD set 'far' {said}"):
        table = ood_scores.evaluate(["energy"], id=inside, ood={"near": same, "far": other}, progress=False)
    assert sum("preprocessed" in text for text in table.attrs["warnings"]) == 1
    with pytest.warns(UserWarning, match=f"the fit set {said}"):
        ood_scores.evaluate(["knn"], id=inside, ood={"near": same}, fit=other, progress=False)
    with pytest.warns(
        UserWarning, match=r"the set to score was preprocessed in another way, Scale\(1.0\), than the fit"
    ):
        ood_scores.score("knn", inside, fit=other)
    with pytest.warns(UserWarning, match=r"the ID set was preprocessed in another way, Scale\(1.0\), than the fit set"):
        ood_scores.calibrate("knn", model, id=inside, fit=other)
