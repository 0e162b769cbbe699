"""Relations: sums of similarities to the rows of the fit set."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.row_samples import Probabilities, Rows
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.neighbors import same_bank, search_together, why_no_graph_of
from ood_scores.scorers.numerics.exact_search import Summed, search_unit_rows
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work, search_of

BANK_PIECE = 4096
"""Number of bank rows that a block is compared with at a time, a multiple of ``GROUP`` of the search."""


@register_scorer("relation")
@dataclass
class Relation(Scorer):
    """Sum of the relations to the fit rows, ``sum_i k_i^power`` over those with ``k_i > threshold``.

    ``k_i = max(0, cos(z, z_i)) <p, p_i>``: two rows are related if their features point in the same direction and their
    softmax probabilities agree.

    Fits a bank: the L2-normalized features and the softmax of the fit rows, both float32. The fit does not read labels.

    Source: Kim et al. 2023, "Neural Relation Graph: A Unified Framework for Identifying Label Noise and Outlier Data",
    and their code, whose OoD score is the inverse of the sum; power = 1 and a threshold of 0.03 are theirs. They sum
    over one training row in ``hop``; here a share is drawn. Departure: a feature of zeros has no relations.

    Fails on classes of different sizes, because rows of a large class have more relations, and where OoD rows are
    predicted with confidence and their features are not orthogonal to those of the class (AUROC 0.74 of a ResNet-20
    with 1,000 fit rows, CIFAR-10 against CIFAR-100, where knn reaches 0.85; 0.80 against textures). On ImageNet, fitted
    on 500 rows without the classes of the test rows, it is at or below chance.

    Args:
        power: The exponent of a relation; a large one counts only the strongest.
        threshold: The largest relation that is left out.
        share: The share of the fit rows that make up the bank, drawn by their number.
        seed: The seed of the draw.

    Cost: one inner product of features and one of probabilities with each bank row for each row, in the precision in
    which the columns are stored; in float32, the former is shared with ``knn``, ``nnguide``, and ``dknn`` if they are
    scored in one pass. ``4 (D + C)`` bytes for each bank row.
    """

    tags = Tags(
        formula=(
            r"s(x) = \sum_{i : k_i > \tau} k_i^{\text{power}}, \quad k_i = \max(0, \cos(z, z_i)) \, \langle p, "
            r"p_i \rangle"
        ),
        paper=Paper(
            "Neural Relation Graph: A Unified Framework for Identifying Label Noise and Outlier Data",
            "Jang-Hyun Kim, Sangdoo Yun, Hyun Oh Song",
            "NeurIPS",
            2023,
            "https://arxiv.org/abs/2301.12321",
            "https://github.com/snu-mllab/Neural-Relation-Graph",
        ),
        search_space={"power": (1.0, 2.0, 4.0, 6.0, 8.0)},
    )
    power: float = 1.0
    threshold: float = 0.03
    share: float = 1.0
    seed: int = 0
    bank_: Tensor = fitted()
    probabilities_: Tensor = fitted()
    needs = ("features", "logits")
    fit_needs = ("features", "logits")

    def __post_init__(self) -> None:
        self.require_positive("power")
        self.require(0 <= self.threshold < 1, f"threshold must be in [0, 1), got {self.threshold}")
        self.require(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")

    def work(self, sizes: Sizes) -> Work:
        found = search_of(self.share * sizes.fit_rows, sizes.rows, sizes.features + sizes.classes)
        return Work(found.operations, found.memory / 2)

    def statistics(self) -> tuple[Rows, Probabilities]:
        draw = (self.share, self.seed if self.share < 1 else 0)
        return Rows(True, *draw), Probabilities(*draw)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        rows, probabilities = self.statistics()
        self.bank_, self.probabilities_ = found[rows], found[probabilities]

    def why_no_graph(self) -> str | None:
        return super().why_no_graph() or why_no_graph_of(getattr(self, "bank_", None))

    def scored_with(self) -> Hashable:
        return same_bank(self.bank_)

    def score_together(self, block: Block, scorers: Sequence[Scorer]) -> list[Tensor]:
        return search_together(block, scorers)

    def request(self, block: Block) -> Summed | None:
        return self._summed(block) if block.features.dtype == torch.float32 else None

    def _summed(self, block: Block) -> Summed:
        softmax = block.softmax().to(block.features)

        def terms(cosines: Tensor, rows: slice, of_bank: slice) -> Tensor:
            pieces = zip(cosines.split(BANK_PIECE, dim=1), self.probabilities_[of_bank].split(BANK_PIECE), strict=True)
            return torch.stack([self._sums(piece, softmax[rows], shares.to(softmax)) for piece, shares in pieces]).sum(
                0
            )

        return Summed(self.bank_, terms)

    def judge(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        return found

    def score_block(self, block: Block) -> Tensor:
        rows = block.space("features", True).to(block.features.dtype)
        if torch.compiler.is_compiling():
            return self._sums(rows @ self.bank_.to(rows).T, block.softmax().to(rows), self.probabilities_.to(rows))
        (found,) = search_unit_rows(rows, [self._summed(block)], bank_at_a_time=BANK_PIECE)
        return found

    def _sums(self, cosines: Tensor, softmax: Tensor, shares: Tensor) -> Tensor:
        """The sums of relations to some rows of the bank, float64 ``[B]``, added in the precision of the columns."""
        products = (softmax @ shares.T).mul_(cosines)
        relations = threshold(products, self.threshold, 0.0, inplace=True)  # of a negative cosine too
        return (relations if self.power == 1 else relations.pow_(self.power)).sum(dim=1).double()
