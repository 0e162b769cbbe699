"""Tables of scores with the rows that they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ood_scores.errors import ShapeMismatch
from ood_scores.features import Sets, as_feature_set

if TYPE_CHECKING:
    import pandas as pd


def score_table(feats: Sets, scores: Tensor) -> pd.DataFrame:
    """Return a table with one line for each row of a set.

    Args:
        feats: Feature set, or the path of its cache; a list is an ensemble.
        scores: Scores ``[N]`` of its rows.

    Returns:
        A data frame with the columns ``row``, the number of the row in its dataset; ``id``, its name, if the set has
        ids; ``score``; ``label``, if the set has labels; and ``prediction``, the class with the largest logit, if it
        has logits.

    Raises:
        ShapeMismatch: if there is not one score for each row.
    """
    import pandas as pd

    feats = as_feature_set(feats)
    if scores.shape != (len(feats),):
        raise ShapeMismatch(f"scores must be [{len(feats)}], one for each row, got {list(scores.shape)}.")
    rows = feats.provenance.rows_in_dataset(len(feats)) if feats.provenance else range(len(feats))
    table = pd.DataFrame({"row": rows})
    if feats.ids is not None:
        table["id"] = pd.Series(feats.ids.tolist(), dtype=object)  # names that are not UTF-8 are no pandas strings
    table["score"] = scores.cpu().numpy()
    if feats.labels is not None:
        table["label"] = feats.labels.numpy()
    if feats.has("logits"):
        predictions = [block.prediction() for block in feats.blocks(device="cpu", only=["logits"])]
        table["prediction"] = torch.cat(predictions).numpy()
    return table
