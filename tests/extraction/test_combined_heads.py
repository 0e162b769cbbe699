"""Logits that are a weighted sum: of the outputs of several layers, or of one layer for several views of an input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ood_scores
from ood_scores.errors import HeadNotFound

ROWS, CLASSES = 12, 5
IMAGES = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def backbone(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


class Net(nn.Module):
    """Two branches with a head each, and an auxiliary head whose outputs are not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = backbone(4), backbone(3)
        self.auxiliary = nn.Linear(16, CLASSES)
        self.first, self.second = nn.Linear(16, CLASSES), nn.Linear(12, CLASSES, bias=False)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.auxiliary(self.one(images).tanh())
        return self.first(self.one(images)), self.second(self.other(images))


class Weighted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.7))

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.outputs(images)
        return self.share * first + (1 - self.share) * second


class Gated(Net):
    def forward(self, images: Tensor) -> Tensor:
        first, second = self.outputs(images)
        share = images.mean(dim=(1, 2, 3)).sigmoid()[:, None]
        return share * first + (1 - share) * second


def extract(model: nn.Module, size: int = 5) -> ood_scores.FeatureSet:
    return ood_scores.extract(model.eval(), IMAGES.split(size), progress=False)


@pytest.mark.parametrize("size", [1, 5])
def test_a_weighted_mean_of_two_heads(size: int) -> None:
    model = Weighted()
    feats = extract(model, size)
    assert feats.head is not None
    with torch.no_grad():
        torch.testing.assert_close(feats.logits, model(IMAGES))
        torch.testing.assert_close(feats.features, torch.cat([model.one(IMAGES), model.other(IMAGES)], dim=1))
        weight = torch.cat([0.7 * model.first.weight, 0.3 * model.second.weight], dim=1)
        torch.testing.assert_close(feats.head.weight, weight)
        torch.testing.assert_close(feats.head.bias, 0.7 * model.first.bias)
    torch.testing.assert_close(feats.head(feats.features), feats.logits)
    assert feats.provenance is not None
    assert feats.provenance.head_modules == "first + second"


def test_weights_that_depend_on_the_input_are_no_head() -> None:
    with pytest.raises(HeadNotFound, match=r"nor a weighted mean of several; modules with 5 outputs: .*first"):
        extract(Gated())
    with pytest.raises(HeadNotFound, match="nor a weighted mean of several"):
        extract(Gated(), size=1)


class Augmented(nn.Module):
    """A model that runs on several views of each image and combines their logits."""

    def __init__(self, combine: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(backbone(4), nn.Linear(16, CLASSES))
        self.combine = combine

    def forward(self, images: Tensor) -> Tensor:
        return self.combine(self.model, images)


def views(images: Tensor) -> list[Tensor]:
    return [images, images.flip(-1), images[..., 1:, 1:]]


def in_calls(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.stack([model(view) for view in views(images)]).mean(dim=0)


def in_one_batch(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return model(torch.cat(views(images)[:2])).unflatten(0, (2, -1)).mean(dim=0)


def ten_crop_style(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    crops = torch.stack(views(images)[:2], dim=1)
    return model(crops.flatten(0, 1)).view(len(images), 2, -1).mean(dim=1)


def weighted(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return sum(weight * model(view) for weight, view in zip((0.5, 0.3, 0.2), views(images), strict=True))  # type: ignore[return-value]


def summed(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return model(images) + model(images.flip(-1))


def probabilities(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.stack([model(view).softmax(dim=1) for view in views(images)]).mean(dim=0).log()


FORMS = {
    in_calls: ([1 / 3, 1 / 3, 1 / 3], 1),
    in_one_batch: ([0.5, 0.5], 1),
    ten_crop_style: ([0.5, 0.5], 1),
    weighted: ([0.5, 0.3, 0.2], 1),
    summed: ([0.5, 0.5], 2),
}
"""The weights of the views in the features, and the factor of the weight and the bias of the head."""


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("combine", FORMS)
def test_features_of_test_time_augmentation_are_means_over_views(combine: Callable[..., Tensor], size: int) -> None:
    model, (weights, factor) = Augmented(combine), FORMS[combine]
    feats = extract(model, size)
    with torch.no_grad():
        torch.testing.assert_close(feats.logits, model(IMAGES))
        of_views = [weight * model.model[0](view) for weight, view in zip(weights, views(IMAGES), strict=False)]
        torch.testing.assert_close(feats.features, torch.stack(of_views).sum(dim=0))
        assert feats.head is not None
        weight, bias = model.model[1].parameters()
        torch.testing.assert_close(feats.head.weight, factor * weight)
        torch.testing.assert_close(feats.head.bias, factor * bias)


def test_a_detector_of_test_time_augmentation(tmp_path: Path) -> None:
    model = Augmented(in_calls).eval()
    feats = ood_scores.extract(model, [IMAGES], tmp_path / "c.h5", progress=False)
    assert feats.provenance is not None
    assert feats.provenance.head_modules == "model.1 (sum of 3 views)"
    detector = ood_scores.calibrate("gradnorm", model, id=feats)
    torch.testing.assert_close(
        torch.from_numpy(detector.predict(IMAGES[:5]).score), ood_scores.score("gradnorm", feats)[:5]
    )


def test_averaged_probabilities_are_refused() -> None:
    message = (
        r"model\.1 runs 3 times for each input, as with test-time augmentation, .*average logits, not probabilities"
    )
    with pytest.raises(HeadNotFound, match=message):
        extract(Augmented(probabilities))
    kept = ood_scores.extract(Augmented(probabilities).eval(), [IMAGES], head=False, progress=False)
    assert kept.head is None
    with torch.no_grad():
        torch.testing.assert_close(kept.logits, Augmented(probabilities)(IMAGES))
