"""Features of inputs mixed with images of another dataset, and detectors that were fitted on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from ood_scores import FeatureSet, calibrate, extract, load, score
from ood_scores.cli import app
from ood_scores.data.images import ImageArrays
from ood_scores.errors import BadInput, MissingData, StaleCache
from ood_scores.extraction.probes.base import record_of
from ood_scores.extraction.probes.mixup import SHARES
from ood_scores.probes import Mixup
from ood_scores.testing import check_probe
from ood_scores.testing.probes import ProbeCase

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
PROXIES = RNG.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def as_input(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 100 - 1


@pytest.fixture
def proxy(tmp_path: Path) -> str:
    np.savez(tmp_path / "proxies.npz", images=PROXIES)
    return f"npz:{tmp_path}/proxies.npz"


def extracted(*probes: Any, images: Any = IMAGES, batch: int = 8, **options: Any) -> FeatureSet:
    data = ImageArrays(images, np.arange(len(images)) % 4, as_input)
    return extract(network(), DataLoader(data, batch), probes=probes, progress=False, **options)


def test_features_are_those_of_mixtures(proxy: str) -> None:
    """Each row is the mixture with one image and share, all of which occur, whatever the size of batches."""
    found = extracted(Mixup(proxy=proxy)).extras["mixup"]
    trunk = network()[:4]
    pairs = [(number, share) for number in range(len(PROXIES)) for share in SHARES]
    others = torch.stack([as_input(image) for image in PROXIES])
    drawn = []
    for image, row in zip(IMAGES, found, strict=True):
        mixtures = torch.stack([share * as_input(image) + (1 - share) * others[number] for number, share in pairs])
        with torch.no_grad():
            apart = (trunk(mixtures) - row).abs().amax(dim=1)
        assert apart.amin() < 1e-6
        drawn.append(int(apart.argmin()))
    assert len(set(drawn)) > 10
    torch.testing.assert_close(extracted(Mixup(proxy=proxy), batch=3).extras["mixup"], found)
    assert (extracted(Mixup(proxy=proxy, seed=1)).extras["mixup"] != found).any(dim=1).sum() > 30


def test_the_probe_has_the_properties_of_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_scores.models.opening.preprocessing", lambda model: as_input)
    assert ProbeCase(Mixup, {}).inputs.shape[1:] == (3, 8, 8)
    check_probe(Mixup, proxy="noise:uniform?n=9&size=8")


def test_relative_paths_start_in_root(proxy: str, tmp_path: Path) -> None:
    there = Mixup(proxy="npz:proxies.npz", root=str(tmp_path))
    torch.testing.assert_close(extracted(there).extras["mixup"], extracted(Mixup(proxy=proxy)).extras["mixup"])
    assert record_of(there).parameters.keys() == {"name", "proxy", "seed", "identity"}


def test_other_images_make_a_cache_stale(proxy: str, tmp_path: Path) -> None:
    extracted(Mixup(proxy=proxy), cache=tmp_path / "c.h5")
    np.savez(tmp_path / "proxies.npz", images=PROXIES[::-1])
    with pytest.raises(StaleCache, match="identity"):
        extracted(Mixup(proxy=proxy), cache=tmp_path / "c.h5")


def test_images_that_change_after_the_probe_was_created_are_refused(proxy: str, tmp_path: Path) -> None:
    probe = Mixup(proxy=proxy)
    np.savez(tmp_path / "proxies.npz", images=PROXIES[::-1])
    with pytest.raises(BadInput, match=r"the images of npz:.* have changed since the probe was created"):
        extracted(probe)


def test_messages(proxy: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"name a dataset, mixup:proxy=folder:PHOTOS"):
        extracted("mixup")
    with pytest.raises(MissingData, match="there is no"):
        extracted(Mixup(proxy=f"folder:{tmp_path}/none"))
    np.savez(tmp_path / "large.npz", images=PROXIES.repeat(2, axis=1))
    with pytest.raises(BadInput, match=r"become inputs of shape \[3, 12, 6\], those of the loader have \[3, 6, 6\]"):
        extracted(Mixup(proxy=f"npz:{tmp_path}/large.npz"))
    model, tensors = network(), DataLoader(TensorDataset(torch.rand(8, 3, 6, 6)), 8)
    with pytest.raises(BadInput, match="preprocessing of Sequential are unknown"):
        extract(model, tensors, probes=[Mixup(proxy=proxy)], progress=False)
    model.transform = as_input  # type: ignore[assignment]
    extract(model, tensors, probes=[Mixup(proxy=proxy)], progress=False)


def test_only_the_fit_set_of_a_detector_is_mixed(proxy: str, tmp_path: Path) -> None:
    fit = extracted(Mixup(proxy=proxy), images=IMAGES[:20], cache=tmp_path / "fit.h5")
    detector = calibrate("mfs", network(), fit=fit, id=extracted(images=IMAGES[20:30]), keep=0.9)
    found = detector.predict(torch.stack([as_input(image) for image in IMAGES[30:]]))
    np.testing.assert_allclose(found.score, score("mfs", extracted(images=IMAGES[30:]), fit=fit), rtol=1e-4)


def test_on_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "net.pth")
    pixels = RNG.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=pixels, labels=np.arange(60) % 3)

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        return f"{done.exit_code} {' '.join(done.output.split())}"

    def extracted_to(cache: str, *options: object) -> str:
        words = ("--checkpoint", tmp_path / "net.pth", "--workers", 0, "--device", "cpu", *options)
        return run("extract", "test_resnet", f"npz:{tmp_path}/train.npz", tmp_path / cache, *words)

    assert extracted_to("plain.h5").startswith("0")
    said = run("score", "mfs", tmp_path / "plain.h5", "--fit", tmp_path / "plain.h5")
    assert "extract it with --probe mixup:proxy=folder:photos, where photos is a folder of images" in said
    assert extracted_to("fit.h5", "--probe", "mixup:proxy=noise:uniform?n=9&size=40,seed=3").startswith("0")
    assert load(tmp_path / "fit.h5").extras["mixup"].shape == load(tmp_path / "fit.h5").features.shape
    chosen = ("--param", "share=0.25", "--param", "normalize=true")
    assert run("score", "mfs", tmp_path / "plain.h5", "--fit", tmp_path / "fit.h5", *chosen).startswith("0")
