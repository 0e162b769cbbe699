"""The standard deviation of logits."""

import numpy as np

from ood_scores import FeatureSet, score


def test_logit_spread_is_the_standard_deviation_of_the_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 5))
    found = score("logit_spread", FeatureSet(logits, logits))
    np.testing.assert_allclose(found, logits.std(axis=1), rtol=1e-12)
