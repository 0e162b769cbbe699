"""Gaussian mixture: one Gaussian with a full covariance for each class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics import moments as of
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.moments import ClassMoments, Moments
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.gaussian import classes_present
from ood_scores.scorers.numerics.cholesky import (
    LOW_RANK,
    all_solved_squares,
    block_rows,
    cholesky_with_jitter,
    classes_at_a_time,
    inverted_diagonal,
    pack_covariance,
    pack_rows,
    packed_size,
    packed_squares,
    reserved,
    solved_squares,
    squares_about,
    unpacked,
)
from ood_scores.scorers.numerics.pruned_mixture import ClassBounds, class_bounds, squares_that_count
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work
from ood_scores.user_warnings import warn_user

DENSITY_BYTES = 4 * 2**20
"""Bound on the whitened copy ``[rows, D]`` of one step of the density, so that it stays in the CPU caches."""

PRUNED_ROWS, PRUNED_WIDTH = 2, 256
"""The fewest rows of a block for each feature, and the fewest features, for which a CPU leaves out classes that do not
count: their bounds take as long as D / 2 rows to compute."""

NEGLIGIBLE = 64 * math.log(2)
"""The difference of log densities from which on the smaller density, even C of them, changes no digit of their sum."""

UNDERFLOW = 760.0
"""The difference of log densities from which on a responsibility is 0 in float64."""


@register_scorer("gmm")
@dataclass
class GMM(Scorer):
    """Log density of one full-covariance Gaussian for each class, ``logsumexp_c log N(z; mu_c, Sigma_c)``.

    Fits, in float64, class means and covariances (divided by ``n_c - 1``), each with the smallest jitter of ``JITTERS``
    on its diagonal that makes it positive definite. All classes with a single row share the tied covariance, with a
    warning; a class without rows is left out.

    Source: Mukhoti et al. 2021 (DDU); Haas et al. 2022 on L2-normalized features. DDU's code uses one jitter for all
    classes, from a ladder that starts at 2e-308, and accepts a factorization that succeeds only by rounding.

    Fails with fewer rows of a class than features: its covariance is singular, and the jitter determines the density.

    Args:
        space: ``"features"`` or ``"logits"``.
        normalize: L2-normalize in the fit *and* in the score (Haas 2022).
        prior: ``"none"``, equal weights for all classes, as in DDU's code; ``"empirical"``, log n_c/N is added, as in
            the ``q(y)`` of DDU's paper.
        output: ``"density"``; or ``"entropy"``: the negative entropy of the responsibilities of the classes.

    If the covariances together exceed ``CLASS_SCATTER_BYTES`` (1 GiB: C = 1,000 from D = 367 on), they are never in
    memory at the same time. Means are fitted in one pass; another pass reads and factorizes as many classes at a time
    as that bound allows. If the rows of the set are sorted by class, every row is read once more; otherwise once for
    each group of classes, of which there are about ``C D^2 / 2^27``. A class of at most D/4 rows is kept as the
    directions that they span, which are exact to twice the digits, and any other class as a triangle: 17 GiB at C =
    1,000, D = 2,048, and 1,300 rows for each class, where the directions would take 32 GiB and three times the
    operations. Factors beyond the bound go to an unnamed file beside the cache, or in the folder for temporary files,
    and are read class by class for each block that is scored: large blocks (``score(..., block_rows=...)``) read it
    less often. Such a scorer cannot be saved or exported.

    On a CPU, from D = 256 on, and with all factors in memory and none shared, blocks of ``2 D`` rows or more leave out
    the classes whose densities are too small to change a digit of the score, which bounds in float32 tell. If more than
    half of the pairs of a row and a class count, all are computed.

    Cost: ``C D^2`` float64 operations for each row, in matrix products, or ``C D^2 / 8`` in float32 and ``D^2`` in
    float64 for each class that counts; ``C D^2`` float64 of memory, or, if that is more than 1 GiB, at most 2 GiB and a
    dozen ``[D, D]``, and half as many float64, or fewer, on disk.
    """

    tags = Tags(
        formula=r"s(x) = \log \sum_c \mathcal{N}(z; \mu_c, \Sigma_c)",
        aliases=("ddu",),
        paper=Paper(
            "Deep Deterministic Uncertainty: A New Simple Baseline",
            "Jishnu Mukhoti, Andreas Kirsch, Joost van Amersfoort, Philip H.S. Torr, Yarin Gal",
            "CVPR",
            2023,
            "https://arxiv.org/abs/2102.11582",
            "https://github.com/omegafragger/DDU",
        ),
        search_space={"normalize": (False, True)},
    )
    space: Literal["features", "logits"] = "features"
    normalize: bool = False
    prior: Literal["none", "empirical"] = "none"
    output: Literal["density", "entropy"] = "density"
    means_: Tensor = fitted()
    cholesky_: Tensor = fitted()
    log_weights_: Tensor = fitted()
    jitter_: Tensor = fitted()
    packed_: Tensor | None = fitted(None)
    ranks_: Tensor | None = fitted(None)
    factors_: Tensor | None = fitted(None)
    """The number of the factor of each class, int64 ``[C]``; in files of earlier versions, every class has its own."""

    def __post_init__(self) -> None:
        self.require_choices()
        self.needs = (self.space,)
        self.fit_needs = (self.space, "labels")

    def work(self, sizes: Sizes) -> Work:
        width = sizes.features if self.space == "features" else sizes.classes
        scored = 4.0 * sizes.rows * sizes.classes * width**2  # in float64
        return Work(scored, min(8.0 * sizes.classes * width**2, 2**31))

    def statistics(self) -> tuple[ClassMoments]:
        return (ClassMoments(self.space, self.normalize, per_class=True),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[self.statistics()[0]]
        present = classes_present(moments.counts, self.name)
        classes, counts = present.nonzero()[:, 0], moments.counts[present]
        if (counts == 1).any():
            warn_user(
                f"gmm: {int((counts == 1).sum())} classes have a single fit row and get the tied covariance.",
            )
        self.means_ = moments.means[present]
        self.factors_, firsts = _factors(counts)
        fit = self._fit_dense if moments.class_scatter is not None else self._fit_packed
        log_determinant = fit(moments, classes[firsts], feats)[self.factors_]
        normalizer = -0.5 * (log_determinant + self.means_.shape[1] * math.log(2 * math.pi))
        self.log_weights_ = normalizer + ((counts.double() / counts.sum()).log() if self.prior == "empirical" else 0)

    def _fit_dense(self, moments: Moments, classes: Tensor, feats: FeatureSet) -> Tensor:
        """Fit the covariances of these classes at once, and return the logarithms of their determinants, ``[F]``."""
        assert moments.class_scatter is not None
        counts = moments.counts[classes]
        covariances = moments.class_scatter[classes].div_((counts - 1).clamp_min(1)[:, None, None])
        covariances[counts == 1] = moments.scatter / moments.counts.sum()
        self.cholesky_, self.jitter_ = cholesky_with_jitter(covariances)
        self.packed_ = self.ranks_ = None
        return 2 * self.cholesky_.diagonal(dim1=1, dim2=2).log().sum(dim=1)

    def _fit_packed(self, moments: Moments, classes: Tensor, feats: FeatureSet) -> Tensor:
        """Fit some of these classes at a time, and return the same as ``_fit_dense``."""
        counts, means = moments.counts[classes].cpu(), moments.means[classes].to(feats.block_device)
        width = means.shape[1]
        self.ranks_ = torch.where((counts > 1) & (counts <= LOW_RANK * width), counts, width)
        sizes = [packed_size(rank, width) for rank in self.ranks_.tolist()]
        small = 8 * sum(sizes) <= of.CLASS_SCATTER_BYTES
        folder = feats.file.parent if feats.file else None
        self.packed_ = torch.empty(sum(sizes), dtype=torch.float64) if small else reserved(sum(sizes), folder)
        self.cholesky_ = means.new_empty(0, width, width)
        self.jitter_, log_determinant = means.new_zeros(2, len(classes)).unbind()
        places = self.packed_.split(sizes)
        own = counts > 1
        for number, found in self._classes_read(feats, classes[own.to(classes.device)], means, self.ranks_.tolist()):
            count, rank = int(counts[number]), int(self.ranks_[number])
            if rank < width:
                packed, jitter, log_determinant[number] = pack_rows(found.div_(math.sqrt(count - 1)), number)
            else:
                packed, jitter, log_determinant[number] = pack_covariance(found.div_(count - 1), number)
            places[number].copy_(packed)
            self.jitter_[number] = jitter
        if not own.all():
            tied = moments.scatter / moments.counts.sum()
            packed, self.jitter_[-1], log_determinant[-1] = pack_covariance(tied, len(classes) - 1)
            places[-1].copy_(packed)
        return log_determinant.to(moments.means.device)

    def _classes_read(
        self, feats: FeatureSet, classes: Tensor, means: Tensor, ranks: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the place of each class in ``classes`` with its centered rows ``[n, D]`` if n is its rank, else its
        scatter ``[D, D]``.

        Classes are ordered by their first rows. Only the rows between the first and the last one of the classes that
        are in memory together are read: of a sorted set, only theirs.
        """
        width, labels = means.shape[1], feats.class_labels().cpu()
        places = labels.new_full((int(labels.max()) + 1,), len(classes))
        places[classes.cpu()] = torch.arange(len(classes))
        numbers = places[labels]
        first, last = (rows[: len(classes)] for rows in _first_and_last(numbers))
        for group in _groups(first.argsort().tolist(), ranks, of.CLASS_SCATTER_BYTES // (8 * width)):
            found = {number: means.new_zeros(ranks[number], width) for number in group}
            filled = dict.fromkeys(group, 0)
            start, stop = int(first[group].min()), int(last[group].max()) + 1
            for block in feats[start:stop].blocks(only=(self.space,)):
                values = block.space(self.space, self.normalize)
                here = numbers[start + block.start : start + block.start + len(block)]
                for number in found.keys() & set(here.tolist()):
                    rows = values[(here == number).to(values.device)] - means[number]
                    if ranks[number] == width:
                        found[number].addmm_(rows.T, rows)
                    else:
                        found[number][filled[number] : filled[number] + len(rows)] = rows
                        filled[number] += len(rows)
            yield from found.items()

    def why_no_graph(self) -> str | None:
        if self.packed_ is not None:
            return "its covariances are too large for a graph: fit it on logits or fewer features"
        return super().why_no_graph()

    def fitted_state(self) -> dict[str, Any]:
        """Return the state to save.

        Raises:
            BadInput: if the factors are in a file of their own.
        """
        if self.packed_ is not None and self.packed_.nbytes > of.CLASS_SCATTER_BYTES:
            raise BadInput(
                f"gmm: its {len(self.means_):,} covariances take {self.packed_.nbytes / 2**30:,.1f} GiB, too much to "
                "save: fit it where it is needed, or on logits or fewer features."
            )
        return super().fitted_state()

    def score_block(self, block: Block) -> Tensor:
        log_densities = self._log_densities(block.space(self.space, self.normalize))
        if self.output == "density":
            return log_densities.logsumexp(dim=1)
        log_responsibilities = log_densities.log_softmax(dim=1)
        return (log_responsibilities.exp() * log_responsibilities).sum(dim=1)

    def _log_densities(self, values: Tensor) -> Tensor:
        """``log pi_c N(z; mu_c, Sigma_c)``, ``[B, C]``, exact where it counts."""
        return self.log_weights_.to(values) - 0.5 * self._distances(values).T

    def _distances(self, values: Tensor) -> Tensor:
        """``(z - mu_c)^T Sigma_c^-1 (z - mu_c)``, ``[C, B]``, or a lower bound if that is too large to count."""
        if self.packed_ is not None and self.ranks_ is not None:
            return self._packed_distances(self.packed_, self.ranks_, values)
        means, factors, inverses = (part.to(values.device) for part in (self.means_, self.cholesky_, self._inverses()))
        if torch.compiler.is_compiling() or values.device.type != "cpu":
            return self._batched_distances(values, means, factors, inverses)
        width, alone = means.shape[1], 1 < len(means) == len(factors)
        if alone and width >= PRUNED_WIDTH and len(values) >= PRUNED_ROWS * width:
            return self._pruned_distances(values, means, factors, inverses)
        return self._all_distances(values, means, factors, inverses)

    def _all_distances(self, values: Tensor, means: Tensor, factors: Tensor, inverses: Tensor) -> Tensor:
        """All squared distances, ``[C, B]``, for some rows and one class at a time to bound memory."""
        distances = values.new_empty(len(means), len(values))
        for rows, found in zip(*(part.split(self._rows(), dim=-1) for part in (values.T, distances)), strict=True):
            columns = rows.contiguous()
            for number, members in enumerate(self._members()):
                found[members] = squares_about(block_rows(factors[number], inverses[number]), columns, means[members])
        return distances

    def _pruned_distances(self, values: Tensor, means: Tensor, factors: Tensor, inverses: Tensor) -> Tensor:
        """The squared distances that count and lower bounds of all others, ``[C, B]``; no factor is shared."""
        numbers = range(len(means)) if self.factors_ is None else self.factors_.tolist()

        def squares(c: int, rows: Tensor) -> Tensor:
            factor, inverse = factors[numbers[c]], inverses[numbers[c]]
            pieces = [(values[piece] - means[c]).T for piece in rows.split(self._rows())]
            return torch.cat([solved_squares(block_rows(factor, inverse), piece) for piece in pieces])

        def all_squares() -> Tensor:
            return self._all_distances(values, means, factors, inverses)

        negligible = NEGLIGIBLE + math.log(len(means)) if self.output == "density" else UNDERFLOW
        bounds = self._bounds(means, factors, numbers).squares(values)
        return squares_that_count(bounds, self.log_weights_.to(values), negligible, squares, all_squares)

    def _bounds(self, means: Tensor, factors: Tensor, numbers: Sequence[int]) -> ClassBounds:
        """The ``class_bounds``, computed once."""
        known: tuple[Tensor, ClassBounds] | None = getattr(self, "_bounded", None)
        if known is None or known[0] is not self.cholesky_:
            known = self._bounded = self.cholesky_, class_bounds(means, factors, numbers)
        return known[1]

    def _batched_distances(self, values: Tensor, means: Tensor, factors: Tensor, inverses: Tensor) -> Tensor:
        """The same as ``_packed_distances`` in batched products of many classes; of all, in a graph."""
        own = torch.arange(len(means), device=values.device) if self.factors_ is None else self.factors_
        at_a_time = len(means) if torch.compiler.is_compiling() else classes_at_a_time(values.numel())
        groups = zip(means.split(at_a_time), own.split(at_a_time), strict=True)
        return torch.cat(
            [
                all_solved_squares(factors[numbers], inverses[numbers], (values - here[:, None]).mT)
                for here, numbers in groups
            ]
        )

    def _packed_distances(self, packed: Tensor, all_ranks: Tensor, values: Tensor) -> Tensor:
        """``(z - mu_c)^T Sigma_c^-1 (z - mu_c)``, ``[C, B]``; each factor is read once for all rows."""
        self.require(not torch.compiler.is_compiling(), "its covariances are too large for an exported graph")
        width, means = values.shape[1], self.means_.to(values)
        pieces = [piece.contiguous() for piece in values.T.split(self._rows(), dim=1)]
        ranks, jitters = self._ranks_and_jitters(all_ranks)
        factors = packed.split([packed_size(rank, width) for rank in ranks])
        distances = values.new_empty(len(means), len(values))
        for factor, rank, jitter, members in zip(factors, ranks, jitters, self._members(), strict=True):
            here = factor.to(values.device)
            if rank == width:
                found = [squares_about(unpacked(here, width), piece, means[members]) for piece in pieces]
            else:
                found = [packed_squares(here, rank, jitter, piece - means[members].T)[None] for piece in pieces]
            distances[members] = torch.cat(found, dim=1)
        return distances

    def _ranks_and_jitters(self, ranks: Tensor) -> tuple[list[int], list[float]]:
        """The ranks and jitters of the factors as numbers, which the host gets from a GPU once."""
        known: tuple[Tensor, list[int], list[float]] | None = getattr(self, "_numbers", None)
        if known is None or known[0] is not ranks:
            known = self._numbers = ranks, ranks.tolist(), self.jitter_.tolist()
        return known[1:]

    def _members(self) -> list[slice | list[int]]:
        """The classes of each factor, as a slice if they are consecutive; computed once."""
        known: tuple[Tensor, list[slice | list[int]]] | None = getattr(self, "_grouped", None)
        if known is None or known[0] is not self.means_:
            known = self._grouped = self.means_, list(map(_as_slice, self._classes_of_factors()))
        return known[1]

    def _classes_of_factors(self) -> list[list[int]]:
        numbers = range(len(self.means_)) if self.factors_ is None else self.factors_.tolist()
        members: dict[int, list[int]] = {}
        for c, number in enumerate(numbers):
            members.setdefault(number, []).append(c)
        return [members[number] for number in sorted(members)]

    def _rows(self) -> int:
        return max(1, DENSITY_BYTES // (8 * self.means_.shape[1]))

    def _inverses(self) -> Tensor:
        """Inverses of the diagonal blocks of the factors, ``[C, blocks, S, S]``; computed once."""
        known: tuple[Tensor, Tensor] | None = getattr(self, "_inverted", None)
        if known is None or known[0] is not self.cholesky_:
            known = self.cholesky_, inverted_diagonal(self.cholesky_)
            if not torch.compiler.is_compiling():  # those of a graph are no numbers
                self._inverted = known
        return known[1]


def _as_slice(numbers: list[int]) -> slice | list[int]:
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if numbers == list(range(first, last + 1)) else numbers


def _factors(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the factor of each class ``[C]``, and the first class of each factor ``[F]``, given the numbers of
    their rows: classes with a single row share the last factor."""
    own = counts > 1
    firsts = torch.cat([own.nonzero()[:, 0], (~own).nonzero()[:1, 0]])
    return torch.where(own, own.cumsum(dim=0) - 1, own.sum()), firsts


def _first_and_last(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last row of each class, from the class numbers of all rows."""
    rows, empty = torch.arange(len(numbers)), torch.zeros(int(numbers.max()) + 1, dtype=torch.int64)
    first = empty.scatter_reduce(0, numbers, rows, "amin", include_self=False)
    return first, empty.scatter_reduce(0, numbers, rows, "amax", include_self=False)


def _groups(order: Sequence[int], ranks: Sequence[int], most: int) -> list[list[int]]:
    """Runs of that order whose ranks add up to at most ``most``; a class of a larger rank is a group of its own."""
    groups: list[list[int]] = []
    room = 0
    for number in order:
        if not groups or ranks[number] > room:
            groups.append([])
            room = most
        groups[-1].append(number)
        room -= ranks[number]
    return groups
