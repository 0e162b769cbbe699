"""The predictions of a detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.notebook import facts_html
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.one_pass import score_all
from ood_scores.terminal import encodable, with_texts

if TYPE_CHECKING:
    import pandas as pd


UNREAD: Mapping[str, Any] = {
    "label": -1,
    "probability": np.nan,
    "score": np.nan,
    "p_value": np.nan,
    "is_ood": True,
    "class_name": "",
    "label_set": (),
    "id": "",
}
"""The values of an image that could not be read."""

NULLABLE: Mapping[str, Any] = {"label": "Int64", "is_ood": "boolean", "class_name": object, "label_set": object}
"""Types of columns of a frame that can lack values."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predictions of a detector for B images, as NumPy arrays ``[B]``, one row for each image in the same order.

    An image that cannot be read, and is not an error, has a row, too: its probability, score, and p-value are NaN, its
    label is -1, its name is empty, its set of labels is empty, and it is not accepted: ``is_ood`` is True.

    Attributes:
        label: the predicted class, int64; None for an encoder without a head.
        probability: its softmax probability, float64; None for an encoder without a head.
        score: the score of the detector's scorer, float64; higher means more in-distribution.
        p_value: the conformal p-value of "this image is in-distribution", float64; small means OoD.
        is_ood: whether the score is below the threshold.
        class_name: the name of the predicted class; None if the detector has no names.
        label_set: the labels in the set of each image, the most probable first: tuples of names, or of numbers if the
            detector has no names; None if it makes no sets.
        id: the file of the image, or the name of its row in a feature set; None if images have no names.
        errors: why images could not be read, by their number; empty if all could be read.
    """

    label: Any
    probability: Any
    score: NDArray[np.float64]
    p_value: NDArray[np.float64]
    is_ood: NDArray[np.bool_]
    class_name: NDArray[Any] | None = None
    label_set: NDArray[Any] | None = None
    id: NDArray[Any] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.score)

    @property
    def is_read(self) -> NDArray[np.bool_]:
        """Whether each image could be read, bool ``[B]``."""
        found = np.ones(len(self), bool)
        found[list(self.errors)] = False
        return found

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, except for those that are None."""
        columns = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "errors"}
        return {name: values for name, values in columns.items() if values is not None}

    def to_pandas(self) -> pd.DataFrame:
        """Return a frame with a row per image and a column per array.

        If images could not be read, there is a column ``error``, and their rows have no other values but ``id``.
        """
        import pandas as pd

        columns: dict[str, Any] = self.columns()
        if self.id is not None:
            columns["id"] = pd.Series(self.id.tolist(), dtype=object)  # names that are not UTF-8 are no pandas strings
        frame = pd.DataFrame(columns)
        if not self.errors:
            return frame
        frame = frame.astype({name: kind for name, kind in NULLABLE.items() if name in frame})
        for name in frame.columns.drop("id", errors="ignore"):
            frame.loc[list(self.errors), name] = None
        return frame.assign(error=pd.Series(dict(self.errors), dtype=object))

    def _repr_html_(self) -> str:
        n_ood = int((self.is_ood & self.is_read).sum())
        facts = {"images": len(self), "OoD": n_ood, "not read": len(self.errors) or None}
        return facts_html("Prediction", facts, with_texts(self.to_pandas(), encodable).to_html(max_rows=10))

    def with_unreadable(self, errors: Mapping[int, str]) -> Prediction:
        """Insert a row for each image that could not be read, whose numbers in the result are those of ``errors``."""
        if not errors:
            return self
        total = len(self) + len(errors)
        places = np.delete(np.arange(total), list(errors))
        columns: dict[str, Any] = {"label": None, "probability": None}
        for name, values in self.columns().items():
            columns[name] = np.empty(total, values.dtype)
            columns[name][places] = values
            for number in errors:
                columns[name][number] = UNREAD[name]
        return Prediction(**columns, errors=dict(errors))

    @classmethod
    def joined(cls, parts: Sequence[Prediction]) -> Prediction:
        """Concatenate several predictions of one detector."""
        columns = [part.columns() for part in parts]
        joined: dict[str, Any] = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
        return cls(**{"label": None, "probability": None} | joined)


def predictions_of(feats: FeatureSet) -> tuple[Any, Any]:
    """Return the predicted class of every row and its probability, both ``[N]``; None of a set without logits."""
    _, labels, probabilities = scores_and_predictions((), feats)
    return labels, probabilities


def scores_and_predictions(
    scorers: Sequence[Scorer], feats: FeatureSet, read_logits: Callable[[Tensor], None] | None = None
) -> tuple[list[NDArray[np.float64]], Any, Any]:
    """Return the scores ``[N]`` of each scorer, and the same as ``predictions_of``, from one pass over the set.

    ``read_logits`` is that of ``score_all``.
    """
    predictions = [_PredictedClass(), _Confidence()] if feats.has("logits") else []
    if not (scorers or predictions):
        return [], None, None
    found = [values.numpy() for values in score_all([*scorers, *predictions], feats, read_logits=read_logits)]
    if not predictions:
        return found, None, None
    *scores, labels, probabilities = found
    return scores, labels.astype(np.int64), probabilities


@dataclass
class _PredictedClass(Scorer):
    """The number of the predicted class, no score."""

    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return block.prediction()


@dataclass
class _Confidence(Scorer):
    """The probability of the predicted class."""

    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return block.confidence()
