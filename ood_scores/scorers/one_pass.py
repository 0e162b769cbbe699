"""Functions that fit and score several scorers in one pass over a set."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ood_scores.errors import BadInput, NotFinite, OodScoresError, ShapeMismatch
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.row_hashes import ROW_HASHES, pending
from ood_scores.progress import tell_cost, tells_costs, worked, working
from ood_scores.runtime import Cost, default_torch_state
from ood_scores.scorers.compatibility import widths
from ood_scores.scorers.queued import DeviceClock, QueuedScores

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer


@default_torch_state()
def fit_all(
    scorers: Iterable[Scorer],
    feats: FeatureSet,
    *,
    block_rows: int | None = None,
    spent: list[Cost] | None = None,
    hashed: bool = False,
    errors: list[OodScoresError | None] | None = None,
) -> None:
    """Fit every scorer that needs a fit, from statistics collected in one pass over the set.

    Args:
        scorers: the scorers; scorers that need no fit are not changed.
        feats: the fit set.
        block_rows: rows per block; by default, ``FeatureSet.blocks`` chooses it.
        spent: a list to which the cost of each scorer is appended, 0 if it needs no fit. A statistic shared by
            several scorers is charged to the first of them; a statistic stored with the cache is charged to none.
        hashed: whether to compute ``RowHashes`` of the set in the same pass, if the fits read its features.
        errors: a list that receives the error of each scorer, or None; without it, the first error is raised. Errors
            about the set itself are always raised, before a scorer is fitted.

    Raises:
        EmptyInput, MissingInput, NotFinite, BadLabels: as ``Scorer.fit``.
    """
    scorers, feats = list(scorers), feats.in_blocks(block_rows)
    fitted = [scorer for scorer in scorers if scorer.fit_needs]
    for scorer in fitted:
        scorer.check_has(feats, fitting=True)
    for scorer in fitted:
        scorer.fitted_widths = None
    by_statistic: dict[Statistic, Cost] = {}
    wanted: list[Statistic] = [statistic for scorer in fitted for statistic in scorer.statistics()]
    hashed = hashed and any("features" in statistic.reads for statistic in wanted)
    found = collect(feats, [*wanted, *[ROW_HASHES] * hashed], by_statistic)
    costs = {id(scorer): Cost() for scorer in scorers}
    failed: dict[int, OodScoresError] = {}
    for number, scorer in enumerate(fitted):
        working("fitting", len(fitted), "scorers")  # again for each, because a shaper fits its base
        worked(number, scorer.name)
        cost = Cost()
        own = Found({statistic: found[statistic] for statistic in scorer.statistics()})
        try:
            with cost.measured(tells_costs()):
                scorer.fit_statistics(own, feats)
        except OodScoresError as error:
            if errors is None:
                raise
            failed[id(scorer)] = error
            continue
        scorer.keep_on_cpu()
        scorer.fitted_widths, scorer.fitted_on = widths(feats), feats.provenance
        costs[id(scorer)] = sum((by_statistic.pop(statistic, Cost()) for statistic in own), cost)
        tell_cost(f"the fit of {scorer.name}", costs[id(scorer)])
    if spent is not None:
        spent += [costs[id(scorer)] for scorer in scorers]
    if errors is not None:
        errors += [failed.get(id(scorer)) for scorer in scorers]


@default_torch_state()
def score_all(
    scorers: Sequence[Scorer],
    feats: FeatureSet,
    *,
    block_rows: int | None = None,
    spent: list[Cost] | None = None,
    hashed: bool = False,
    read_logits: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:
    """Return the scores of each scorer, float64 ``[N]`` on the CPU, from one pass over a set.

    Args:
        scorers: the scorers, fitted if they need a fit.
        feats: the set to score.
        block_rows: rows per block; by default, ``FeatureSet.blocks`` chooses it.
        spent: a list to which the cost of each scorer is appended, without the time to read the set. Work shared by
            several scorers is charged to the first that needs it; scorers scored in one call share its cost equally.
        hashed: whether to compute ``RowHashes`` of the set in the same pass, if the scorers read its features.
        read_logits: a function that is called with the logits ``[B, C]`` of each block, in order, on the CPU. From a
            device they come in the same transfer as the scores, as float64.

    Raises:
        NotFinite: if the data that the scorers read contain NaN or infinite values, or if a score is NaN.
        ShapeMismatch: if a scorer does not return one score per row.
        EmptyInput: if the set has no rows.
    """
    read = {name for scorer in scorers for name in scorer.needs} | ({"logits"} if read_logits else set())
    scores = torch.empty(len(scorers), len(feats), dtype=torch.float64)
    groups = _scored_together(scorers)
    costs, clock = [Cost() for _ in groups], DeviceClock(tells_costs())

    def write_scores(block: Block, rows: Tensor) -> None:
        here = [scorer.on_device(block.device) for scorer in scorers]
        for group, cost in zip(groups, costs, strict=True):
            worked(block.start, scorers[group[0]].name)
            with clock.measured(cost, block.device):
                _score_group(group, here, block, rows)

    queued = QueuedScores(write_scores)
    working(f"scoring {feats.provenance.dataset if feats.provenance else 'a set'}", len(feats), "rows")
    hashes = pending(feats) if hashed and "features" in read else None
    for block in feats.blocks(block_rows, only=read):
        rows, logits = scores[:, block.start : block.start + len(block)], block.logits if read_logits else None
        if block.device.type != "cpu":
            logits = None if logits is None else torch.empty(logits.shape, dtype=torch.float64)
            queued.write(block, rows, logits)
            clock.settle()
        else:
            try:
                write_scores(block, rows)
            finally:
                block.require_finite()  # last, because quantities that the scorers derived make the check cheaper
        if read_logits and logits is not None:
            read_logits(logits)
        if hashes:
            hashes.update(block)
    if hashes:
        hashes.keep(feats)
    shares = _shared(costs, groups)
    if spent is not None:
        spent += shares
    found = list(scores.unbind())
    for row, scorer, cost in zip(found, scorers, shares, strict=True):
        tell_cost(f"scoring {len(feats):,} rows with {scorer.name}", cost)
        if math.isnan(row.sum()) and row.isnan().any():  # a sum is the cheaper pass
            first = int(row.isnan().nonzero()[0])
            raise NotFinite(f"{scorer.name!r} returned NaN for finite inputs, first for row {first}.")
    return found


def _scored_together(scorers: Sequence[Scorer]) -> list[list[int]]:
    """Group the indices of the scorers that are scored in one call."""
    groups: dict[Hashable, list[int]] = {}
    for number, scorer in enumerate(scorers):
        key = scorer.scored_with()
        groups.setdefault(("alone", number) if key is None else key, []).append(number)
    return list(groups.values())


def _shared(costs: Sequence[Cost], groups: Sequence[Sequence[int]]) -> list[Cost]:
    """Return the cost of each scorer, an equal share of that of its group."""
    shares = {
        number: Cost(cost.seconds / len(group), cost.memory // len(group))
        for cost, group in zip(costs, groups, strict=True)
        for number in group
    }
    return [shares[number] for number in sorted(shares)]


def _score_group(numbers: Sequence[int], scorers: Sequence[Scorer], block: Block, scores: Tensor) -> None:
    """Write the scores of the scorers with these indices into their rows of ``scores`` ``[S, B]``."""
    group = [scorers[number] for number in numbers]
    found = group[0].score_together(block, group) if len(group) > 1 else [group[0].score_block(block)]
    for number, scored in zip(numbers, found, strict=True):
        if not isinstance(scored, Tensor):
            raise BadInput(
                f"{scorers[number].name!r} returned {type(scored).__name__} from score_block: return a tensor with one "
                "score per row. Of block.logits.max(dim=1), for one, that is .values; torch.as_tensor converts arrays."
            )
        if scored.shape != (len(block),):
            raise ShapeMismatch(
                f"{scorers[number].name!r} returned scores of shape {tuple(scored.shape)} for {len(block)} rows: "
                "score_block must return one score per row."
            )
        scores[number] = scored
