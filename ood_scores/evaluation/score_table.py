"""Tables of scores with the rows that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
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
        table["label"] = feats.labels.cpu().numpy()
    if feats.has("logits"):
        predictions = [block.prediction() for block in feats.blocks(device="cpu", only=["logits"])]
        table["prediction"] = torch.cat(predictions).numpy()
    return table


def score_columns(sets: Mapping[str, Sets], scores: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """Return a table with one line for each row of several sets and a column of scores for each scorer.

    Args:
        sets: Feature sets by name.
        scores: Scores ``[N]`` of each scorer by label, for each set by name.

    Returns:
        A data frame with the columns ``set`` and those of ``score_table``, with one column for each scorer in place of
        ``score``. Labels and predictions are integers that allow missing values if a set has none.
    """
    import pandas as pd

    parts = []
    for name, feats in sets.items():
        first = next(iter(scores[name].values()))
        part = score_table(feats, first).drop(columns="score")
        part.insert(0, "set", name)
        parts.append(part.assign(**{label: values.cpu().numpy() for label, values in scores[name].items()}))
    table = pd.concat(parts, ignore_index=True)
    lacking = [name for name in ("label", "prediction") if name in table and table[name].isna().any()]
    return table.astype(dict.fromkeys(lacking, "Int64"))
