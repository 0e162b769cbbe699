"""lid and dknn against transcriptions of their authors' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classified import CLASSES, FIT, FIT_LOGITS, LOGITS, ROWS, TRAIN, Array, labels_of_fit, ours
from scipy.spatial.distance import cdist

from ood_scores import FeatureSet, create_scorer, load_scorer
from ood_scores.errors import BadInput
from ood_scores.scorers.one_pass import fit_all, score_all


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [5, 20])
@pytest.mark.parametrize("normalize", [False, True])
def test_lid(k: int, normalize: bool) -> None:
    """``mle_batch`` of the authors' code, with all fit rows as the batch."""
    bank, rows = (unit(FIT), unit(ROWS)) if normalize else (FIT, ROWS)
    nearest = np.sort(cdist(rows, bank.astype(np.float32)), axis=1)[:, :k]
    dimensions = [-k / np.sum(np.log(distances / distances[-1])) for distances in nearest]
    np.testing.assert_allclose(ours("lid", k=k, normalize=normalize), -np.array(dimensions), rtol=1e-6)


def test_lid_of_copies_of_fit_rows_and_of_equal_distances() -> None:
    rows = np.repeat(FIT[:1], 5, axis=0).astype(np.float32)
    assert ours("lid", FeatureSet(rows[:1]), FeatureSet(rows), k=4).tolist() == [0.0]
    corners = np.eye(8)
    assert ours("lid", FeatureSet(np.zeros((1, 8))), FeatureSet(corners), k=4).tolist() == [-1e12]


def counts(bank: Array, rows: Array, k: int) -> Array:
    nearest = np.argsort(cdist(unit(rows), unit(bank)), axis=1)[:, :k]
    return np.array([np.bincount(labels_of_fit[places], minlength=CLASSES) for places in nearest])


LAYER, FIT_LAYER = np.tanh(ROWS[:, :5]), np.tanh(FIT[:, :5])
FEATS = FeatureSet(ROWS, LOGITS, extras={"layers.a": LAYER})
FIT_SET = FeatureSet(FIT, FIT_LOGITS, labels_of_fit, extras={"layers.a": FIT_LAYER})


def test_dknn() -> None:
    np.testing.assert_allclose(ours("dknn", k=20), counts(FIT, ROWS, 20).max(axis=1) / 20)
    both = counts(FIT, ROWS, 20) + counts(FIT_LAYER, LAYER, 20)
    found = ours("dknn", FEATS, FIT_SET, k=20, layers=("features", "a"))
    np.testing.assert_allclose(found, both.max(axis=1) / 40)


