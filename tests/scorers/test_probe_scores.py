"""Scores of extras against plain definitions, and from extraction to score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_ood import detector as peer
from torch import Tensor, nn

import ood_scores
from ood_scores import FeatureSet, create_scorer, evaluate, score
from ood_scores.errors import BadInput, MissingInput
from ood_scores.probes import LayerGradients, LayerNorms, MCDropout, ParameterGradients, Probe, RankFeat

Array = NDArray[np.float64]
ROWS, CLASSES = 30, 5
RNG = np.random.default_rng(0)
FEATURES, LOGITS = RNG.normal(size=(ROWS, 7)), 4 * RNG.normal(size=(ROWS, CLASSES))
PASSES = RNG.dirichlet(np.full(CLASSES, 0.3), size=(6, ROWS))


def feats(**extras: Any) -> FeatureSet:
    return FeatureSet(FEATURES, LOGITS, extras={name.replace("__", "."): values for name, values in extras.items()})


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def entropy(probabilities: Array) -> Array:
    result: Array = -(probabilities * np.log(probabilities)).sum(axis=-1)
    return result


@pytest.mark.parametrize("temperature", [1000.0, 1.0, 3.0])
@pytest.mark.parametrize("name", ["odin", "iodin"])
def test_odin(name: str, temperature: float) -> None:
    found = score(name, feats(**{name: LOGITS}), temperature=temperature)
    np.testing.assert_allclose(found, softmax(LOGITS / temperature).max(axis=1), rtol=1e-12)


def test_odin_distinguishes_rows_at_a_large_temperature() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, 0], logits[1, 0] = 1.0, 1.0001
    low, high = score("odin", FeatureSet(logits, logits, extras={"odin": logits}))
    assert low < high


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rankfeat(temperature: float) -> None:
    found = score("rankfeat", feats(rankfeat=LOGITS), temperature=temperature)
    np.testing.assert_allclose(found, temperature * np.log(np.exp(LOGITS / temperature).sum(axis=1)), rtol=1e-12)


@pytest.mark.parametrize("name", ["mc_dropout", "ensemble"])
def test_means_of_predictions(name: str) -> None:
    mean = PASSES.mean(axis=0)
    kept = feats(**{f"{name}__mean": mean, f"{name}__entropy": entropy(PASSES).mean(axis=0)})
    np.testing.assert_allclose(score(name, kept), -entropy(mean), rtol=1e-12)
    np.testing.assert_allclose(score(name, kept, output="entropy"), -entropy(mean), rtol=1e-12)
    np.testing.assert_allclose(score(name, kept, output="msp"), mean.max(axis=1), rtol=1e-12)
    divergences = (PASSES * np.log(PASSES / mean)).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(score(name, kept, output="mutual_information"), -divergences, rtol=1e-9, atol=1e-12)
    bare = feats(**{f"{name}__mean": mean})
    assert torch.equal(score(name, bare), score(name, kept))
    with pytest.raises(MissingInput, match=f"{name}.entropy"):
        score(name, bare, output="mutual_information")


def test_certain_means_have_no_entropy() -> None:
    mean = torch.eye(CLASSES)
    kept = FeatureSet(mean, mean, extras={"ensemble.mean": mean, "ensemble.entropy": torch.zeros(CLASSES)})
    for output in ("entropy", "mutual_information"):
        assert (score("ensemble", kept, output=output) == 0).all()


def test_gradnorm_params_is_the_gradient_uncertainty_of_pytorch_ood() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    inputs = 3 * torch.randn(12, 6)
    probe = ParameterGradients(p=2.0)
    found = score("gradnorm_params", ood_scores.extract(model, [inputs], probes=[probe], progress=False))
    theirs = -peer.GradUncertainty(model).predict(inputs)
    torch.testing.assert_close((CLASSES * found).square().float(), theirs, rtol=1e-4, atol=1e-6)


def test_gradnorm_params() -> None:
    kept = feats(gradnorm__all=FEATURES[:, 0], gradnorm__layer4=FEATURES[:, 1])
    np.testing.assert_array_equal(score("gradnorm_params", kept), FEATURES[:, 0])
    np.testing.assert_array_equal(score("gradnorm_params", kept, group="layer4"), FEATURES[:, 1])
    with pytest.raises(MissingInput, match=r"gradnorm\.fc"):
        score("gradnorm_params", kept, group="fc")


def test_groups_below_the_requested_one_are_named() -> None:
    kept = feats(**{"gradnorm.fc.weight": FEATURES[:, 0], "gradnorm.fc.bias": FEATURES[:, 1]})
    with pytest.raises(MissingInput, match=r"needs gradnorm\.fc .* only gradnorm\.fc\.weight, gradnorm\.fc\.bias"):
        score("gradnorm_params", kept, group="fc")


def test_block_norm() -> None:
    several = feats(norms__layer1=FEATURES[:, 0], norms__layer2=FEATURES[:, 1])
    np.testing.assert_array_equal(score("block_norm", several, layer="layer2"), FEATURES[:, 1])
    np.testing.assert_array_equal(score("block_norm", feats(norms__layer1=FEATURES[:, 0])), FEATURES[:, 0])
    np.testing.assert_array_equal(score("block_norm", several), FEATURES[:, 1])
    with pytest.raises(MissingInput, match="'block_norm' needs norms"):
        score("block_norm", feats())
    for name, params in (("block_norm", {"layer": "layer1"}), ("block_norm", {"layer": "layer2"})):
        scorers = [create_scorer(name, **params), create_scorer("feature_norm")]
        assert evaluate(scorers, id=several, ood={"ood": several}) is not None


@pytest.mark.parametrize("p", [1.0, 2.0, 0.5, float("inf")])
def test_feature_norm_of_other_spaces(p: float) -> None:
    kept = feats(layers__layer4=2 * FEATURES)
    for space, values in (("features", FEATURES), ("logits", LOGITS), ("layers.layer4", 2 * FEATURES)):
        expected = [np.linalg.norm(row, p) for row in values]
        np.testing.assert_allclose(score("feature_norm", kept, p=p, space=space), expected, rtol=1e-12)
    assert torch.equal(score("feature_norm", kept, p=p), score("feature_norm", kept, p=p, space="features"))
    with pytest.raises(MissingInput, match=r"layers\.layer3"):
        score("feature_norm", kept, space="layers.layer3")
    with pytest.raises(BadInput, match=r"'norms.a' must have shape \[N, K\], got \(30,\)"):
        score("feature_norm", feats(norms__a=FEATURES[:, 0]), space="norms.a")


def test_bad_parameters_are_named() -> None:
    for name in ("odin", "rankfeat"):
        with pytest.raises(BadInput, match=f"{name}: temperature must be positive"):
            create_scorer(name, temperature=0.0)
    for name in ("mc_dropout", "ensemble"):
        with pytest.raises(BadInput, match="output must be 'entropy' or 'msp' or 'mutual_information', got 'mean'"):
            create_scorer(name, output="mean")


def test_from_extraction_to_score(tmp_path: Any) -> None:
    """A small network is trained to classify orientations of stripes; noise is OoD."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(128, 2),
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(150):
            images, labels = stripes(64, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    probes: list[str | Probe] = [
        "odin",
        ParameterGradients(groups=("2", "all")),
        RankFeat(layers=("1", "3")),
        MCDropout(passes=4),
        LayerNorms(layers=("3",)),
    ]

    def extract(images: Tensor, labels: Tensor | None, name: str) -> FeatureSet:
        data = [images] if labels is None else [(images, labels)]
        wanted = [*probes, LayerGradients(noise=name == "train")]
        return ood_scores.extract(model, data, tmp_path / f"{name}.h5", probes=wanted, progress=False, name=name)

    train = extract(*stripes(200, seed=500), name="train")
    test = extract(*stripes(100, seed=501), name="test")
    noise = extract(torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)), None, name="noise")
    for name, params in (
        ("odin", {}),
        ("gradnorm_params", {}),
        ("gradnorm_params", {"group": "2"}),
        ("rankfeat", {}),
        ("mc_dropout", {}),
        ("mc_dropout", {"output": "msp"}),
        ("mc_dropout", {"output": "mutual_information"}),
        ("block_norm", {}),
        ("gradient_classifier", {}),
        ("feature_norm", {"space": "mc_dropout.mean"}),
    ):
        scorer = create_scorer(name, **params)
        scorer.fit(train)
        for each in (test, noise):
            scores = scorer.score(each)
            assert scores.shape == (100,)
            assert scores.isfinite().all()
    classified = create_scorer("gradient_classifier").fit(train)
    separated = (classified.score(test)[:, None] > classified.score(noise)).double().mean()
    assert separated > 0.9


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[count, 1, 8, 8]`` of horizontal or vertical stripes of any phase, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    waves = (torch.arange(8.0).view(1, 8, 1) * 1.6 + phase).sin().expand(count, 8, 8)
    labels = torch.arange(count) % 2
    images = torch.where(labels[:, None, None] == 0, waves, waves.mT)
    return (images + 0.1 * torch.randn(count, 8, 8, generator=generator))[:, None], labels
