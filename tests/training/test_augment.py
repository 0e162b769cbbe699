"""Augmentation of batches, and the input of networks."""

from __future__ import annotations

import numpy as np
import timm
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as vision

from ood_scores.models.opening import preprocessing
from ood_scores.training.augment import AUGMENTATIONS, jitter, random_resized_crop, turn_hue
from ood_scores.training.setup import input_of


def uint8(count: int = 6, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=Generator().manual_seed(0))


def test_model_input_equals_the_evaluation_transform() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    for model in (
        timm.create_model("tiny_net"),
        timm.create_model("tiny_net", in_chans=1),
        timm.create_model("resnet18"),
    ):
        to_input = input_of(model)
        pixels = vision.pil_to_tensor(to_input.open(image, 0))[None]
        ready = to_input.augmented(pixels, AUGMENTATIONS["none"], Generator(), False)
        torch.testing.assert_close(ready[0], preprocessing(model)(image))


def test_crop_and_flip_return_windows_of_the_padded_image() -> None:
    images = uint8(200)
    changed = (AUGMENTATIONS["crop_flip"](images, Generator().manual_seed(1)) * 255).round().to(torch.uint8)
    seen = set()
    for image, padded in zip(changed, F.pad(images, (1, 1, 1, 1)), strict=True):
        windows = {
            (top, left, mirrored): (window.flip(2) if mirrored else window)
            for top in range(3) for left in range(3) for mirrored in (False, True)
            for window in [padded[:, top : top + 8, left : left + 8]]
        }  # fmt: skip
        (place,) = [place for place, window in windows.items() if torch.equal(window, image)]
        seen.add(place)
    assert len(seen) == 18


def test_turn_hue_equals_torchvision() -> None:
    images = uint8(4, size=16).float() / 255
    images[0] = images[0].mean(dim=0)
    images[1, :, :4] = 0
    turns = torch.tensor([0.1, -0.1, 0.03, 0.5]).reshape(4, 1, 1, 1)
    expected = [vision.adjust_hue(image, float(turn)) for image, turn in zip(images, turns, strict=True)]
    torch.testing.assert_close(turn_hue(images, turns), torch.stack(expected), atol=2e-6, rtol=0)


def test_jitter_changes_most_images_independently() -> None:
    images = (uint8(1, size=16).float() / 255).expand(500, 3, 16, 16)
    changed = jitter(images, Generator().manual_seed(0))
    different = (changed != images).flatten(1).any(dim=1)
    assert 0.74 < different.double().mean() < 0.86
    assert len(changed[different].flatten(1).unique(dim=0)) == different.sum()
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_rna_augmentation_converts_a_fifth_of_the_images_to_gray() -> None:
    changed = AUGMENTATIONS["rna"](uint8(1000), Generator().manual_seed(0))
    gray = (changed - changed.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert 0.16 < gray.double().mean() < 0.24


def test_small_crops_show_a_small_part_of_the_image() -> None:
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(400, 3, 32, 32)
    shown = AUGMENTATIONS["small_crops"](ramp, Generator().manual_seed(0))
    spans = (shown[:, 0, 0, :].amax(dim=1) - shown[:, 0, 0, :].amin(dim=1)) * 255 / 248
    assert 0.15 < spans.min() < 0.22
    assert 0.45 < spans.max() < 0.6


def test_random_resized_crop_has_the_size_and_spans_the_areas_of_torchvision() -> None:
    image = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(60, 0))
    crops = [np.asarray(random_resized_crop(image, (8, 12), Image.Resampling.NEAREST, seed)) for seed in range(200)]
    assert {crop.shape for crop in crops} == {(8, 12)}
    spans = np.array([float(crop.max()) - float(crop.min()) for crop in crops])
    assert spans.min() < 35 < 65 < spans.max()
    assert np.array_equal(crops[3], np.asarray(random_resized_crop(image, (8, 12), Image.Resampling.NEAREST, 3)))
    stripe = random_resized_crop(Image.new("L", (500, 2)), (4, 4), Image.Resampling.BILINEAR, 0)
    assert stripe.size == (4, 4)
