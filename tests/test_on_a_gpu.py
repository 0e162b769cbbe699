"""Rows, detectors and fits on a CUDA device; a simulated one, on which copies arrive late, suffices."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from torch import Tensor, nn

import ood_scores
from ood_scores.cli import doctor
from ood_scores.evaluation.score_table import score_table
from ood_scores.features.linear_probe import linear_probe
from ood_scores.features.statistics import moments
from ood_scores.runtime import CPU, NEW_PRECISION_API, available
from ood_scores.testing.probes import SmallNetwork
from ood_scores.training import train, trainer
from ood_scores.training.networks import make_model
from ood_scores.training.recipe_file import recipe_from
from ood_scores.training.stages import make_objective
from ood_scores.training.step import train_step

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.randn(8, 3, 8, 8, generator=GENERATOR) for _ in range(6)]


class Split(nn.Module):
    """A body and a head, which may be on two devices; its logits are in the same memory in every pass."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc = nn.Linear(16, 5)
        self.places: dict[torch.device, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.body(x).to(self.fc.weight.device))
        return self.places.setdefault(logits.device, torch.empty_like(logits)).copy_(logits)


class Refilled:
    """A loader that yields one pinned buffer again and again."""

    def __iter__(self) -> Iterator[Tensor]:
        buffer = torch.empty(8, 3, 8, 8).pin_memory()
        for images in IMAGES:
            yield buffer.copy_(images)


def extracted(model: nn.Module, **options: object) -> ood_scores.FeatureSet:
    data = options.pop("data", IMAGES)
    return ood_scores.extract(model.eval(), data, progress=False, **options)  # type: ignore[arg-type]


def _with_paths(*folders: Path) -> str:
    """Return the search path of this process for modules, after these folders."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def assert_same_rows(found: ood_scores.FeatureSet) -> None:
    expected = extracted(Split(), device="cpu")
    torch.testing.assert_close(found.features, expected.features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_outputs_in_the_same_memory_in_every_pass() -> None:
    assert_same_rows(extracted(Split().cuda()))


@pytest.mark.gpu
def test_a_pinned_buffer_that_the_loader_refills() -> None:
    assert_same_rows(extracted(Split(), data=Refilled(), device="cuda"))


@pytest.mark.gpu
def test_a_buffer_on_the_gpu_that_the_loader_refills_does_not_race_with_the_copies() -> None:
    code = """
import ood_scores, torch

class Refilled:
    def __iter__(self):
        buffer = torch.empty(8, 12, device="cuda")
        for value in range(6):
            yield buffer.copy_(torch.full((8, 12), float(value)))

