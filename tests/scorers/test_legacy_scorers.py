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
    np.testing.assert_allclose(scorer.score(feats), legacy.ARRAYS[f"scorers/{label}"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", legacy.FACTS["statistics"]["fits"])
def test_a_fit_on_an_earlier_cache_returns_the_same_scores(name: str) -> None:
    feats = ood_scores.load(legacy.FOLDER / "caches" / "probes.h5")
    found = ood_scores.score(name, feats, feats)
    np.testing.assert_allclose(found, legacy.ARRAYS[f"statistics/{name}"], rtol=1e-6, atol=1e-12)
