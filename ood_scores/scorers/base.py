"""Scorer: the base class, and how several are fitted and scored in one pass."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field
from numbers import Integral
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ood_scores.errors import (
    BadInput,
    EmptyInput,
    MissingInput,
    NotFinite,
    NotFitted,
    OodScoresError,
    OtherModel,
    ShapeMismatch,
)
from ood_scores.features import Block, FeatureSet, Provenance, as_feature_set
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.collect import collect
from ood_scores.parameters import check_choices
from ood_scores.scorers.registry import create_scorer
from ood_scores.scorers.requirements import FIT_SET, requirements
from ood_scores.scorers.storage import load_scorer, save_scorer
from ood_scores.scorers.tags import Tags

IN_A_GRAPH = ("features", "logits", "head")
"""What a scorer finds in an exported graph."""


def fitted(default: Any = MISSING) -> Any:
    """A dataclass field for an attribute that the fit sets: neither a parameter nor shown nor compared."""
    return field(default=default, init=False, repr=False, compare=False)


class Scorer(ABC):
    """Gives every row of a feature set one float64; **higher = more in-distribution**, without exception.

    A scorer is a dataclass whose fields are its parameters. What it reads it declares in ``needs``; a scorer that is
    fitted on in-distribution data says what the fit reads in ``fit_needs`` and keeps the outcome in attributes that end
    in an underscore. A new scorer writes ``score_block`` and, if it is fitted, ``statistics`` and ``fit_statistics``.
    """

    name: str
    needs: Sequence[str] = ()
    fit_needs: Sequence[str] = ()
    tags: Tags = Tags()
    fitted_widths: Mapping[str, int] | None = None
    fitted_on: Provenance | None = None

    def __init_subclass__(cls) -> None:
        """A scorer that is not registered goes by the name of its class."""
        cls.name = cls.__dict__.get("name", cls.__name__)

    def statistics(self) -> Sequence[Statistic]:
        """The statistics of the fit set that the fit asks for; collected in one pass for all scorers."""
        return ()

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        """Fits from the collected statistics."""
        raise TypeError(f"{self.name!r} needs no fit.")

    @abstractmethod
    def score_block(self, block: Block) -> Tensor:
        """Scores ``[B]`` of one block."""

    def scored_with(self) -> Hashable:
        """A key that it has in common with scorers of which one can score all faster; None for a scorer by itself."""
        return None

    def score_together(self, block: Block, scorers: Sequence[Scorer]) -> Sequence[Tensor]:
        """What each of the scorers with this one's key, itself among them, gives by itself; some of it done once."""
        return [scorer.score_block(block) for scorer in scorers]

    def fit(self, feats: FeatureSet, *, block_rows: int | None = None) -> Scorer:
        """Fit on in-distribution features, in blocks, and return the scorer itself.

        Args:
            feats: the fit set, usually of the training data.
            block_rows: rows of a block; by default as ``FeatureSet.blocks`` chooses it.

        Raises:
            EmptyInput: if the set has no rows.
            MissingInput: if the set lacks what the fit reads.
            NotFinite: if the set holds NaN or infinite values.
            BadLabels: if the fit reads labels, and they are not class indices of the model.
        """
        fit_all([self], feats, block_rows=block_rows)
        return self

    @property
    def is_fitted(self) -> bool:
        """True from the start for a scorer that needs no fit."""
        return not self.fit_needs or self.fitted_widths is not None

    def score(self, feats: FeatureSet, *, block_rows: int | None = None) -> Tensor:
        """Scores every row: float64 ``[N]`` on the CPU, higher = more in-distribution.

        Raises:
            NotFitted: the scorer is fitted on in-distribution features and has not been.
            MissingInput: the set lacks what the scorer reads.
            ShapeMismatch: the set has other widths than the one the scorer was fitted on.
            OtherModel: both sets say which weights they come from, and they are not the same.
            NotFinite: what the scorer reads holds NaN or infinite values, or a score is NaN.
            EmptyInput: the set has no rows.
        """
        self.check_ready(feats)
        (scores,) = score_all([self], feats, block_rows=block_rows)
        return scores

    def check_ready(self, feats: FeatureSet) -> None:
        """Raises what ``score(feats)`` raises before it reads a row."""
        if not self.is_fitted:
            raise NotFitted(f"{self.name!r} is fitted on in-distribution features: {FIT_SET.how_to_get('python')}.")
        self.check_has(feats)
        fitted, found = self.fitted_widths or {}, _widths(feats)
        for name in fitted.keys() & set(self.needs) & found.keys():
            if fitted[name] != found[name]:
                raise ShapeMismatch(
                    f"{self.name!r} was fitted on {name} of width {fitted[name]}, here they have {found[name]}: both "
                    "sets must come from the same model."
                )
        require_same_weights(feats.provenance, self.fitted_on, "this set", f"the set that {self.name!r} was fitted on")

    def why_no_graph(self) -> str | None:
        """The reason why this scorer cannot be exported as a graph, as a clause; None if it can be."""
        extras = [name for name in self.needs if name not in IN_A_GRAPH]
        if self.tags.no_graph or not extras:
            return self.tags.no_graph
        return f"it reads {', '.join(extras)}, which the forward pass of the model alone does not give"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the scorer, with what its fit found, as one safetensors file, replacing a scorer already there.

        Raises:
            NotFitted: the scorer is fitted on in-distribution features and has not been.
            BadInput: its class is not registered, or it holds something that cannot be stored.
            ForeignFile: something that is not a saved scorer is in the way.
            CacheWriteFailed: the disk refused; a scorer that was there before is still there.
        """
        save_scorer(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Scorer:
        """The scorer that ``save`` wrote, of whatever class: equal to it, with the same scores bit for bit.

        Raises:
            FileNotFoundError: there is no such file.
            ForeignFile: it is not a saved scorer, or was written by a newer version of this package.
            DamagedCache: it is truncated or unreadable.
            UnknownName: its scorer is not registered here.
        """
        return load_scorer(path)

    def fitted_state(self) -> dict[str, Any]:
        """What a saved file keeps of the fit: by default the attributes that end in an underscore."""
        return {name: value for name, value in vars(self).items() if name.endswith("_") and not name.startswith("_")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``fitted_state`` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def check_has(self, feats: FeatureSet, fitting: bool = False) -> None:
        """Check that a set has rows, and what the fit or the scoring reads.

        Raises:
            EmptyInput: if the set has no rows.
            MissingInput: if the set lacks what is read.
        """
        if len(feats) == 0:
            raise EmptyInput("this feature set has no rows.")
        for requirement in requirements(self, fitting):
            if not requirement.met_by(feats.has):
                purpose = "be fitted on" if fitting else "score"
                raise MissingInput(
                    f"{self.name!r} needs {requirement.name} to {purpose} this feature set: "
                    f"{requirement.how_to_get('python')}."
                )

    def require_positive(self, parameter: str) -> None:
        """Raises BadInput unless the parameter is a positive, finite number."""
        value = getattr(self, parameter)
        self.require(0 < value < math.inf, f"{parameter} must be positive and finite, got {value}")

    def require_count(self, parameter: str) -> None:
        """Raises BadInput unless the parameter is a whole number of at least 1."""
        value = getattr(self, parameter)
        whole = isinstance(value, Integral) and int(value) >= 1
        self.require(whole, f"{parameter} must be a whole number of at least 1, got {value}")

    def require_choices(self) -> None:
        """Raises BadInput unless every parameter annotated as ``Literal`` has one of the values listed there."""
        check_choices(self, self.name)

    def require(self, condition: bool, message: str) -> None:
        """Raises BadInput, naming the scorer, unless the condition holds: for checks of parameters."""
        if not condition:
            raise BadInput(f"{self.name}: {message}.")


def fit_all(
    scorers: Iterable[Scorer],
    feats: FeatureSet,
    *,
    block_rows: int | None = None,
    spent: list[float] | None = None,
) -> None:
    """Fit every scorer that needs a fit, from statistics collected in one pass over the set.

    Args:
        scorers: the scorers; those that need no fit are left as they are.
        feats: the fit set.
        block_rows: rows of a block; by default as ``FeatureSet.blocks`` chooses it.
        spent: receives the seconds of each scorer, 0 for one that needs no fit. A statistic that several scorers share
            is charged to the first of them, a statistic stored with the cache by an earlier fit to none.

    Raises:
        EmptyInput, MissingInput, NotFinite, BadLabels: as ``Scorer.fit``.
    """
    scorers, feats = list(scorers), feats.in_blocks(block_rows)
    fitted = [scorer for scorer in scorers if scorer.fit_needs]
    for scorer in fitted:
        scorer.check_has(feats, fitting=True)
    for scorer in fitted:
        scorer.fitted_widths = None
    by_statistic: dict[Statistic, float] = {}
    found = collect(feats, [statistic for scorer in fitted for statistic in scorer.statistics()], by_statistic)
    seconds = []
    for scorer in scorers:
        if not scorer.fit_needs:
            seconds.append(0.0)
            continue
        start = perf_counter()
        own = Found({statistic: found[statistic] for statistic in scorer.statistics()})
        scorer.fit_statistics(own, feats)
        scorer.fitted_widths, scorer.fitted_on = _widths(feats), feats.provenance
        seconds.append(perf_counter() - start + sum(by_statistic.pop(statistic, 0.0) for statistic in own))
    if spent is not None:
        spent += seconds


def fit_each(
    scorers: Sequence[Scorer], feats: FeatureSet, *, spent: list[float] | None = None
) -> list[OodScoresError | None]:
    """Fit all scorers as ``fit_all`` does, or one by one if that fails, and return the error of each."""
    try:
        fit_all(scorers, feats, spent=spent)
        return [None] * len(scorers)
    except OodScoresError:
        return [_fit_error(scorer, feats, spent) for scorer in scorers]


def _fit_error(scorer: Scorer, feats: FeatureSet, spent: list[float] | None) -> OodScoresError | None:
    try:
        fit_all([scorer], feats, spent=spent)
    except OodScoresError as error:
        if spent is not None:
            spent.append(0.0)
        return error
    return None


def score_all(
    scorers: Sequence[Scorer], feats: FeatureSet, *, block_rows: int | None = None, spent: list[float] | None = None
) -> list[Tensor]:
    """The scores of each scorer, float64 ``[N]`` on the CPU, from one pass over the set; blocks share what they derive.

    Args:
        scorers: fitted, those that are fitted.
        feats: the set.
        block_rows: rows of a block; by default as ``FeatureSet.blocks`` has it.
        spent: gets the seconds of each scorer, without reading. What several derive from a block counts for the first
            of them; scorers that are scored together share their time equally.

    Raises:
        NotFinite: what the scorers read holds NaN or infinite values, or a score is NaN.
        ShapeMismatch: a scorer does not give one score for each row.
        EmptyInput: the set has no rows.
    """
    read = {name for scorer in scorers for name in scorer.needs}
    scores = torch.empty(len(scorers), len(feats), dtype=torch.float64)
    groups = _scored_together(scorers)
    seconds = [0.0] * len(scorers)
    for block in feats.blocks(block_rows, only=read):
        rows = scores[:, block.start : block.start + len(block)]
        try:
            for group in groups:
                start = perf_counter()
                _score_group(group, scorers, block, rows)
                for number in group:
                    seconds[number] += (perf_counter() - start) / len(group)
        finally:
            block.require_finite()  # last: what scorers derived makes it cheaper
    if spent is not None:
        spent += seconds
    for row, scorer in zip(scores, scorers, strict=True):
        if row.isnan().any():
            first = int(row.isnan().nonzero()[0])
            raise NotFinite(f"{scorer.name!r} gave NaN, first for row {first}, from finite features and logits.")
    return list(scores)


def _scored_together(scorers: Sequence[Scorer]) -> list[list[int]]:
    """Numbers of the scorers, those together that are to be scored together."""
    groups: dict[Hashable, list[int]] = {}
    for number, scorer in enumerate(scorers):
        key = scorer.scored_with()
        groups.setdefault(("alone", number) if key is None else key, []).append(number)
    return list(groups.values())


def _score_group(numbers: Sequence[int], scorers: Sequence[Scorer], block: Block, scores: Tensor) -> None:
    """Puts what the scorers of these numbers give into their rows of ``scores`` ``[S, B]``."""
    group = [scorers[number] for number in numbers]
    found = group[0].score_together(block, group) if len(group) > 1 else [group[0].score_block(block)]
    for number, scored in zip(numbers, found, strict=True):
        if scored.shape != (len(block),):
            raise ShapeMismatch(f"{scorers[number].name!r} gave scores {tuple(scored.shape)} for {len(block)} rows.")
        scores[number] = scored


def require_same_weights(one: Provenance | None, other: Provenance | None, name: str, other_name: str) -> None:
    """Raises OtherModel, naming both, if two sets say which weights they come from and these differ."""
    if one and other and one.weights_sha256 != other.weights_sha256:
        raise OtherModel(
            f"{name} comes from {_model(one)}, {other_name} from {_model(other)}: both must come from the same model, "
            "so extract one of them again."
        )


def _model(provenance: Provenance) -> str:
    return f"{provenance.architecture} with weights {provenance.weights_sha256[:12]}…"


def _widths(feats: FeatureSet) -> dict[str, int]:
    widths = {"features": feats.num_features, "logits": feats.num_classes}
    return {name: width for name, width in widths.items() if width is not None}


def as_scorer(scorer: str | Scorer, **params: Any) -> Scorer:
    """A scorer from its name and parameters, or the given one as it is."""
    if isinstance(scorer, str):
        return create_scorer(scorer, **params)
    if not isinstance(scorer, Scorer):
        raise BadInput(f"a scorer is given by its name or as a Scorer object, got {scorer!r}.")
    if params:
        raise BadInput(f"parameters {', '.join(params)} go with a scorer's name, not with one that exists already.")
    return scorer


def score(
    scorer: str | Scorer,
    feats: FeatureSet | Sequence[FeatureSet],
    fit: FeatureSet | Sequence[FeatureSet] | None = None,
    **params: Any,
) -> Tensor:
    """Scores every row of a feature set; **higher = more in-distribution**.

    Args:
        scorer: a registered name (see ``list_scorers``) or a Scorer.
        feats: the set to score; a list of sets of the same data is an ensemble (see ``ood_scores.ensemble``).
        fit: in-distribution features (usually of the training set) for scorers that are fitted; a list likewise.
        **params: parameters of the scorer, when it is given by name.

    Returns:
        float64 ``[N]`` on the CPU.

    Raises:
        UnknownName, BadInput, NotFitted, MissingInput, NotFinite, EmptyInput: see ``Scorer``.
    """
    ready = as_scorer(scorer, **params)
    if fit is not None and ready.fit_needs:
        ready.fit(as_feature_set(fit))
    return ready.score(as_feature_set(feats))