def test_dknn_ranks_rows_as_credibility_does() -> None:
    """``preds_conf_cred`` of cleverhans: the largest p-value of a label among the calibration rows' nonconformities."""
    fit, calibration = FIT_SET[:200], FIT_SET[200:]
    others = 20 - counts(FIT[:200], FIT[200:], 20)[np.arange(100), labels_of_fit[200:]]
    candidates = 20 - counts(FIT[:200], ROWS, 20)
    credibility = (others[:, None, None] >= candidates).mean(axis=0).max(axis=1)
    found = create_scorer("dknn", k=20).fit(fit).score(FEATS).numpy()
    assert len(calibration) == len(others)
    assert len(np.unique(credibility)) > 3
    better = found[:, None] > found
    assert (credibility[:, None] >= credibility)[better].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scorers_of_one_bank_share_its_products(dtype: type) -> None:
    together = [
        create_scorer("dknn", k=20),
        create_scorer("knn", k=5),
        create_scorer("lid", k=20, normalize=True),
        create_scorer("nnguide"),
        create_scorer("relation"),
        create_scorer("relation", power=2.0),
    ]
    feats = FeatureSet(ROWS.astype(dtype), LOGITS.astype(dtype))
    alone = [scorer.fit(FIT_SET).score(feats) for scorer in together]
    assert len({scorer.scored_with() for scorer in together}) == 1
    for found, expected in zip(score_all(together, feats), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    layers = create_scorer("dknn", k=20, layers=("features", "a")).fit(FIT_SET)
    assert layers.scored_with() is None


def test_dknn_decides_between_neighbors_at_nearly_the_same_distance_in_float64() -> None:
    """The distances of the third and the fourth neighbor differ by less than the rounding of float32 products."""
    angles = torch.tensor([0.1, 0.2, 0.300001, 0.3, 0.31, 2.0], dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    fit = FeatureSet(rows, labels=torch.tensor([0, 0, 1, 0, 1, 1]))
    found = create_scorer("dknn", k=3).fit(fit).score(FeatureSet(torch.tensor([[1.0, 0.0]])))
    assert found.tolist() == [1.0]


def test_messages() -> None:
    with pytest.raises(BadInput, match="lid: k=999 needs at least as many bank rows"):
        create_scorer("lid", k=999).fit(TRAIN)
    with pytest.raises(BadInput, match="lid: k must be at least 2"):
        create_scorer("lid", k=1)
    with pytest.raises(BadInput, match="dknn: layers must be a list"):
        create_scorer("dknn", layers="layer4")


SHARED_RNG = np.random.default_rng(5)
LENGTHS = 10.0 ** SHARED_RNG.uniform(-3, 3, size=(len(FIT), 1))


@pytest.mark.parametrize(
    "kind",
    ["ordinary", "lengths of six orders", "zeros", "collapsed", "large", "tiny", "copies of fit rows", "float64"],
)
@pytest.mark.parametrize("block_rows", [None, 7])
def test_lid_searches_together_with_knn_and_finds_the_same(kind: str, block_rows: int | None) -> None:
    """Its features are not normalized, while ``knn`` searches a bank of directions."""
    fit, rows = {
        "ordinary": (FIT, ROWS),
        "lengths of six orders": (FIT * LENGTHS, ROWS * LENGTHS[: len(ROWS)]),
        "zeros": (
            np.where(np.arange(len(FIT))[:, None] % 3, FIT, 0),
            np.where(np.arange(len(ROWS))[:, None] % 2, ROWS, 0),
        ),
        "collapsed": (1 + 1e-2 * FIT, 1 + 1e-2 * ROWS),
        "large": (1e12 * FIT, 1e12 * ROWS),
        "tiny": (1e-10 * FIT, 1e-10 * ROWS),
        "copies of fit rows": (FIT, FIT[:50]),
        "float64": (FIT, ROWS),
    }[kind]
    dtype = np.float64 if kind == "float64" else np.float32
    train, feats = (
        FeatureSet(fit.astype(dtype), FIT_LOGITS, labels_of_fit),
        FeatureSet(rows.astype(dtype), LOGITS[: len(rows)]),
    )
    scorers: list[Any] = [
        create_scorer("lid", k=10),
        create_scorer("knn", k=10),
        create_scorer("nnguide"),
        create_scorer("lid"),
    ]
    fit_all(scorers, train)
    assert len({scorer.scored_with() for scorer in scorers}) == 1
    found = score_all(scorers, feats, block_rows=block_rows)
    for scorer, scores in zip(scorers[::3], found[::3], strict=True):
        nearest = np.sort(cdist(feats.features.double().numpy(), fit.astype(np.float32)), axis=1)[:, : scorer.k]
        known = np.log(np.maximum(nearest, 1e-12))
        logs = np.maximum((known[:, -1:] - known).mean(axis=1), 1e-12)
        expected = np.where(nearest[:, -1] > 1e-12, -1 / logs, 0)
        np.testing.assert_allclose(scores, expected, rtol=1e-5 if kind == "collapsed" else 1e-9)


def test_lid_is_scored_alone_if_no_scorer_of_its_fit_normalizes() -> None:
    train = FeatureSet(FIT, FIT_LOGITS, labels_of_fit)
    scorer = create_scorer("lid").fit(train)
    assert scorer.scored_with() is None
    create_scorer("knn").fit(train)
    assert scorer.scored_with() is None
    together = create_scorer("lid").fit(train)
    assert together.scored_with() is not None
    assert together.scored_with() != create_scorer("lid", share=0.5).fit(train).scored_with()
    torch.testing.assert_close(together.score(FEATS), scorer.score(FEATS), rtol=1e-12, atol=0)


def test_a_saved_lid_returns_the_same_scores(tmp_path: Path) -> None:
    scorers = [create_scorer("lid"), create_scorer("knn")]
    fit_all(scorers, FeatureSet(FIT, FIT_LOGITS, labels_of_fit))
    expected = score_all(scorers, FEATS)[0]
    scorers[0].save(tmp_path / "lid")
    again = load_scorer(tmp_path / "lid")
    assert again.scored_with() is None
    torch.testing.assert_close(again.score(FEATS), expected, rtol=1e-12, atol=0)