feats = ood_scores.extract(torch.nn.Linear(12, 5).cuda(), Refilled(), progress=False)
print(feats.features[::8, 0].tolist())
"""
    env = os.environ | {"TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": _with_paths(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.stdout == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]\n", found.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not NEW_PRECISION_API, reason="this torch has one interface to the precision")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_precision_of_convolutions_that_torchs_new_interface_sets_is_recorded(precision: str) -> None:
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = precision
    try:
        feats = extracted(Split(), device="cuda")
    finally:
        convolutions.fp32_precision = before
    assert feats.provenance is not None
    assert (feats.provenance.matmul_tf32, feats.provenance.conv_tf32) == (False, precision == "tf32")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_stays_on_them() -> None:
    model = Split()
    model.body.to("cuda:0"), model.fc.to("cuda:1")
    feats = extracted(model)
    assert_same_rows(feats)
    ood_scores.calibrate("energy", model, id=feats, keep=0.8).predict(IMAGES[0])
    assert [next(part.parameters()).device.index for part in (model.body, model.fc)] == [0, 1]


@pytest.mark.gpu
def test_a_pickled_detector_returns_to_the_gpu_and_works_without_one(tmp_path: Path) -> None:
    feats = extracted(Split())
    labelled = ood_scores.FeatureSet(
        feats.features, feats.logits, torch.arange(48) % 5, feats.head, provenance=feats.provenance
    )
    detector = ood_scores.calibrate("mahalanobis", Split(), fit=labelled, id=feats, keep=0.8, device="cuda")
    scores = torch.from_numpy(detector.predict(IMAGES[0]).score)
    cast(Split, detector.model).places.clear()  # tensors that are no buffers stay where they are
    (tmp_path / "detector.pkl").write_bytes(pickle.dumps(detector))
    again = pickle.loads((tmp_path / "detector.pkl").read_bytes())
    assert again.device.type == "cuda"
    torch.testing.assert_close(torch.from_numpy(again.predict(IMAGES[0]).score), scores)
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'detector.pkl')!r}, 'rb')).device)"
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "cpu\n", found.stderr


@pytest.mark.gpu
def test_a_packed_mixture_is_fitted_twice_on_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(moments, "CLASS_SCATTER_BYTES", 5_000)
    labels = torch.arange(300) % 5
    features = torch.eye(5, 12)[labels] + torch.rand(300, 12, generator=GENERATOR)
    ood_scores.FeatureSet(features, labels=labels).save(tmp_path / "a.h5")
    expected = (
        ood_scores.create_scorer("gmm")
        .fit(ood_scores.load(tmp_path / "a.h5"))
        .score(ood_scores.load(tmp_path / "a.h5"))
    )
    for _ in range(2):
        feats = ood_scores.load(tmp_path / "a.h5", device="cuda")
        torch.testing.assert_close(ood_scores.create_scorer("gmm").fit(feats).score(feats), expected)


@pytest.mark.gpu
def test_members_of_an_ensemble_on_different_devices() -> None:
    feats = extracted(Split(), device="cpu")
    assert feats.logits is not None
    there = ood_scores.FeatureSet(feats.features.cuda(), feats.logits.cuda())
    torch.testing.assert_close(
        ood_scores.score("ensemble", [feats, there]), ood_scores.score("ensemble", [feats, feats])
    )


@pytest.mark.gpu
def test_tables_and_linear_probes_of_sets_with_labels_on_a_gpu() -> None:
    here = extracted(Split(), device="cpu")
    labels = torch.arange(len(here)) % 5
    here = ood_scores.FeatureSet(here.features, here.logits, labels)
    there = ood_scores.FeatureSet(here.features.cuda(), here.logits.cuda(), labels.cuda())  # type: ignore[union-attr]
    scores = ood_scores.score("energy", here)
    assert score_table(there, scores.cuda())["label"].tolist() == labels.tolist()
    heads = [linear_probe(feats).head for feats in (here, there)]
    torch.testing.assert_close(heads[1].weight, heads[0].weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("gpus", "found"), [(0, CPU), (1, torch.device("cuda", 0)), (4, torch.device("cuda", 3))])
def test_a_device_that_a_process_lacks(gpus: int, found: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert available(torch.device("cuda", 3)) == found
    assert available(CPU) == CPU


@pytest.mark.gpu
def test_networks_are_created_without_the_generators_of_gpus(tmp_path: Path) -> None:
    states = torch.cuda.get_rng_state_all()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CUDA reports that you have")
        assert not any(test() for test in doctor.TESTS.values())
    SmallNetwork()
    recipe = recipe_from(tiny.tables())
    model = make_model(recipe.model, {"num_classes": 4}, 0, tmp_path)
    make_objective(recipe.stages[0], model, [8, 8, 8, 8], 0)
    for found, expected in zip(torch.cuda.get_rng_state_all(), states, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_cudnn_chooses_by_trial_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_trial: list[bool] = []

    def step(*arguments: Any) -> Any:
        by_trial.append(torch.backends.cudnn.benchmark)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", step)
    trained = train(recipe_from(tiny.tables()), tmp_path, device="cuda", progress=False)
    assert set(by_trial) == {True}
    assert not torch.backends.cudnn.benchmark
    assert all(math.isfinite(epoch["loss"]) for epoch in trained.history)
