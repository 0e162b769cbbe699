"""Nearest neighbors: distances and similarities to the features of the fit set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.finite import all_finite
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.row_samples import Energies, Rows
from ood_scores.optional_packages import installed
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.numerics.distances import squared_distances
from ood_scores.scorers.numerics.exact_search import Summed, Wanted, search_unit_rows
from ood_scores.scorers.numerics.faiss_index import faiss_library, index_of_bytes, kept_index, trained_index
from ood_scores.scorers.numerics.nearest import exact_neighbors
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work, search_of

CLOSE = 0.1
"""Neighbors nearer than this share of the row's norm are searched for in float64."""

AROUND = 4
"""How many neighbors before and after the k-th ``knn`` examines in float64."""

SPARE = 10
"""How many neighbors beyond k ``nnguide`` examines in float64."""

GRAPH_ROWS = 50_000
"""The largest bank of fit rows that fits into an exported graph."""


class Searcher(Protocol):
    """A scorer that reads inner products with a bank of unit rows, which several of one pass may share."""

    def request(self, block: Block) -> Wanted | Summed | None:
        """The request to a search of the bank; None if products in float32 do not suffice for the block."""

    def judge(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        """The scores ``[B]``, from what was found for the normalized rows, float64 ``[B, D]``."""

    def score_block(self, block: Block) -> Tensor:
        """The scores ``[B]`` from products of its own."""


def search_together(block: Block, scorers: Sequence[Scorer]) -> list[Tensor]:
    """The scores of searchers of one bank of unit rows, whose products with the block are computed once."""
    searchers = cast("Sequence[Searcher]", scorers)
    rows = block.space("features", True)
    requests = [scorer.request(block) for scorer in searchers]
    shared = [each for each in requests if each]
    found = iter(search_unit_rows(rows.float(), shared) if shared else ())
    return [
        scorer.judge(block, rows, next(found)) if asked else scorer.score_block(block)
        for scorer, asked in zip(searchers, requests, strict=True)
    ]


def same_bank(bank: Tensor) -> Hashable:
    """The key of ``Scorer.scored_with`` for searchers of a bank."""
    return "bank", bank.data_ptr(), tuple(bank.shape)


@dataclass
class _BankScorer(Scorer):
    """Base class of ``knn`` and ``nnguide``: a float32 search of the bank finds candidates, judged in float64.

    Scorers of one pass that search the same normalized bank search it once, together, because their inner products with
    the bank are the same matrix. On a CPU, a scorer that is scored alone leaves the search to faiss, if that is
    installed, which finds a single list sooner.
    """

    bank_: Tensor = fitted()

    @abstractmethod
    def search(self, rows: Tensor) -> Tensor:
        """The numbers of each row's candidates, best first, from an index of the scorer's own."""

    @abstractmethod
    def wanted(self) -> Wanted:
        """The request of this scorer to a search of the normalized bank."""

    @abstractmethod
    def judge(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        """The scores, from the numbers of the candidates."""

    def why_no_graph(self) -> str | None:
        return super().why_no_graph() or why_no_graph_of(getattr(self, "bank_", None))

    def work(self, sizes: Sizes) -> Work:
        return search_of(getattr(self, "share", 1.0) * sizes.fit_rows, sizes.rows, sizes.features)

    def scored_with(self) -> Hashable:
        return same_bank(self.bank_)

    @abstractmethod
    def score_against_all(self, block: Block, rows: Tensor, bank: Tensor) -> Tensor:
        """The scores without an index, as in a traced graph: all in float64."""

    def score_block(self, block: Block) -> Tensor:
        rows = self._rows(block)
        if torch.compiler.is_compiling():
            return self.score_against_all(block, rows, self.bank_.to(rows))
        return self.judge(block, rows, self.search(rows))

    def score_together(self, block: Block, scorers: Sequence[Scorer]) -> list[Tensor]:
        return search_together(block, scorers)

    def request(self, block: Block) -> Wanted | None:
        return self.of_own_bank()

    def of_own_bank(self) -> Wanted:
        """``wanted()``, whose ranking is computed once."""
        known: tuple[Tensor, Wanted] | None = getattr(self, "_asked", None)
        if known is None or known[0] is not self.bank_:
            self._asked = self.bank_, self.wanted()
        return self._asked[1]

    def compared(self, block: Block) -> Tensor:
        return self._rows(block)

    def _rows(self, block: Block) -> Tensor:
        return block.space("features", True)


@register_scorer("knn")
@dataclass
class KNN(_BankScorer):
    """Negative Euclidean distance to the k-th nearest in-distribution feature.

    Fits a bank: the (L2-normalized) features of the fit set, float32, for a faiss index.

    Source: Sun et al. 2022, "Out-of-Distribution Detection with Deep Nearest Neighbors"; k = 50 is their choice for
    CIFAR-10 (200 for CIFAR-100, 1,000 for all of ImageNet). Neighbors are found in float32; the distances of the k-th
    and of ``AROUND`` on either side of it are then computed in float64 from the differences, and the k-th is chosen
    among them. The search expands ``|x - y|^2 = |x|^2 + |y|^2 - 2xy``, which cannot distinguish neighbors that are much
    nearer than the features are long, such as those of a collapsed network: rows with such a neighbor (``CLOSE``) are
    searched for again in float64 if the index is exact. A feature of zeros stays zero under normalization.

    Fails where OoD rows lie between the classes, as near to the bank as ID rows, and where k is larger than the number
    of rows of a class.

    Args:
        k: The rank of the neighbor.
        normalize: L2-normalize features in the fit and in the score.
        index: A faiss factory string; ``"Flat"`` is exact. Others (``"IVF1024,Flat"``, ``"HNSW32"``, ``"PCA64,Flat"``)
            trade accuracy for speed and are trained on the bank; an index trained on a cache is kept in a file beside
            it and used by the next fit with the same parameters.
        share: The share of the fit rows that make up the bank, 1% in some of the paper's runs on ImageNet. They are
            drawn by their number.
        seed: The seed of the draw.

    Cost: one inner product with each bank row for each row, shared with ``nnguide``, ``dknn``, and ``relation`` if they
    are scored in one pass; ``4 D`` bytes for each bank row, twice that if faiss searches.
    """

    tags = Tags(
        formula=r"s(x) = -\lVert \bar z - \bar z_{(k)} \rVert, \quad \bar z = \frac{z}{\lVert z \rVert}",
        paper=Paper(
            "Out-of-Distribution Detection with Deep Nearest Neighbors",
            "Yiyou Sun, Yifei Ming, Xiaojin Zhu, Yixuan Li",
            "ICML",
            2022,
            "https://arxiv.org/abs/2204.06507",
            "https://github.com/deeplearning-wisc/knn-ood",
        ),
        small_parameters={"k": 3},
        search_space={"k": (50, 100, 200, 500, 1000)},
    )
    k: int = 50
    normalize: bool = True
    index: str = "Flat"
    share: float = 1.0
    seed: int = 0
    needs = ("features",)
    fit_needs = ("features",)

    def __post_init__(self) -> None:
        self.require_count("k")
        self.require(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")

    def statistics(self) -> tuple[Rows]:
        return (Rows(self.normalize, self.share, self.seed if self.share < 1 else 0),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.bank_ = found[self.statistics()[0]]
        if len(self.bank_) < self.k:
            raise BadInput(
                f"{self.name}: k={self.k} needs at least as many bank rows, got {len(self.bank_)}: lower k or fit more."
            )
        if not all_finite(self.bank_):
            raise BadInput(
                f"{self.name}: the features exceed the range of float32, in which faiss computes: scale them down."
            )
        self._index: Any = None
        if self.index != "Flat":
            drawn = "rows drawn by number, " if self.share < 1 else ""  # earlier versions drew others
            self._index = kept_index(self.index, self.bank_, feats, f"{drawn}{self.statistics()}")

    def fitted_state(self) -> dict[str, Any]:
        """Return the state to save; an exact index is its bank, while any other may differ when it is built again."""
        state = super().fitted_state()
        return state if self.index == "Flat" else state | {"index": faiss_library().serialize_index(self._index)}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore({name: value for name, value in state.items() if name != "index"})
        self.require(self.k <= len(self.bank_), f"k={self.k} exceeds the {len(self.bank_)} rows of the bank")
        self._index = None if self.index == "Flat" else index_of_bytes(state["index"], self.bank_)

    def why_no_graph(self) -> str | None:
        if self.index != "Flat":
            return f"its index {self.index!r} is approximate, while a graph compares with all rows"
        return super().why_no_graph()

    def scored_with(self) -> Hashable:
        return super().scored_with() if self.normalize and self.index == "Flat" else None

    def wanted(self) -> Wanted:
        return Wanted(self.bank_, min(self.k + AROUND, len(self.bank_)))

    def search(self, rows: Tensor) -> Tensor:
        if self.index == "Flat" and not _is_left_to_faiss(rows):
            return search_unit_rows(rows.float(), [self.of_own_bank()])[0]
        self._index = self._index if getattr(self, "_index", None) else trained_index(self.index, self.bank_)
        count = self.wanted().count if self.index == "Flat" else self.k
        _, found = self._index.search(rows.float().cpu().contiguous().numpy(), count)
        if (found < 0).any():
            raise BadInput(
                f"{self.name}: the index {self.index!r} found fewer than k={self.k} neighbors: lower k or use 'Flat'."
            )
        return torch.from_numpy(found).to(rows.device)

    def judge(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        first = max(0, self.k - 1 - AROUND) if self.index == "Flat" else self.k - 1
        return -self.nearest_distances(block, rows, found, first)[:, -1]

    def nearest_distances(self, block: Block, rows: Tensor, found: Tensor, first: int = 0) -> Tensor:
        """The distances to the k nearest rows but the first ones, ascending, float64 ``[B, k - first]``."""
        distances = self.distances(rows, found[:, first:]).sort(dim=1).values[:, : self.k - first]
        close = distances[:, -1] < CLOSE * row_norm(rows, 2.0)
        if self.index == "Flat" and block.happens(close):
            numbers = exact_neighbors(rows[close], self.bank_, self.k)[:, first:]
            distances[close] = self.distances(rows[close], numbers)
        return distances

    def nearest(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        """The numbers of the k nearest rows, ``[B, k]``, in any order; float64 decides about the k-th."""
        first = max(0, self.k - 1 - AROUND)
        sure, doubtful = found[:, :first], found[:, first:]
        nearer = self.distances(rows, doubtful).topk(self.k - first, dim=1, largest=False)
        numbers = torch.cat([sure, doubtful.gather(1, nearer.indices)], dim=1)
        close = nearer.values.amax(dim=1) < CLOSE * row_norm(rows, 2.0)
        if block.happens(close):
            numbers[close] = exact_neighbors(rows[close], self.bank_, self.k)
        return numbers

    def score_against_all(self, block: Block, rows: Tensor, bank: Tensor) -> Tensor:
        nearest = squared_distances(rows, bank).topk(self.k, dim=1, largest=False).values
        return -nearest.amax(dim=1).sqrt()

    def _rows(self, block: Block) -> Tensor:
        return block.space("features", self.normalize)

    def distances(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Distances of each row to some rows of the bank, ``[B, K]``."""
        columns = [(rows - self.bank_[column]).square_().sum(dim=1).sqrt_() for column in numbers.unbind(dim=1)]
        return torch.stack(columns, dim=1)


def _is_left_to_faiss(rows: Tensor) -> bool:
    """Return whether faiss searches for the neighbors of rows that are scored alone."""
    return rows.device.type == "cpu" and installed("faiss")


def why_no_graph_of(bank: Tensor | None) -> str | None:
    """The reason why a bank of fit rows cannot be part of an exported graph; None if it can, or if there is no bank."""
    if bank is None or len(bank) <= GRAPH_ROWS:
        return None
    return f"its bank has {len(bank):,} rows, while a graph holds at most {GRAPH_ROWS:,}: fit it on fewer rows"


@register_scorer("nnguide")
@dataclass
class NNGuide(_BankScorer):
    """Energy times the mean of the k largest inner products with a bank of energy-weighted neighbors.

    ``E(x) 1/k sum_{the k largest} E(z_i) <z/||z||, z_i/||z_i||>`` with ``E = logsumexp(f)``.

    Fits a bank, the L2-normalized features of the fit rows in float32, and their energies.

    Source: Park et al. 2023, "Nearest Neighbor Guidance for Out-of-Distribution Detection"; k = 10 is theirs (100 in
    OpenOOD), and so is a bank of 1% of the rows of ImageNet (``share=0.01``); by default, the bank has all rows. The
    search finds ``SPARE`` more than k candidates in float32; their inner products are computed again, and the k largest
    chosen, in float64. A feature of zeros stays zero and scores 0.

    Fails where energies are negative: the signs of both factors then reverse the order.

    Args:
        k: The number of neighbors.
        share: The share of the fit rows that make up the bank, drawn by their number.
        seed: The seed of the draw.

    Cost: one inner product with each bank row for each row, shared with ``knn``, ``dknn``, and ``relation`` if they are
    scored in one pass; ``4 D`` bytes for each bank row, twice that if faiss searches.
    """

    tags = Tags(
        formula=(
            r"s(x) = E(x) \cdot \frac{1}{k} \sum_{i \in \text{top } k} E(x_i) \, \langle \bar z, \bar z_i "
            r"\rangle, \quad E = \log \sum_c e^{f_c}, \; \bar z = \frac{z}{\lVert z \rVert}"
        ),
        paper=Paper(
            "Nearest Neighbor Guidance for Out-of-Distribution Detection",
            "Jaewoo Park, Yoon Gyo Jung, Andrew Beng Jin Teoh",
            "ICCV",
            2023,
            "https://arxiv.org/abs/2309.14888",
            "https://github.com/roomo7time/nnguide",
        ),
        search_space={"k": (5, 10, 50, 100)},
    )
    k: int = 10
    share: float = 1.0
    seed: int = 0
    energies_: Tensor = fitted()
    needs = ("features", "logits")
    fit_needs = ("features", "logits")

    def __post_init__(self) -> None:
        self.require_count("k")
        self.require(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")

    def statistics(self) -> tuple[Rows, Energies]:
        draw = (self.share, self.seed if self.share < 1 else 0)
        return Rows(True, *draw), Energies(*draw)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        rows, energies = self.statistics()
        self.bank_, self.energies_ = found[rows], found[energies]
        if len(self.bank_) < self.k:
            raise BadInput(
                f"nnguide: k={self.k} needs at least as many bank rows, got {len(self.bank_)}: lower k or fit more."
            )
        if not all_finite(self.energies_.float()):
            raise BadInput("nnguide: the logits exceed the range of float32, in which faiss computes: scale them down.")
        self._index: Any = None

    def wanted(self) -> Wanted:
        return Wanted(self.bank_, min(self.k + SPARE, len(self.bank_)), self.energies_)

    def search(self, rows: Tensor) -> Tensor:
        if not _is_left_to_faiss(rows):
            return search_unit_rows(rows.float(), [self.of_own_bank()])[0]
        self._index = self._index if getattr(self, "_index", None) else self._build_index()
        return torch.from_numpy(self._index.search(rows.float().contiguous().numpy(), self.wanted().count)[1])

    def judge(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        products = torch.stack([(rows * self.bank_[column]).sum(dim=1) for column in found.unbind(dim=1)], dim=1)
        guidance = (products * self.energies_[found]).topk(self.k, dim=1).values.mean(dim=1)
        return block.logsumexp() * guidance

    def score_against_all(self, block: Block, rows: Tensor, bank: Tensor) -> Tensor:
        guidance = (rows @ bank.T * self.energies_.to(rows)).topk(self.k, dim=1).values.mean(dim=1)
        return block.logsumexp() * guidance

    def _build_index(self) -> Any:
        index = faiss_library().IndexFlatIP(self.bank_.shape[1])
        index.add((self.bank_ * self.energies_.float()[:, None]).numpy())
        return index
