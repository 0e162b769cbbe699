"""The base class of all scorers."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from ood_scores.errors import BadInput, EmptyInput, MissingInput, NotFitted, ShapeMismatch
from ood_scores.features import Block, FeatureSet, Provenance, Sets, as_feature_set
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.notebook import facts_html
from ood_scores.parameters import check_choices, check_types
from ood_scores.scorers.compatibility import require_same_features, widths
from ood_scores.scorers.on_device import DeviceState
from ood_scores.scorers.one_pass import fit_all, score_all
from ood_scores.scorers.registry import create_scorer
from ood_scores.scorers.requirements import FIT_SET, requirements
from ood_scores.scorers.storage import load_scorer, save_scorer
from ood_scores.scorers.tags import Tags
from ood_scores.scorers.work import Sizes, Work

IN_A_GRAPH = ("features", "logits", "head")
"""The requirements that an exported graph can meet."""


def fitted(default: Any = MISSING) -> Any:
    """Return a dataclass field for an attribute that the fit sets: no parameter, not in the repr, not compared."""
    return field(default=default, init=False, repr=False, compare=False)


class Scorer(DeviceState, ABC):
    """A score for every row of a feature set, as float64; **higher = more in-distribution**, without exception.

    A scorer is a dataclass whose fields are its parameters. ``needs`` lists what scoring reads. A scorer that is fitted
    on in-distribution data lists what the fit reads in ``fit_needs`` and stores the result in attributes whose names
    end in an underscore. A subclass implements ``score_block`` and, if it is fitted, ``statistics`` and
    ``fit_statistics``.
    """

    name: str
    needs: Sequence[str] = ()
    fit_needs: Sequence[str] = ()
    tags: Tags = Tags()
    fitted_widths: Mapping[str, int] | None = None
    fitted_on: Provenance | None = None

    def __init_subclass__(cls) -> None:
        """Name a scorer that is not registered after its class."""
        cls.name = cls.__dict__.get("name", cls.__name__)

    def statistics(self) -> Sequence[Statistic[Any]]:
        """Return the statistics that the fit requires; they are collected in one pass for all scorers."""
        return ()

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        """Fit from the collected statistics."""
        raise TypeError(f"{self.name!r} declares fit_needs but does not implement fit_statistics.")

    @abstractmethod
    def score_block(self, block: Block) -> Tensor:
        """Return the scores ``[B]`` of one block."""

    def compared(self, block: Block) -> Tensor:
        """Return the vectors ``[B, K]`` by which the scorer tells rows apart, to find rows that are alike for it.

        By default these are the features, or the logits if it reads no features.
        """
        return block.logits if "logits" in self.needs and "features" not in self.needs else block.features

    def scored_with(self) -> Hashable:
        """Return a key: scorers with equal keys are scored in one call; None if the scorer is always scored alone."""
        return None

    def decided_for(self, sets: Sequence[FeatureSet]) -> Scorer:
        """Return the scorer with the parameters that depend on what all sets to score have decided; usually itself."""
        return self

    def work(self, sizes: Sizes) -> Work:
        """Return what the fit and the scoring are expected to need, besides ``statistics``, if that is much."""
        return Work()

    def score_together(self, block: Block, scorers: Sequence[Scorer]) -> Sequence[Tensor]:
        """Return the scores ``[B]`` of each of several scorers with the same key; shared work is done once."""
        return [scorer.score_block(block) for scorer in scorers]

    def fit(self, feats: Sets, *, block_rows: int | None = None) -> Scorer:
        """Fit on in-distribution features, in blocks, and return the scorer itself.

        Args:
            feats: the fit set, usually the training data, or the path of its cache; a list of sets is an ensemble.
            block_rows: rows per block; by default, ``FeatureSet.blocks`` chooses it.

        Raises:
            EmptyInput: if the set has no rows.
            MissingInput: if the set lacks what the fit reads.
            NotFinite: if the set holds NaN or infinite values.
            BadLabels: if the fit reads labels that are not class indices of the model.
        """
        fit_all([self], as_feature_set(feats), block_rows=block_rows)
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether the scorer can score; always true for a scorer that needs no fit."""
        return not self.fit_needs or self.fitted_widths is not None

    def score(self, feats: Sets, *, block_rows: int | None = None) -> Tensor:
        """Return a score for every row: float64 ``[N]`` on the CPU, higher = more in-distribution.

        Args:
            feats: the set to score, given as in ``fit``.
            block_rows: rows per block; by default, ``FeatureSet.blocks`` chooses it.

        Raises:
            NotFitted: if the scorer needs a fit and has not been fitted.
            MissingInput: if the set lacks something that the scorer reads.
            ShapeMismatch: if the widths of the set differ from those of the fit set.
            OtherModel: if the set and the fit set are known to come from different weights or poolings.
            NotFinite: if the data that the scorer reads contain NaN or infinite values, or if a score is NaN.
            EmptyInput: if the set has no rows.
        """
        feats = as_feature_set(feats)
        decided = self.decided_for([feats])
        decided.check_ready(feats)
        (scores,) = score_all([decided], feats, block_rows=block_rows)
        return scores

    def _repr_html_(self) -> str:
        paper = self.tags.paper
        parameters: list[Any] = [each for each in fields(self) if each.init] if is_dataclass(self) else []
        facts = {
            **{each.name: repr(getattr(self, each.name)) for each in parameters},
            "reads": ", ".join(self.needs),
            "is fitted": None if not self.fit_needs else "yes" if self.is_fitted else "no",
            "paper": f"{paper.title} ({paper.venue} {paper.year})" if paper else None,
        }
        return facts_html(f"Scorer {self.name}", facts)

    def check_ready(self, feats: FeatureSet) -> None:
        """Raise the errors that ``score(feats)`` raises before it reads a row."""
        if not self.is_fitted:
            raise NotFitted(f"{self.name!r} is fitted on in-distribution features: {FIT_SET.how_to_get('python')}.")
        self.check_has(feats)
        fitted, found = self.fitted_widths or {}, widths(feats)
        for name in fitted.keys() & set(self.needs) & found.keys():
            if fitted[name] != found[name]:
                raise ShapeMismatch(
                    f"{self.name!r} was fitted on {name} of width {fitted[name]}, but this set has width "
                    f"{found[name]}: use sets from the same model."
                )
        require_same_features(feats.provenance, self.fitted_on, "this set", f"the set that {self.name!r} was fitted on")

    def why_no_graph(self) -> str | None:
        """Return the reason why this scorer cannot be exported as a graph, as a clause, or None if it can."""
        extras = [name for name in self.needs if name not in IN_A_GRAPH]
        if self.tags.no_graph or not extras:
            return self.tags.no_graph
        return f"it reads {', '.join(extras)}, which a plain forward pass of the model does not compute"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the scorer and its fitted state as one safetensors file, replacing a scorer saved there before.

        Raises:
            NotFitted: if the scorer needs a fit and has not been fitted.
            BadInput: if its class is not registered, or if it holds a value that cannot be saved.
            ForeignFile: if the path holds something other than a saved scorer.
            CacheWriteFailed: if the disk is full or fails; a scorer saved there before is kept.
        """
        save_scorer(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Scorer:
        """Load a scorer of any class that ``save`` wrote: it is equal to it, with the same scores bit for bit.

        Raises:
            FileNotFoundError: if there is no such file.
            ForeignFile: if it is not a saved scorer, or if a newer version of this package wrote it.
            DamagedCache: if it is truncated or unreadable.
            UnknownName: if the class of the scorer is not registered.
        """
        return load_scorer(path)

    def fitted_state(self) -> dict[str, Any]:
        """Return the fitted state to save: by default, the attributes whose names end in an underscore."""
        return {name: value for name, value in vars(self).items() if name.endswith("_") and not name.startswith("_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``fitted_state`` returned.

        Raises:
            BadInput: if a name is not that of a fitted attribute, or if a value is not of the type that the class
                declares for it.
        """
        check_types(type(self), state, self.name)
        for name, value in state.items():
            self.require(name.endswith("_") and not name.startswith("_"), f"{name!r} is no fitted attribute")
            setattr(self, name, value)

    def check_has(self, feats: FeatureSet, fitting: bool = False) -> None:
        """Check that a set has rows and everything that the scoring, or the fit, reads.

        Raises:
            EmptyInput: if the set has no rows.
            MissingInput: if the set lacks something.
        """
        if len(feats) == 0:
            raise EmptyInput("this feature set has no rows.")
        for requirement in requirements(self, fitting):
            if not requirement.met_by(feats.has):
                purpose = "be fitted on" if fitting else "score"
                raise MissingInput(
                    f"{self.name!r} needs {requirement.name} to {purpose} this feature set: "
                    f"{requirement.how_to_get('python')}.",
                    requirement.how_to_get("command line"),
                )

    def require_positive(self, parameter: str) -> None:
        """Raise BadInput unless a parameter is a positive, finite number."""
        value = getattr(self, parameter)
        self.require(0 < value < math.inf, f"{parameter} must be positive and finite, got {value}")

    def require_count(self, parameter: str) -> None:
        """Raise BadInput unless a parameter is a whole number of at least 1."""
        value = getattr(self, parameter)
        whole = isinstance(value, Integral) and int(value) >= 1
        self.require(whole, f"{parameter} must be a whole number of at least 1, got {value}")

    def require_choices(self) -> None:
        """Raise BadInput unless every parameter annotated as ``Literal`` has one of the listed values."""
        check_choices(self, self.name)

    def require(self, condition: bool, message: str) -> None:
        """Raise BadInput, with the name of the scorer, unless a condition on its parameters holds."""
        if not condition:
            raise BadInput(f"{self.name}: {message}.")


def as_scorer(scorer: str | Scorer, **params: Any) -> Scorer:
    """Create a scorer from a name and parameters, or return a scorer as it is."""
    if isinstance(scorer, str):
        return create_scorer(scorer, **params)
    if not isinstance(scorer, Scorer):
        raise BadInput(f"scorer must be a registered name or a Scorer object, got {type(scorer).__name__}.")
    if params:
        raise BadInput(
            f"{scorer.name!r} exists already, so {', '.join(params)} cannot be set: pass the name of the scorer, or "
            "set parameters when you create it."
        )
    return scorer
