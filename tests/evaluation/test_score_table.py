"""Tables of scores name their rows."""

from __future__ import annotations

import pytest
import torch

import ood_scores
from ood_scores.errors import BadInput, ShapeMismatch
from ood_scores.evaluation import evaluate_details
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


def test_details_have_the_scores_of_every_row() -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    names = [f"{row}.png" for row in range(5)]
    known = ood_scores.FeatureSet(logits[:5], logits[:5], [0, 1, 2, 0, 1], ids=names)
    other = ood_scores.FeatureSet(logits[5:], logits[5:])
    table, rows = evaluate_details(["msp", "energy"], id=known, ood={"other": other}, progress=False)
    assert table.equals(ood_scores.evaluate(["msp", "energy"], id=known, ood={"other": other}, progress=False))
    assert list(rows) == ["set", "row", "id", "label", "prediction", "msp", "energy"]
    assert rows["set"].tolist() == ["id"] * 5 + ["other"] * 4
    assert rows["id"].tolist()[:5] == names
    assert rows["id"].isna().tolist() == [False] * 5 + [True] * 4
    assert torch.allclose(torch.tensor(rows["energy"].to_numpy()), logits.double().logsumexp(1))
    assert rows["label"].dtype == "Int64"
    assert rows["label"].to_csv(index=False).split()[1:] == ["0", "1", "2", "0", "1", *['""'] * 4]
    assert rows["prediction"].tolist() == logits.argmax(1).tolist()
    with pytest.raises(BadInput, match="an OoD set cannot be named 'id'"):
        evaluate_details(["msp"], id=known, ood={"id": other}, progress=False)
