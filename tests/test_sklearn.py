"""Scorers as estimators of scikit-learn: its own checks, the same scores, pipelines and grid searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

import ood_scores
from ood_scores.data.kinds.digits import digits
from ood_scores.errors import BadInput, MissingInput
from ood_scores.sklearn import OODEstimator

Sets = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def sets() -> Sets:
    """Pixels and names of the digits 0 to 6, and pixels of the others."""
    images, labels = digits()
    pixels, known = images.reshape(len(images), -1) / 255, labels < 7
    return pixels[known], np.array(list("abcdefg"))[labels[known]], pixels[~known]


def test_it_passes_the_checks_of_scikit_learn() -> None:
    check_estimator(OODEstimator("knn", parameters={"k": 3}))


def test_scores_are_those_of_the_scorer(sets: Sets) -> None:
    known, _, unknown = sets
    found = OODEstimator("knn", parameters={"k": 5}, contamination=0.1).fit(known[::2])
    scorer = ood_scores.create_scorer("knn", k=5).fit(ood_scores.FeatureSet(known[::2]))
    expected = scorer.score(ood_scores.FeatureSet(unknown)).numpy()
    assert found.score_samples(unknown) == pytest.approx(expected, abs=0)
    assert found.decision_function(unknown) == pytest.approx(expected - found.offset_, abs=0)
    assert (found.predict(unknown) == np.where(expected >= found.offset_, 1, -1)).all()
    assert (found.predict(known[::2]) == -1).mean() == pytest.approx(0.1, abs=2 / len(known))
    assert found.head_ is None


@pytest.mark.parametrize(("name", "parameters"), [("vim", None), ("energy", None), ("mahalanobis", None)])
def test_labels_give_what_a_scorer_needs(name: str, parameters: dict[str, Any] | None, sets: Sets) -> None:
    known, names, unknown = sets
    pipeline = make_pipeline(PCA(20), OODEstimator(name, parameters=parameters)).fit(known[::2], names[::2])
    scores = pipeline.score_samples(known[1::2]), pipeline.score_samples(unknown)
    assert roc_auc_score(np.repeat([1, 0], [len(scores[0]), len(scores[1])]), np.concatenate(scores)) > 0.85
    assert pipeline[-1].classes_.tolist() == list("abcdefg")


def test_a_grid_search_chooses_parameters(sets: Sets) -> None:
    known, _, unknown = sets

    def auroc(estimator: Any, X: np.ndarray, y: None = None) -> float:
        return ood_scores.metrics.auroc(estimator.score_samples(X), estimator.score_samples(unknown))

    scoring: Callable[..., float] = auroc
    tried: list[dict[str, int]] = [{"k": 1}, {"k": 400}]
    search = GridSearchCV(OODEstimator("knn"), {"parameters": tried}, scoring=scoring, cv=3).fit(known)
    assert search.best_params_ == {"parameters": {"k": 1}}
    assert search.best_estimator_.get_params()["parameters"] == {"k": 1}


def test_input_that_cannot_be_right_is_refused(sets: Sets) -> None:
    known, names, _ = sets
    with pytest.raises(BadInput, match="'vim' needs head and logits: pass the classes of the rows as y"):
        OODEstimator("vim").fit(known)
    with pytest.raises(BadInput, match=r"contamination must be in \(0, 0.5\], got 0.6"):
        OODEstimator(contamination=0.6).fit(known)
    with pytest.raises(MissingInput, match="odin"):
        OODEstimator("odin").fit(known, names)
