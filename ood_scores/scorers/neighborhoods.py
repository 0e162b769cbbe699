"""Neighborhoods: what the nearest rows of the fit set say besides their distance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.layer_set import LayerSet
from ood_scores.features.statistics.base import Found
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.neighbors import KNN, same_bank, search_together
from ood_scores.scorers.numerics.exact_search import Wanted, lengths_of
from ood_scores.scorers.numerics.nearest import SHORTEST
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work, search_of

SMALLEST = 1e-12
"""The smallest distance that counts, and the smallest mean logarithm of ratios of distances."""


@register_scorer("lid")
@dataclass
class LID(KNN):
    """Negative local intrinsic dimensionality among the k nearest fit rows, ``k / sum_i log(r_i / r_k)``.

    r_i is the distance to the i-th nearest feature of the fit set; the sum is negative, and its inverse the maximum
    likelihood estimate of how fast the number of neighbors grows with the distance.

    Fits the bank of ``knn``.

    Source: Ma et al. 2018, "Characterizing Adversarial Subspaces Using Local Intrinsic Dimensionality", and their code,
    whose estimate, k = 20, and features that are not normalized are used here. Departures: neighbors are those among
    all fit rows, and not among a batch of 100; the score is that of one layer, while the authors combine layers by a
    logistic regression on adversarial examples (``layers`` combines them without OoD data); a row that equals k fit
    rows has dimension 0; a dimension is at most 1e12.

    Fails where OoD rows lie far from all fit rows: these then seem to lie at nearly the same distance, but so do ID
    rows in many dimensions; and for rows of the fit set, which are their own neighbors. Distances alone say more
    (AUROC 0.68 of a ResNet-20 with 1,000 fit rows, CIFAR-10 against CIFAR-100, where knn reaches 0.85; 0.74 and 0.94
    against textures; chance on ImageNet, fitted on 500 rows).

    Args:
        k: The number of neighbors.
        normalize: L2-normalize features in the fit and in the score.
        index: A faiss factory string, as for ``knn``.
        share: The share of the fit rows that make up the bank, drawn by their number.
        seed: The seed of the draw.

    Cost: as ``knn``, with which it shares the inner products if both are fitted and scored in one pass, plus the
    distances to k rows in float64.
    """

    tags = Tags(
        formula=r"s(x) = k \Big/ \sum_{i=1}^{k} \log \frac{r_i}{r_k}",
        paper=Paper(
            "Characterizing Adversarial Subspaces Using Local Intrinsic Dimensionality",
            (
                "Xingjun Ma, Bo Li, Yisen Wang, Sarah M. Erfani, Sudanthi Wijewickrema, Grant Schoenebeck, Dawn Song, "
                "Michael E. Houle, James Bailey"
            ),
            "ICLR",
            2018,
            "https://arxiv.org/abs/1801.02613",
            "https://github.com/xingjunm/lid_adversarial_subspace_detection",
        ),
        no_graph="its logarithms of small distances need more digits than a graph computes",
        small_parameters={"k": 5},
        search_space={"k": (10, 20, 50, 100, 200)},
    )
    k: int = 20
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.k > 1, f"k must be at least 2, got {self.k}")

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        super().fit_statistics(found, feats)
        units = feats.statistics.get(replace(self.statistics()[0], normalize=True))
        self._others = None if units is None else (self.bank_, units, lengths_of(self.bank_))

    def _units_and_lengths(self) -> tuple[Tensor, Tensor] | None:
        """The unit bank of other scorers of the fit and the lengths of the bank rows; None if no scorer has one."""
        known: tuple[Tensor, Tensor, Tensor] | None = getattr(self, "_others", None)
        return None if known is None or known[0] is not self.bank_ else known[1:]

    def scored_with(self) -> Hashable:
        others = None if self.normalize or self.index != "Flat" else self._units_and_lengths()
        return super().scored_with() if others is None else same_bank(others[0])

    def request(self, block: Block) -> Wanted | None:
        if self.normalize:
            return self.of_own_bank()
        others = self._units_and_lengths()
        if others is None:
            return None
        units, of_bank = others
        lengths = block.feature_norm().clamp_min(SHORTEST)
        return Wanted(units, self.wanted().count, lengths=lengths, bank_lengths=of_bank, directions=True)

    def judge(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        distances = self.nearest_distances(block, self._rows(block), found)
        known = distances.clamp_min(SMALLEST).log()
        logs = (known[:, -1:] - known).mean(dim=1).clamp_min(SMALLEST)
        return torch.where(distances[:, -1] > SMALLEST, -1 / logs, 0)


@register_scorer("dknn")
@dataclass
class DkNN(Scorer):
    """Largest share of a label among the nearest fit rows of all layers, ``max_c sum_l n_lc / (k L)``.

    n_lc is the number of the k nearest fit rows, in layer l, that are labeled c.

    Fits the bank of ``knn`` for each layer, and keeps the labels.

    Source: Papernot & McDaniel 2018, "Deep k-Nearest Neighbors: Towards Confident, Interpretable and Robust Deep
    Learning". Their credibility is the share of calibration rows with at least as many neighbors of other labels than
    the best candidate; it ranks rows as this share does, except that it may make more of them equal, so that no
    calibration rows are needed. Cosine distance and k = 75 are theirs; the search is exact, while theirs uses hashing.
    Of fit rows that are equally near, any may be among the k.

    Fails to tell many rows apart: there are only ``k L`` scores, and many ID rows have the highest (about half of
    CIFAR-10, of a ResNet-20 with 1,000 fit rows; AUROC 0.85 against CIFAR-100, 0.86 against textures, where knn reaches
    0.94). OoD rows nearer to one class than to all others score as ID rows do, however far away they are.

    Args:
        k: The number of neighbors.
        layers: What to read: ``"features"`` for the penultimate features, and names of modules, whose outputs
            ``extract(layers=...)`` keeps.
        normalize: L2-normalize features in the fit and in the score.

    Cost: that of ``knn`` for each layer; on the features alone, shared with ``knn`` if both are scored in one pass.
    """

    tags = Tags(
        formula=r"s(x) = \max_c \frac{1}{k L} \sum_l n_{lc}",
        paper=Paper(
            "Deep k-Nearest Neighbors: Towards Confident, Interpretable and Robust Deep Learning",
            "Nicolas Papernot, Patrick McDaniel",
            "arXiv",
            2018,
            "https://arxiv.org/abs/1803.04765",
        ),
        no_graph="it looks up the labels of neighbors that an index finds",
        waits=2,
        small_parameters={"k": 20},
        search_space={"k": (25, 50, 75, 100, 200)},
    )
    k: int = 75
    layers: Sequence[str] = ("features",)
    normalize: bool = True
    banks_: list[KNN] = fitted()
    labels_: Tensor = fitted()

    def __post_init__(self) -> None:
        self.require_count("k")
        given = not isinstance(self.layers, str) and len(self.layers) > 0
        self.require(given, f"layers must be a list of 'features' and names of modules, got {self.layers!r}")
        self.needs = tuple(name if name == "features" else f"layers.{name}" for name in self.layers)
        self.fit_needs = (*self.needs, "labels")

    def work(self, sizes: Sizes) -> Work:
        return sum((search_of(sizes.fit_rows, sizes.rows, sizes.width(name)) for name in self.needs), Work())

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.labels_ = feats.class_labels().cpu()
        self.banks_ = []
        for name in self.needs:
            bank = KNN(k=self.k, normalize=self.normalize)
            bank.fit(feats if name == "features" else LayerSet(feats, name))
            self.banks_.append(bank)

    def scored_with(self) -> Hashable:
        return self.banks_[0].scored_with() if self.needs == ("features",) else None

    def score_together(self, block: Block, scorers: Sequence[Scorer]) -> list[Tensor]:
        return search_together(block, scorers)

    def request(self, block: Block) -> Wanted:
        return self.banks_[0].of_own_bank()

    def judge(self, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        return self._largest_share(self._labels_of(self.banks_[0], block, rows, found))

    def score_block(self, block: Block) -> Tensor:
        labels = []
        for name, bank in zip(self.needs, self.banks_, strict=True):
            if name != "features":
                read_extra(block, name, self.name)
            rows = block.space(name, self.normalize)
            labels.append(self._labels_of(bank, block, rows, bank.search(rows)))
        return self._largest_share(torch.cat(labels, dim=1))

    def _labels_of(self, bank: KNN, block: Block, rows: Tensor, found: Tensor) -> Tensor:
        """The labels ``[B, k]`` of the nearest rows of a bank, of which candidates were found."""
        return self.labels_[bank.nearest(block, rows, found)]

    def _largest_share(self, labels: Tensor) -> Tensor:
        counts = torch.zeros(len(labels), int(self.labels_.max()) + 1, dtype=torch.float64, device=labels.device)
        counts.scatter_add_(1, labels, counts.new_ones(labels.shape))
        return counts.amax(dim=1) / labels.shape[1]
