"""Tables of scores name their rows."""

from __future__ import annotations

import pytest
import torch

import ood_scores
from ood_scores.errors import ShapeMismatch
from ood_scores.evaluation.score_table import score_table


def test_a_table_has_the_columns_of_the_set() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, 2.0], [0.0, 4.0]])
    scores = ood_scores.score("energy", ood_scores.FeatureSet(logits, logits))
    names = ["a", b"\xff".decode("utf-8", "surrogateescape"), ""]
    table = score_table(ood_scores.FeatureSet(logits, logits, [1, 1, 0], ids=names), scores)
    assert list(table) == ["row", "id", "score", "label", "prediction"]
    assert table["id"].tolist() == names
    assert table["score"].tolist() == scores.tolist()
    assert table["prediction"].tolist() == [1, 0, 1]
    assert list(score_table(ood_scores.FeatureSet(logits), scores)) == ["row", "score"]
    with pytest.raises(ShapeMismatch, match=r"scores must be \[3\], one for each row, got \[2\]"):
        score_table(ood_scores.FeatureSet(logits), scores[:2])
