"""What callbacks measure: how well scorers separate ID and OoD images, with the weights of the moment."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ood_scores.errors import BadInput, NearChance
from ood_scores.evaluation import evaluate
from ood_scores.evaluation.metrics import METRICS
from ood_scores.extraction import extract
from ood_scores.features import FeatureSet
from ood_scores.scorers import Scorer


class EpochScores:
    """Scorers, and the loaders of the sets that they are evaluated on.

    Args:
        id: the loader of the ID set, in the form that ``ood_scores.extract`` takes.
        ood: loaders of OoD sets by name.
        scorers: names of scorers, or scorers.
        fit: the loader of the set to fit on; None if no scorer needs one.
        metrics: names of metrics of ``ood_scores.metrics.METRICS``.
        every: the number of epochs, or evaluations, from one measurement to the next.
        options: further options of ``ood_scores.extract``, such as ``head`` or ``device``.

    Raises:
        BadInput: if ``every`` is less than 1.
        UnknownName: if there is no such metric.
    """

    def __init__(
        self,
        *,
        id: Iterable[Any],
        ood: Mapping[str, Iterable[Any]],
        scorers: Sequence[str | Scorer] = ("msp", "energy"),
        fit: Iterable[Any] | None = None,
        metrics: Sequence[str] = ("auroc", "fpr95_id"),
        every: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 1:
            raise BadInput(f"every must be at least 1, got {every}.")
        self.id, self.ood, self.fit = id, dict(ood), fit
        self.scorers = list(scorers)
        self.metrics = [METRICS[name].name for name in metrics]
        self.every = every
        self.options = dict(options or {})
        self.seen = 0

    def is_due(self) -> bool:
        """Count an epoch, and return whether it is one to measure."""
        self.seen += 1
        return self.seen % self.every == 0

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return every metric of every scorer on every OoD set: ``{"ood/svhn/energy/auroc": 0.93, ...}``.

        Every image passes through the model once. The model is left in the mode in which it was. It is not warned of an
        accuracy near chance, which a model has when its training starts.

        Raises:
            What ``ood_scores.extract`` and ``ood_scores.evaluate`` raise.
        """

        def feats(loader: Iterable[Any]) -> FeatureSet:
            return extract(model, loader, progress=False, **self.options)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NearChance)
            ood = {name: feats(loader) for name, loader in self.ood.items()}
            fit = None if self.fit is None else feats(self.fit)
            table = evaluate(self.scorers, id=feats(self.id), ood=ood, fit=fit, metrics=self.metrics, progress=False)
        rows = table.to_dict("records")
        return {f"ood/{row['ood']}/{row['scorer']}/{name}": row[name] for row in rows for name in self.metrics}
