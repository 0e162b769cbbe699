"""HDF5 files with the results of a unit: figures, scores, labels and predictions. They are sealed as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.atomic import replacing
from ood_scores.errors import OodScoresError
from ood_scores.evaluation.calibration_error import ClassifiedRows
from ood_scores.features.storage.reading import open_to_read
from ood_scores.features.storage.seal import seal
from ood_scores.features.storage.texts import IDS, as_bytes, as_stored, packed, text_type, unpacked

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "scores"
"""Folder of the files in the folder of a run."""
FORMAT = "ood_scores benchmark"
ARRAYS = ("scores", "labels", "predictions", "rows", "origins")
T = TypeVar("T")


@dataclass(frozen=True)
class SetScores:
    """The results for the rows of a dataset, or for ID rows of several datasets.

    Attributes:
        scores: one row per scorer, float64 ``[S, N]``.
        labels: class indices, -1 for none, int64 ``[N]``.
        predictions: predicted classes, -1 for none, int64 ``[N]``.
        rows: row of each item in its dataset, int64 ``[N]``.
        origins: index in ``names`` of the dataset of each item, int64 ``[N]``.
        names: names of the datasets.
        ids: name of each item, such as its file, ``[N]``; "" for an item without one.
        classified: the rows for metrics of the classifier, which are not stored; None if there are no such metrics.
    """

    scores: Tensor
    labels: Tensor
    predictions: Tensor
    rows: Tensor
    origins: Tensor
    names: Sequence[str]
    ids: NDArray[np.str_]
    classified: ClassifiedRows | None = None


@dataclass(frozen=True)
class Scored:
    """The scores of one checkpoint on the datasets of a part.

    All arrays are read from the folder of the run when they are accessed, by the name of the OoD dataset, or ``"id"``
    for the ID rows.

    Attributes:
        part: title of the part.
        model: label of the model.
        checkpoint: number of the checkpoint among those of the model, from 0.
        scores: float64 ``[N]`` by scorer and dataset, such as ``scores["msp"]["id"]``.
        labels: int64 ``[N]`` by dataset; -1 for rows without a label.
        predictions: int64 ``[N]`` by dataset; -1 if the model has no logits.
        rows: row of each item in its dataset, int64 ``[N]``. With ``relabel`` or ``covariate``, ID rows come from
            several datasets.
        origins: name of the dataset of each item, ``[N]`` by dataset.
        ids: name of each item, such as its file, ``[N]`` by dataset; "" for an item without one.
        explained: why the hardest rows are hard, see ``benchmark.hardest.explained``; None if it is not known.
    """

    part: str
    model: str
    checkpoint: int
    scores: Mapping[str, Mapping[str, Tensor]]
    labels: Mapping[str, Tensor]
    predictions: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    origins: Mapping[str, list[str]]
    ids: Mapping[str, NDArray[Any]]
    explained: Mapping[str, Any] | None = None

    def to_pandas(self, name: str) -> pd.DataFrame:
        """Return a frame with a row for each item of a dataset: ``set, row, id, label, prediction``, and the scores."""
        import pandas as pd

        columns = {"set": self.origins[name], "row": self.rows[name].numpy()}
        columns |= {"id": pd.Series(self.ids[name].tolist(), dtype=object)}
        columns |= {"label": self.labels[name].numpy(), "prediction": self.predictions[name].numpy()}
        return pd.DataFrame(columns | {scorer: scores[name].numpy() for scorer, scores in self.scores.items()})


@dataclass
class Found:
    """The results of a unit.

    Attributes:
        part: see ``Scored``.
        model: see ``Scored``.
        checkpoint: see ``Scored``.
        scorers: labels of the scorers that ran.
        sets: results for the ID rows, ``"id"``, and for each OoD dataset by name.
        table: rows of the table of ``Results``.
        measures: rows of its measures.
        searched: rows of its parameter search.
        not_run: what could not run, and why.
        overlap: rows of its ``overlap``.
        warnings: rows of its ``warnings``.
        explained: see ``Scored``.
    """

    part: str
    model: str
    checkpoint: int
    scorers: list[str] = field(default_factory=list)
    sets: dict[str, SetScores] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)
    searched: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, Any]] = field(default_factory=list)
    overlap: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    explained: dict[str, Any] | None = None


def write(path: Path, digest: str, found: Found) -> dict[str, Any]:
    """Write the results of a unit and return its facts, like ``read``; raise CacheWriteFailed if the disk refuses."""
    facts = {key: value for key, value in vars(found).items() if key != "sets"}
    facts |= {"sets": list(found.sets), "names": [list(each.names) for each in found.sets.values()]}
    with replacing(path, "make room on the disk and run the benchmark again to continue") as file:
        with h5py.File(file, "w") as h5:
            h5.attrs.update({"format": FORMAT, "digest": digest})
            h5["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
            for number, each in enumerate(found.sets.values()):
                for name in ARRAYS:
                    h5[f"sets/{number}/{name}"] = getattr(each, name).numpy()
                if (each.ids != "").any():
                    column = packed(each.ids)
                    texts = h5.create_dataset(f"sets/{number}/{IDS}", len(column), text_type(column.shape[1]))
                    texts[:] = as_stored(column.numpy(), texts)
        file.check()
        seal(file)
    return facts


def read(path: Path, digest: str | None = None) -> dict[str, Any] | None:
    """Verify all checksums of a file and return its facts; None if it is damaged or has another digest."""
    try:
        with open_to_read(path) as h5:
            if h5.attrs["format"] != FORMAT or digest not in (None, h5.attrs["digest"]):
                return None
            facts = json.loads(h5["facts"][()].tobytes())
            for number, _ in enumerate(facts["sets"]):
                for name in ARRAYS:
                    h5[f"sets/{number}/{name}"][()]
            return facts
    except (OodScoresError, FileNotFoundError):
        return None


def scored(path: Path, facts: Mapping[str, Any]) -> Scored:
    """Return the arrays of a file, which are read when they are accessed."""
    numbers = {name: number for number, name in enumerate(facts["sets"])}
    rows = {label: row for row, label in enumerate(facts["scorers"])}

    def array(name: str, what: str, row: Any = ()) -> Tensor:
        with open_to_read(path) as h5:
            return torch.from_numpy(h5[f"sets/{numbers[name]}/{what}"][row])

    def origins(name: str) -> list[str]:
        names = facts["names"][numbers[name]]
        return [names[number] for number in array(name, "origins").tolist()]

    def ids(name: str) -> NDArray[np.str_]:
        with open_to_read(path) as h5:
            place = f"sets/{numbers[name]}"
            if IDS not in h5[place]:
                return np.full(len(h5[f"{place}/rows"]), "")
            return unpacked(torch.from_numpy(as_bytes(h5[f"{place}/{IDS}"][()])))

    def by_set(what: str) -> Lazy[Tensor]:
        return Lazy(numbers, lambda name: array(name, what))

    return Scored(
        part=facts["part"],
        model=facts["model"],
        checkpoint=facts["checkpoint"],
        scores=Lazy(rows, lambda label: Lazy(numbers, lambda name: array(name, "scores", rows[label]))),
        labels=by_set("labels"),
        predictions=by_set("predictions"),
        rows=by_set("rows"),
        origins=Lazy(numbers, origins),
        ids=Lazy(numbers, ids),
        explained=facts.get("explained"),  # of earlier versions: not there
    )


class Lazy(Mapping[str, T]):
    """A mapping whose values are read at each access."""

    def __init__(self, names: Mapping[str, Any], read: Callable[[str], T]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
