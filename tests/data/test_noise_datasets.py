"""Images of noise."""

from __future__ import annotations

import numpy as np
import pytest
from dataset_images import pixels
from PIL import Image

from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, UnknownName


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise_depends_on_the_seed_and_the_row(kind: str) -> None:
    dataset = open_dataset(f"noise:{kind}?n=40&size=12&seed=3")
    assert (len(dataset), dataset.name) == (40, f"{kind}_noise")
    assert isinstance(dataset[0], Image.Image)  # no label
    np.testing.assert_array_equal(pixels(open_dataset(f"noise:{kind}?n=9&size=12&seed=3"), 8), pixels(dataset, 8))
    assert not np.array_equal(pixels(open_dataset(f"noise:{kind}?n=40&size=12&seed=4"), 8), pixels(dataset, 8))
    assert not np.array_equal(pixels(dataset, 7), pixels(dataset, 8))
    with pytest.raises(IndexError):
        dataset.load(40)
    assert pixels(open_dataset(f"noise:{kind}"), 9999).shape == (32, 32, 3)


def test_noise_channels_have_the_documented_distribution() -> None:
    gaussian, uniform = (
        np.stack([pixels(open_dataset(f"noise:{kind}"), row) for row in range(60)]).reshape(-1, 3).astype(float)
        for kind in ("gaussian", "uniform")
    )
    assert np.abs(gaussian.mean(axis=0) - 127.5).max() < 1.5
    assert np.abs((np.abs(gaussian - 127.5) < 63.75).mean(axis=0) - 0.6827).max() < 0.01
    assert np.abs(uniform.mean(axis=0) - 127.5).max() < 1.5
    assert np.abs(uniform.std(axis=0) - np.sqrt((256**2 - 1) / 12)).max() < 1.5
    for sample in (gaussian, uniform):
        assert np.abs(np.corrcoef(sample.T) - np.eye(3)).max() < 0.02


def test_noise_errors() -> None:
    with pytest.raises(UnknownName, match="there is no noise 'pink': choose from gaussian, uniform"):
        open_dataset("noise:pink")
    for option in ["n=0", "size=-1", "seed=a"]:
        with pytest.raises(BadInput, match=f"cannot read {option}: write a whole number from"):
            open_dataset(f"noise:uniform?{option}")
