"""Mahalanobis distances of perturbed inputs against pytorch-ood's detector and against autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pytorch_ood.detector import MahalanobisODIN as Theirs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import ood_scores
from ood_scores import FeatureSet, calibrate, extract, score
from ood_scores.cli import app
from ood_scores.errors import BadInput, OtherModel, StaleCache
from ood_scores.probes import MahalanobisODIN
from ood_scores.testing import check_probe
from ood_scores.testing.probes import ProbeCase

GENERATOR = torch.Generator().manual_seed(1)
LABELS = torch.arange(120) % 3
TRAIN = torch.randn(120, 3, 6, 6, generator=GENERATOR, dtype=torch.float64) + LABELS[:, None, None, None] / 2
IMAGES = torch.randn(20, 3, 6, 6, generator=GENERATOR, dtype=torch.float64)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).double().eval()


def extracted(inputs: Tensor, *probes: Any, labels: Tensor | None = None, **options: Any) -> FeatureSet:
    data = TensorDataset(inputs) if labels is None else TensorDataset(inputs, labels)
    return extract(network(), DataLoader(data, 8), dtype="float64", probes=probes, progress=False, **options)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "train.h5"
    extracted(TRAIN, labels=LABELS, cache=path)
    return path


@pytest.mark.parametrize("std", [None, (0.5, 1.0, 2.0)])
def test_scores_are_those_of_pytorch_ood(std: Any, train: Path) -> None:
    """Its covariance is not divided by the number of rows, and its score is half of the distance."""
    trunk = network()[:4]
    theirs = Theirs(trunk, eps=0.05, norm_std=None if std is None else list(std))
    theirs._base.to("cpu")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            theirs.fit_features(trunk(TRAIN), LABELS)
        expected = theirs.predict(IMAGES).detach().numpy()
    finally:
        torch.set_default_dtype(torch.float32)
    feats = extracted(IMAGES, MahalanobisODIN(fit=str(train), epsilon=0.05, std=std))
    found = score("mahalanobis_odin", feats, fit=train).numpy()
    np.testing.assert_allclose(found, -2 * len(TRAIN) * expected, rtol=1e-3)
    plain = score("mahalanobis", feats, fit=train).numpy()
    assert (found > plain).all(), "every input has moved toward its class"


@pytest.mark.parametrize("options", [{"normalize": True}, {"one_class": True}, {"epsilon": 0.0}])
def test_features_are_those_of_moved_inputs(options: dict[str, Any], train: Path) -> None:
    probe = MahalanobisODIN(fit=str(train), **{"epsilon": 0.03, **options})
    feats = extracted(IMAGES, probe)
    fitted: Any = ood_scores.create_scorer(
        "mahalanobis", **{key: value for key, value in options.items() if key != "epsilon"}
    ).fit(ood_scores.load(train))
    for image, found in zip(IMAGES, feats.extras["mahalanobis_odin"], strict=True):
        leaf = image[None].clone().requires_grad_()
        rows = network()[:4](leaf)
        unit = nn.functional.normalize(rows) if probe.normalize else rows
        white = (unit - fitted.centre_) @ fitted.whitening_
        distance = (white - fitted.means_).square().sum(dim=1).amin()
        (gradient,) = torch.autograd.grad(distance, leaf)
        with torch.no_grad():
            torch.testing.assert_close(found, network()[:4](leaf - probe.epsilon * gradient.sign())[0])
    chosen = {key: value for key, value in options.items() if key != "epsilon"}
    moved = FeatureSet(feats.extras["mahalanobis_odin"])
    expected = score("mahalanobis", moved, fit=train, **chosen)
    assert torch.equal(score("mahalanobis_odin", feats, fit=train, **chosen), expected)


def test_the_probe_has_the_properties_of_probes(tmp_path: Path) -> None:
    case = ProbeCase(MahalanobisODIN, {})
    case.extract([]).save(tmp_path / "fit.h5")
    check_probe(MahalanobisODIN, fit=str(tmp_path / "fit.h5"), epsilon=0.01)


def test_a_cache_of_another_fit_set_is_stale(train: Path, tmp_path: Path) -> None:
    other = tmp_path / "train.h5"
    extracted(TRAIN[:60], labels=LABELS[:60], cache=other)
    extracted(IMAGES, MahalanobisODIN(fit=str(other)), cache=tmp_path / "c.h5")
    late = MahalanobisODIN(fit=str(other), normalize=True)
    extracted(TRAIN[:90], labels=LABELS[:90], cache=other, overwrite=True)
    with pytest.raises(BadInput, match=r"train.h5 was replaced after the probe was created"):
        extracted(IMAGES, late)
    with pytest.raises(StaleCache, match="identity"):
        extracted(IMAGES, MahalanobisODIN(fit=str(other)), cache=tmp_path / "c.h5")


def test_messages(train: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"mahalanobis_odin needs the cache of the fit set: pass fit=CACHE"):
        extracted(IMAGES, "mahalanobis_odin")
    with pytest.raises(BadInput, match="epsilon must be at least 0, got -1"):
        MahalanobisODIN(epsilon=-1)
    with pytest.raises(FileNotFoundError):
        MahalanobisODIN(fit=str(tmp_path / "none.h5"))
    assert MahalanobisODIN(fit=train.name, root=str(train.parent)).identity == MahalanobisODIN(fit=str(train)).identity
    with pytest.raises(OtherModel, match=r"train.h5 come from other weights than those of the model"):
        extract(network(1), [IMAGES], probes=[MahalanobisODIN(fit=str(train))], progress=False)


def test_no_detector_reads_a_file_that_a_cache_names(train: Path) -> None:
    feats = extracted(IMAGES, MahalanobisODIN(fit=str(train)))
    with pytest.raises(BadInput, match="the probe 'mahalanobis_odin' reads a file, which a cache"):
        calibrate("mahalanobis_odin", network(), fit=train, id=feats, keep=0.9)


def test_on_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "net.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=pixels, labels=np.arange(60) % 3)
    np.savez(tmp_path / "test.npz", images=pixels[::-3])

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        return f"{done.exit_code} {' '.join(done.output.split())}"

    def extracted_to(name: str, cache: str, *options: object) -> str:
        words = ("--checkpoint", tmp_path / "net.pth", "--workers", 0, "--device", "cpu", *options)
        return run("extract", "test_resnet", f"npz:{tmp_path / name}.npz", tmp_path / cache, *words)

    assert extracted_to("train", "train.h5").startswith("0")
    assert extracted_to("test", "plain.h5").startswith("0")
    said = run("score", "mahalanobis_odin", tmp_path / "plain.h5", "--fit", tmp_path / "train.h5")
    assert "extract it with --probe mahalanobis_odin:fit=train.h5, where train.h5 is the cache of the fit set" in said
    probe = f"mahalanobis_odin:fit={tmp_path}/train.h5,epsilon=0.01"
    assert extracted_to("test", "c.h5", "--probe", probe).startswith("0")
    assert run("score", "mahalanobis_odin", tmp_path / "c.h5", "--fit", tmp_path / "train.h5").startswith("0")
