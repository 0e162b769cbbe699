"""First calls with arrays, paths, and names: those whose meaning is plain work, others are refused with advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ood_scores as package
from ood_scores import FeatureSet, Head, errors
from ood_scores.evaluation.feature_norms import norm_bins, norm_groups
from ood_scores.evaluation.long_tail import long_tail_report
from ood_scores.evaluation.neural_collapse import neural_collapse, singular_values

api: Any = package
FEATURES: Any = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
HEAD = Head(torch.eye(3, 4))
FEATS: Any = FeatureSet(FEATURES, HEAD(FEATURES), torch.arange(40) % 3, HEAD)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3))
IMAGES = [torch.rand(20, 3, 2, 2, generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    FEATS.save(tmp_path / "a.h5")
    return tmp_path / "a.h5"


@pytest.mark.parametrize(
    "call",
    [
        lambda at: api.score("mahalanobis", at, fit=at),
        lambda at: api.score("ensemble", [at, at]),
        lambda at: api.create_scorer("mahalanobis").fit(at).score(at),
        lambda at: api.evaluate(["mahalanobis"], id=at, ood={"b": at}, fit=at)["auroc"],
        lambda at: api.sweep("knn", {"k": [1, 2]}, id=at, ood={"b": at}, fit=at)["auroc"],
        lambda at: api.ensemble([at, at]).features,
        lambda at: vars(neural_collapse(at)),
        lambda at: singular_values(at, {"more": at})["value"],
        lambda at: norm_bins(at, 4),
        lambda at: norm_groups([at, at], (0.5,)),
        lambda at: long_tail_report(at, [9, 5, 1]).accuracy,
    ],
)
@pytest.mark.filterwarnings("ignore:.*rows")
def test_path_of_a_cache_stands_for_its_feature_set(cache: Path, call: Callable[[Any], Any]) -> None:
    expected = call(FEATS)
    for path in (cache, str(cache)):
        found = call(path)
        if isinstance(expected, dict):
            assert found == pytest.approx(expected)
        else:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_calibrate_takes_the_path_of_a_cache(tmp_path: Path) -> None:
    feats = api.extract(MODEL, IMAGES, tmp_path / "id.h5", progress=False)
    by_path = api.calibrate("energy", MODEL, id=str(tmp_path / "id.h5"), keep=0.9)
    assert by_path.calibration.thresholds == api.calibrate("energy", MODEL, id=feats, keep=0.9).calibration.thresholds
    with pytest.raises(errors.BadInput, match="there are only feature sets"):
        api.calibrate("energy", MODEL, id=tmp_path / "id.h5", amp="bf16")


def test_logits_alone_are_scored_as_the_advice_says() -> None:
    with pytest.raises(errors.BadInput, match=r"pass them as the features too, FeatureSet\(logits, logits\)"):
        FeatureSet(None, FEATS.logits)
    alone = api.score("msp", FeatureSet(FEATS.logits, FEATS.logits))
    assert torch.equal(alone, api.score("msp", FEATS))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FeatureSet(FEATURES, extras=FEATURES), "extras must map names to arrays, got Tensor"),
        (lambda: api.score("msp", FEATS.logits), r"got Tensor: call extract\(model, loader\), load\(path\), or"),
        (lambda: api.score("msp", FEATURES.numpy()), "got ndarray: call extract"),
        (lambda: api.score("msp", None), "got NoneType: call extract"),
        (lambda: api.score("msp", [FEATURES]), "got Tensor: call extract"),
        (lambda: api.create_scorer("msp").score(FEATURES), "got Tensor: call extract"),
        (lambda: api.create_scorer("knn").fit(FEATURES), "got Tensor: call extract"),
        (lambda: api.evaluate(None, id=FEATS, ood={"b": FEATS}), "scorers must be a list or a mapping"),
        (lambda: api.evaluate(["msp"], id=FEATS, ood={"b": FEATURES}), "got Tensor: call extract"),
        (lambda: api.load(FEATS), "expected a path, got FeatureSet"),
        (lambda: FEATS.save(None), "expected a path, got NoneType"),
        (lambda: api.create_scorer(3), "there is no scorer 3: choose from"),
        (lambda: api.extract("resnet18", IMAGES), "must be a torch.nn.Module, got str"),
        (lambda: api.extract(MODEL, "folder:photos"), "got str: pass DataLoader.*open_dataset opens"),
        (lambda: api.extract(MODEL, Path("photos")), "got PosixPath: pass DataLoader"),
        (lambda: api.extract(MODEL, 5), "got int: pass DataLoader"),
        (lambda: api.extract(MODEL, IMAGES, 3), "expected a path, got int"),
        (lambda: api.extract(MODEL, IMAGES, probe=["odin"]), "no argument 'probe' .did you mean 'probes'"),
        (lambda: api.extract(MODEL, IMAGES, probes=[3]), "a probe must be a name or a Probe object, got 3"),
        (lambda: api.extract(MODEL, IMAGES, layers=3), "layers must be 'stages' or a list"),
        (lambda: api.training.train({"epochs": 1}), "expected a path, got dict"),
        (lambda: api.benchmark.run({"id": "x"}), "expected a path, got dict"),
        (lambda: neural_collapse(FEATURES), "got Tensor: call extract"),
    ],
)
def test_argument_of_the_wrong_kind_is_refused_with_advice(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(errors.OodScoresError, match=words):
        call()


@pytest.mark.filterwarnings("ignore:.*rows")
def test_relative_paths_of_readme_calls_need_no_feature_set(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache.parent)
    table = api.evaluate(["energy"], id="a.h5", ood={"b": "a.h5"})
    assert table["auroc"].tolist() == [0.5]
