"""Fusion: several scorers as one, on the common scale of their conformal p-values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ood_scores.errors import NotFinite
from ood_scores.features import Block, FeatureSet
from ood_scores.features.halves import halves
from ood_scores.features.statistics.base import Found
from ood_scores.scorers.base import Scorer, as_scorer, fitted
from ood_scores.scorers.one_pass import score_all
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work, work_alone

ENDS = 8
"""The number of reference rows with the lowest scores, and of those with the highest, that are scored again."""


def fisher(p: Tensor) -> Tensor:
    """Return ``sum log p`` of p-values ``[M, B]``: a single very small p-value results in a low score."""
    return p.log().sum(dim=0)


def stouffer(p: Tensor) -> Tensor:
    """Return the sum of the normal quantiles of p-values ``[M, B]``, over sqrt(M): high and low p-values cancel."""
    return torch.special.ndtri(p).sum(dim=0) / len(p) ** 0.5


def smallest(p: Tensor) -> Tensor:
    """Return the smallest of p-values ``[M, B]``: a low score of any member is enough for a low score."""
    return p.amin(dim=0)


def p_values(scores: Tensor, reference: Tensor) -> Tensor:
    """Return the p-values ``[M, B]`` of scores among reference scores ``[M, n]``, sorted: all in (0, 1)."""
    places = torch.searchsorted(reference, scores, right=True)
    return (1 + places).double() / (reference.shape[1] + 2)


def leveled(scores: Tensor, member: Scorer, reference: FeatureSet) -> Tensor:
    """Return a member's scores ``[n]`` of reference rows; if they vary by rounding alone, as one number below them all.

    They do if one of the lowest or highest moves by a quarter of the distance between these when its row is a block of
    its own. The number is lower by more than rounding, so that no score is compared with the digits of another.
    """
    order = scores.argsort()
    ends = torch.cat([order[:ENDS], order[-ENDS:]])
    moved = (member.score(reference[ends], block_rows=1) - scores[ends]).abs().max()
    if not moved >= (scores.max() - scores.min()) / 4:  # also where scores are infinite
        return scores
    dtype = torch.promote_types(reference.columns["features"].dtype, torch.float32)
    rounding = torch.maximum(moved, torch.finfo(dtype).eps * scores.abs().max())
    return torch.full_like(scores, float(scores.min() - 4 * rounding))


METHODS: dict[str, Callable[[Tensor], Tensor]] = {"fisher": fisher, "stouffer": stouffer, "min": smallest}


@register_scorer("fusion")
@dataclass
class Fusion(Scorer):
    """Several scorers as one: each score becomes a p-value among n reference rows, and the p-values are combined.

    ``p_i = (1 + #{reference scores of member i <= score}) / (n + 2)``, in (0, 1); ``fisher``: ``sum_i log p_i``;
    ``stouffer``: ``sum_i Phi^-1(p_i) / sqrt(M)``; ``min``: ``min_i p_i``.

    The fit stores the members' scores of the reference rows; where those of a member vary by rounding alone, all scores
    that are not below them count as equal. If all members are already fitted, they are not changed, and all rows are
    reference rows. Otherwise the members that are not fitted are fitted on half of the rows of each class, and the
    other rows are the reference rows: the scores of rows that a member was fitted on are too high. The halves are drawn
    with a fixed seed. Fitted members, and reference rows that neither they nor the model have seen, are best: half of a
    validation set, the other half of which calibrates the detector.

    The members are dependent, so that quantiles of a chi-squared or normal distribution cannot serve as thresholds for
    the combined score. It is calibrated like any other score, on rows that are not used in the fit, and the guarantees
    of ``ood_scores.detector.conformal`` are valid whatever the dependence.

    Source: Fisher 1925, "Statistical Methods for Research Workers"; Stouffer et al. 1949, "The American Soldier";
    Tippett 1931, "The Methods of Statistics" (min). Departure: n + 2 instead of n + 1, so that no p-value is 1, whose
    normal quantile is infinite.

    Fails to distinguish rows whose scores are below those of all reference rows for every member: they have the same
    score.

    Args:
        scorers: the members, as names or Scorers, which are copied and never changed.
        method: ``"fisher"``, ``"stouffer"``, or ``"min"``.

    Cost: that of the members, and a binary search among n numbers for each; stores ``[M, n]`` numbers in float64. A fit
    of members keeps the fit set in memory.
    """

    tags = Tags(
        formula=r"s(x) = \sum_i \log p_i, \quad p_i = \frac{1 + \#\{ j : s_i(x_j) \le s_i(x) \}}{n + 2}",
        paper=Paper(
            "Statistical Methods for Research Workers",
            "Ronald A. Fisher",
            "Oliver and Boyd",
            1925,
            "https://psychclassics.yorku.ca/Fisher/Methods/",
        ),
        no_graph="it looks scores up in sorted lists, for which ONNX has no operation",
        search_space={"method": ("fisher", "stouffer", "min")},
    )
    scorers: Sequence[str | Scorer] = ("energy", "gradnorm")
    method: Literal["fisher", "stouffer", "min"] = "fisher"
    reference_: Tensor = fitted()

    def __post_init__(self) -> None:
        self.require(not isinstance(self.scorers, str), f"scorers must be a list of scorers, got {self.scorers!r}")
        self.require(len(self.scorers) > 0, "at least one scorer is needed")
        self.require_choices()
        self._given = [copy.deepcopy(as_scorer(scorer)) for scorer in self.scorers]
        self._trained: Mapping[int, Scorer] = {}
        self.needs = _union(self._given, "needs")
        self.fit_needs = (
            *self.needs,
            *(name for name in _union(self._unfitted(), "fit_needs") if name not in self.needs),
        )

    def work(self, sizes: Sizes) -> Work:
        halved = replace(sizes, fit_rows=sizes.fit_rows // 2, rows=sizes.rows + sizes.fit_rows // 2)
        return sum((work_alone(member, halved) for member in self._unfitted()), Work())

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        reference = feats
        if self._unfitted():
            self.require(len(feats) >= 2, "fitting members needs at least 2 rows, one of them a reference row")
            rows, reference = (feats[half] for half in halves(feats))
            self._trained = {
                number: copy.deepcopy(member).fit(rows)
                for number, member in enumerate(self._given)
                if not member.is_fitted
            }
        for member in self._members():
            member.check_ready(reference)
        scores = zip(self._members(), score_all(self._members(), reference), strict=True)
        self.reference_ = torch.stack([leveled(found, each, reference) for each, found in scores]).sort(dim=1).values

    def fitted_state(self) -> dict[str, Any]:
        return super().fitted_state() | {"trained": self._trained}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._trained, self.reference_ = state["trained"], state["reference_"]

    def p_values_of_members(self, feats: FeatureSet) -> dict[str, Tensor]:
        """Return the p-values of each member for the rows of a set, float64 ``[N]``, by its name or, if that repeats,
        by its parameters."""
        members = self._members()
        p = p_values(torch.stack(score_all(members, feats)), self.reference_)
        names = [member.name for member in members]
        labels = [name if names.count(name) == 1 else repr(member) for name, member in zip(names, members, strict=True)]
        return dict(zip(labels, p, strict=True))

    def score_block(self, block: Block) -> Tensor:
        members = self._members()
        scores = torch.stack([member.score_block(block).double() for member in members])
        for member, row in zip(members, scores, strict=True):
            if block.happens(row.isnan()):
                first = block.start + int(row.isnan().nonzero()[0])
                raise NotFinite(f"{member.name!r} returned NaN for finite inputs, first for row {first}.")
        return METHODS[self.method](p_values(scores, self.reference_.to(scores.device)))

    def _members(self) -> list[Scorer]:
        return [self._trained.get(number, member) for number, member in enumerate(self._given)]

    def _unfitted(self) -> list[Scorer]:
        return [member for member in self._given if not member.is_fitted]


def _union(scorers: Sequence[Scorer], needs: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for scorer in scorers for name in getattr(scorer, needs)))
