"""Scorers saved by an earlier version open, are equal, and return the same scores."""

from __future__ import annotations

from typing import Any

import legacy_files as legacy
import numpy as np
import pytest

import ood_scores

SCORERS: dict[str, Any] = legacy.FACTS["scorers"]


@pytest.mark.parametrize("label", SCORERS)
def test_a_saved_scorer_returns_the_same_scores(label: str) -> None:
    scorer = ood_scores.load_scorer(legacy.FOLDER / "scorers" / f"{label}.safetensors")
    facts = SCORERS[label]
    assert (scorer.name, legacy.without_new_parameters(repr(scorer))) == (facts["name"], facts["repr"])
    assert scorer.is_fitted
    feats = ood_scores.load(legacy.FOLDER / "caches" / f"{facts['scored']}.h5")
    expected = legacy.ARRAYS[f"scorers/{label}"]
    if scorer.name == "fusion":
        lowest, highest = (score_with_references_moved(scorer, feats, share) for share in (1e-6, -1e-6))
        for scores in (expected, scorer.score(feats).numpy()):
            assert ((lowest <= scores + 1e-12) & (scores <= highest + 1e-12)).all()
    else:
        # the float32 softmax of earlier versions was off by 3e-6
        rtol = 5e-6 if label == "temperature" else 1e-6
        np.testing.assert_allclose(scorer.score(feats), expected, rtol=rtol, atol=1e-12)


def score_with_references_moved(scorer: Any, feats: ood_scores.FeatureSet, share: float) -> np.ndarray:
    """Score rows that a fusion was fitted on, each tied with itself, after rounding that breaks all ties one way."""
    before = scorer.reference_
    scorer.reference_ = before + share * before.abs()
    scores = scorer.score(feats).numpy()
    scorer.reference_ = before
    return scores


def test_temperature_is_as_exact_as_a_float64_softmax() -> None:
    scorer = ood_scores.load_scorer(legacy.FOLDER / "scorers" / "temperature.safetensors")
    feats = ood_scores.load(legacy.FOLDER / "caches" / "probes.h5")
    assert feats.logits is not None
    exact = (feats.logits.double() / vars(scorer)["temperature_"]).softmax(dim=1).amax(dim=1)
    np.testing.assert_allclose(scorer.score(feats), exact, rtol=3e-7)


@pytest.mark.parametrize("name", legacy.FACTS["statistics"]["fits"])
def test_a_fit_on_an_earlier_cache_returns_the_same_scores(name: str) -> None:
    feats = ood_scores.load(legacy.FOLDER / "caches" / "probes.h5")
    found = ood_scores.score(name, feats, feats)
    np.testing.assert_allclose(found, legacy.ARRAYS[f"statistics/{name}"], rtol=1e-6, atol=1e-12)
