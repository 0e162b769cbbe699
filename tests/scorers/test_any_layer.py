"""Scorers at inner layers against the same scorers on these features, and combinations against oodeel's formulas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classified import FIT, FIT_LOGITS, HEAD, LOGITS, ROWS, TRAIN, Array, labels_of_fit, ours
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ood_scores import FeatureSet, Scorer, create_scorer, extract, list_scorers, load, score
from ood_scores.errors import BadInput, MissingInput
from ood_scores.features import Block
from ood_scores.features.halves import halves
from ood_scores.features.layer_set import LayerSet
from ood_scores.metrics import auroc
from ood_scores.scorers.any_layer import head_at
from ood_scores.scorers.registry import scorer_class
from ood_scores.scorers.storage import load_scorer

COLUMNS = {"features", "logits", "labels", "head"}
MIX = np.random.default_rng(7).normal(size=(FIT.shape[1], 6))


def layers_of(rows: Array) -> dict[str, Array]:
    return {"layers.a": np.tanh(rows @ MIX), "layers.b": rows[:, 1:] ** 2}


def set_with_layers(rows: Array, logits: Array, labels: Any = None) -> FeatureSet:
    return FeatureSet(rows, logits, labels, HEAD, layers_of(rows))


FIT_LAYERS, SCORED = set_with_layers(FIT, FIT_LOGITS, labels_of_fit), set_with_layers(ROWS, LOGITS)
FIRST, SECOND = halves(FIT_LAYERS)


def at(layer: str, rows: Array, logits: Array, labels: Any = None, head: Any = None) -> FeatureSet:
    return FeatureSet(layers_of(rows)[layer], logits, labels, head)


READ_FEATURES = [
    name
    for name in list_scorers()
    if "features" in (reads := {*create_scorer(name).needs, *create_scorer(name).fit_needs}) and reads <= COLUMNS
]


@pytest.mark.parametrize("name", READ_FEATURES)
def test_scores_at_a_layer_are_those_of_its_outputs_as_features(name: str) -> None:
    """Every scorer of features; one that reads the head finds the map with the least squared error."""
    small = {key: value for key, value in scorer_class(name).tags.small_parameters.items() if key != "base"}
    head = head_at(at("layers.b", FIT, FIT_LOGITS))
    fit, rows = at("layers.b", FIT, FIT_LOGITS, labels_of_fit, head), at("layers.b", ROWS, LOGITS, None, head)
    found = score(name, SCORED, FIT_LAYERS, space="layers.b", **small)
    torch.testing.assert_close(found, score(name, rows, fit, **small), rtol=1e-9, atol=1e-12)


def test_a_scorer_that_reads_any_space_itself_needs_no_fit() -> None:
    norms = np.linalg.norm(layers_of(ROWS)["layers.a"], axis=1)
    np.testing.assert_allclose(score("feature_norm", SCORED, space="layers.a"), norms)


def least_squares(layer: str) -> tuple[Any, Any]:
    columns = np.column_stack([layers_of(FIT)[layer], np.ones(len(FIT))])
    solution = np.linalg.lstsq(columns, FIT_LOGITS, rcond=None)[0]
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize(("name", "params"), [("nci", {}), ("vim", {"dimension": 3}), ("fdbd", {}), ("react", {})])
def test_a_base_that_reads_the_head_finds_the_least_squares_head(name: str, params: dict[str, Any]) -> None:
    head = head_at(LayerSet(FIT_LAYERS, "layers.a"))
    weight, bias = least_squares("layers.a")
    np.testing.assert_allclose(head.weight, weight, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(head.bias, bias, rtol=1e-7, atol=1e-10)
    fit = at("layers.a", FIT, FIT_LOGITS, labels_of_fit, head)
    expected = score(name, at("layers.a", ROWS, LOGITS, head=head), fit, **params)
    assert torch.equal(score(name, SCORED, FIT_LAYERS, space="layers.a", **params), expected)


def test_the_penultimate_layer_has_the_head_of_the_model() -> None:
    fit = FeatureSet(FIT, FIT_LOGITS, labels_of_fit, HEAD, {"layers.pool": FIT})
    scored = FeatureSet(ROWS, LOGITS, head=HEAD, extras={"layers.pool": ROWS})
    np.testing.assert_allclose(head_at(LayerSet(fit, "layers.pool")).weight, HEAD.weight, rtol=1e-9)
    for name in ("nci", "react", "vim"):
        np.testing.assert_allclose(ours(name, scored, fit, space="layers.pool"), ours(name), rtol=1e-7, atol=1e-9)


def of_layers(rows: Any, scored: FeatureSet) -> Array:
    """Scores ``[L, N]`` of the layers by scorers fitted on some rows of the fit set."""
    found = []
    for layer in ("layers.a", "layers.b"):
        fitted = create_scorer("mahalanobis").fit(at(layer, FIT[rows], FIT_LOGITS[rows], labels_of_fit[rows]))
        found.append(fitted.score(FeatureSet(scored.extras[layer])).numpy())
    return np.array(found)


def combined(combine: str) -> Array:
    reference, scores = of_layers(FIRST, FIT_LAYERS[SECOND]), of_layers(FIRST, SCORED)
    if combine == "fisher":
        n = reference.shape[1]
        p = [[(1 + (r <= s).sum()) / (n + 2) for s in row] for row, r in zip(scores, reference, strict=True)]
        return np.log(p).sum(axis=0)
    center, spread = reference.mean(axis=1, keepdims=True), reference.std(axis=1, keepdims=True)
    standardized = (scores - center) / spread
    if combine == "learned":
        weights = np.linalg.inv(np.corrcoef(reference)).sum(axis=1)
        return weights @ standardized / weights.sum()
    return {"mean": np.mean, "min": np.min, "max": np.max}[combine](standardized, axis=0)  # type: ignore[operator]


@pytest.mark.parametrize("combine", ["mean", "min", "max", "fisher", "learned"])
def test_combinations(combine: str) -> None:
    found = ours("layers", SCORED, FIT_LAYERS, base="mahalanobis", combine=combine)
    np.testing.assert_allclose(found, combined(combine), rtol=1e-7)


def test_the_mean_ranks_rows_as_oodeel_does() -> None:
    """``StdNormalizedAggregator`` divides by the standard deviation and averages, without centering."""
    reference, scores = of_layers(FIRST, FIT_LAYERS[SECOND]), of_layers(FIRST, SCORED)
    theirs = (-scores / reference.std(axis=1, keepdims=True)).mean(axis=0)
    assert (np.argsort(theirs) == np.argsort(-combined("mean"))).all()


def test_learned_weights_vary_least() -> None:
    scorer: Any = create_scorer("layers", base="mahalanobis", combine="learned").fit(FIT_LAYERS)
    reference = of_layers(FIRST, FIT_LAYERS[SECOND])
    standardized = (reference - reference.mean(axis=1, keepdims=True)) / reference.std(axis=1, keepdims=True)
    assert scorer.weights_.sum() == pytest.approx(1)
    variances = [np.var(np.array([w, 1 - w]) @ standardized) for w in np.linspace(-1, 2, 61)]
    assert np.var(scorer.weights_.numpy() @ standardized) <= min(variances)


@dataclass
class Rounded(Scorer):
    """A scorer that returns the first feature, with a last digit that depends on the place of the row in its block."""

    needs = ("features",)

    def score_block(self, block: Block) -> Tensor:
        return block.features[:, 0].double() + 1e-9 * (torch.arange(len(block)) % 3)


def with_a_constant_layer(rows: Array) -> FeatureSet:
    return FeatureSet(rows, extras={"layers.a": rows, "layers.dead": np.full((len(rows), 4), 1.7)})


@pytest.mark.parametrize("combine", ["mean", "min", "max", "fisher", "learned"])
def test_a_constant_layer_says_nothing_in_blocks_of_any_size(combine: Any) -> None:
    fit, scored = with_a_constant_layer(FIT), with_a_constant_layer(ROWS)
    scorer: Any = create_scorer("layers", base=Rounded(), combine=combine).fit(fit)
    reference, constant = scorer.reference_
    assert constant.unique().numel() == 1
    assert reference.unique().numel() == len(FIT) // 2
    usual = torch.from_numpy(ROWS[:, 0].copy())
    standardized, n = (usual - reference.mean()) / reference.std(correction=0), len(reference)
    p = (1 + torch.searchsorted(reference, usual, right=True)) / (n + 2)
    expected = {
        "mean": standardized / 2,
        "min": standardized.clamp_max(0),
        "max": standardized.clamp_min(0),
        "fisher": p.log() + np.log((n + 1) / (n + 2)),
        "learned": standardized,
    }[combine]
    for rows in (None, 1, 7, 50):
        np.testing.assert_allclose(scorer.score(scored, block_rows=rows), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", ["pnml", "ctm"])
def test_a_constant_layer_leaves_the_ranks_of_the_other_one(base: str) -> None:
    def made(rows: int, seed: int, scale: float) -> FeatureSet:
        generator = torch.Generator().manual_seed(seed)
        labels, means = torch.arange(rows) % 4, 3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
        features = scale * means[labels] + torch.randn(rows, 16, generator=generator)
        dead = 1.7 * torch.rand(100, generator=torch.Generator().manual_seed(7))
        layers = {"layers.a": features, "layers.dead": dead.repeat(rows, 1)}
        return FeatureSet(features, features @ means.T / 5, labels, extras=layers)

    scorer: Any = create_scorer("layers", base=base).fit(made(403, 0, 1.0))
    sets = made(101, 1, 1.0), made(101, 2, 0.4)
    heads = scorer.heads_[:1] or [None]
    alone = [scorer.members_[0].score(FeatureSet(feats.extras["layers.a"], head=heads[0])) for feats in sets]
    for rows in (None, 1, 7, 50):
        found = [scorer.score(feats, block_rows=rows) for feats in sets]
        assert auroc(*found) == pytest.approx(auroc(*alone), abs=1e-4)


def test_extracted_layers_on_disk_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    sets = []
    for number in range(2):
        inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(number))
        data = DataLoader(TensorDataset(inputs, torch.arange(40) % 3), batch_size=16)
        sets.append(extract(model, data, tmp_path / f"{number}.h5", layers=["1", "3"], progress=False))
    scorer = create_scorer("knn", k=3, space="layers.3").fit(load(tmp_path / "0.h5"))
    found = scorer.score(sets[1])
    assert torch.equal(found, score("knn", sets[1], sets[0], k=3))  # layer 3 outputs the features
    for fitted in (scorer, create_scorer("layers", base="react", combine="fisher").fit(sets[0])):
        fitted.save(tmp_path / "scorer.safetensors")
        assert torch.equal(load_scorer(tmp_path / "scorer.safetensors").score(sets[1]), fitted.score(sets[1]))


def test_messages() -> None:
    with pytest.raises(BadInput, match="base='energy' does not read features"):
        create_scorer("layers", base="energy")
    with pytest.raises(BadInput, match="base='adascale_a' reads adascale"):
        create_scorer("adascale_a", space="layers.a")
    with pytest.raises(MissingInput, match=r"'layers' needs layers.c to be fitted on .*layers=\('c',\)"):
        create_scorer("knn", space="layers.c").fit(TRAIN)
    with pytest.raises(BadInput, match="several layers need at least 4 rows"):
        create_scorer("layers", base="mahalanobis").fit(FIT_LAYERS[:3])
