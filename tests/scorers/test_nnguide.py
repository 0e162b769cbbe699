"""nnguide against a plain float64 reference and pytorch-ood."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from classified import (
    FIT,
    FIT_LOGITS,
    LOGITS,
    ROWS,
    TRAIN,
    WIDTH,
    Array,
    labels_of_fit,
    layer,
    ours,
)
from pytorch_ood import detector as peer
from scipy.special import logsumexp
from scipy.stats import spearmanr

from ood_scores import FeatureSet, create_scorer
from ood_scores.errors import BadInput
from ood_scores.features.statistics.row_samples import drawn_numbers


@pytest.mark.parametrize("k", [1, 10, 300])
def test_nnguide(k: int) -> None:
    def unit(z: Array) -> Array:
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    bank = unit(FIT) * logsumexp(FIT_LOGITS, axis=1)[:, None]
    guidance = [np.sort(bank @ z)[-k:].mean() for z in unit(ROWS)]
    expected = logsumexp(LOGITS, axis=1) * guidance
    np.testing.assert_allclose(ours("nnguide", k=k), expected, rtol=1e-6, atol=1e-6)  # the bank is float32
    detector: Any = peer.NNGuide(None, layer().float(), k=k)
    detector.fit_features(torch.tensor(FIT), torch.tensor(labels_of_fit))
    theirs = detector.predict_features(torch.tensor(ROWS).float())
    np.testing.assert_allclose(ours("nnguide", k=k), -theirs, rtol=1e-4, atol=1e-5)
    assert spearmanr(ours("nnguide", k=k), -theirs).statistic > 1 - 1e-9


def test_nnguide_on_a_seeded_share() -> None:
    scorers: list[Any] = [create_scorer("nnguide", share=0.2, seed=seed).fit(TRAIN) for seed in (3, 3, 4)]
    banks = [scorer.bank_ for scorer in scorers]
    whole = create_scorer("nnguide").fit(TRAIN).bank_  # type: ignore[attr-defined]
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])
    chosen = [(whole == row).all(dim=1).nonzero().item() for row in banks[0]]
    assert len(set(chosen)) == 60
    assert chosen == drawn_numbers(len(TRAIN), 0.2, 3).tolist()
    blocks: Any = create_scorer("nnguide", share=0.2, seed=3).fit(TRAIN, block_rows=7)
    assert torch.equal(blocks.bank_, banks[0])
    assert torch.equal(blocks.energies_, scorers[0].energies_)
    assert torch.equal(blocks.energies_, create_scorer("nnguide").fit(TRAIN).energies_[chosen])  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="k=10 needs at least as many bank rows, got 3: lower k"):
        create_scorer("nnguide", share=0.01).fit(TRAIN)


def test_nnguide_of_zeros_is_0_and_bad_parameters_are_named() -> None:
    assert ours("nnguide", FeatureSet(np.zeros((2, WIDTH)), LOGITS[:2])).tolist() == [0, 0]
    huge = FeatureSet(FIT, 1e39 * FIT_LOGITS)
    with pytest.raises(BadInput, match="exceed the range of float32"):
        create_scorer("nnguide").fit(huge)
    for params in ({"k": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(BadInput, match=next(iter(params))):
            create_scorer("nnguide", **params)
