"""Batches that people have: dictionaries, dropped batches, single images, and other types of numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores.errors import BadInput

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other)


def extract(loader: Any, model: nn.Module | None = None) -> ood_scores.FeatureSet:
    return ood_scores.extract(model or network(), loader, progress=False)


def test_batches_of_openood() -> None:
    feats = extract([{"data": X, "label": Y, "image_name": ["a"] * 24}])
    assert equal(feats.features, extract([X]).features)
    assert equal(feats.labels, Y)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_batch_whose_rows_were_all_dropped_has_no_rows(dropped: int) -> None:
    batches: list[Any] = [(X[:12], Y[:12]), (X[12:], Y[12:])]
    feats = extract([*batches[:dropped], None, *batches[dropped:]])
    assert equal(feats.labels, Y)


def test_dropped_rows_of_a_loader_that_promised_them_are_an_error() -> None:
    def collate(items: list[Any]) -> Any:
        return None if items[0][1] == 0 else (torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    with pytest.raises(BadInput, match="ended after 16 rows, but its length is 24"):
        extract(DataLoader(TensorDataset(X, torch.arange(24) // 8), batch_size=8, collate_fn=collate))


@pytest.mark.parametrize("labels", [Y, Y.tolist(), None], ids=["tensors", "numbers", "none"])
def test_single_images_are_an_error_that_names_the_loader(labels: Any) -> None:
    singles = list(X) if labels is None else list(zip(X, labels, strict=True))
    with pytest.raises(BadInput, match=r"single image.*pass DataLoader\(dataset, batch_size=\.\.\.\)"):
        extract(singles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("images", [torch.float32, torch.float64])
def test_images_are_converted_to_the_type_of_the_model(dtype: torch.dtype, images: torch.dtype) -> None:
    model = network().to(dtype)
    feats = extract([X.to(images)], model)
    assert equal(feats.logits, extract([X.to(dtype)], model).logits)
    detector = ood_scores.calibrate("energy", model, id=[X.to(images)])
    assert (detector.predict(X).score == detector.predict(X.to(images)).score).all()


def test_uint8_images_that_the_model_cannot_take_are_named() -> None:
    images = (X * 50).clamp(0, 255).byte()
    with pytest.raises(BadInput, match="The inputs are uint8: convert them to floating point"):
        extract([images])
    with pytest.raises(BadInput, match="The inputs are uint8: convert them to floating point"):
        ood_scores.calibrate("energy", network(), id=[images])
