"""Zero-shot classifiers: how well an image matches the texts of classes, and of words that are not classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import MissingInput
from ood_scores.features import Block, Head
from ood_scores.features.row_reductions import PIECE, row_norm
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags

SEED = 0
"""The seed of the order in which negatives are grouped, as in the authors' code."""

NO_GRAPH = "it compares images with words that are not classes, which a graph does not contain"


@register_scorer("mcm")
@dataclass
class MCM(Scorer):
    """Maximum concept matching: the largest softmax probability of the cosines, ``max_c softmax(cos(x, w) / T)_c``.

    ``x`` are the features and ``w_c`` the rows of the head's weight: for a zero-shot classifier, the features of the
    image and of the texts. Its logits are cosines times a scale of about 100, so that ``mcm`` is ``msp`` at the
    temperature ``scale * T``, where T = 1 makes the softmax nearly uniform. Other classifiers have cosines, too.

    Source: Ming et al. 2022, "Delving into Out-of-Distribution Detection with Vision-Language Representations", and the
    authors' code, with T = 1 and the template "a photo of a {}".

    Fails where an OoD image matches the name of a class, such as another breed of dog, and with very few classes, since
    the softmax compares them with each other and knows nothing else.

    Args:
        temperature: The divisor T of the cosines.

    Cost: one product with the head for each block.
    """

    tags = Tags(
        formula=r"s(x) = \max_c \operatorname{softmax}(\cos(z, w) / T)_c",
        aliases=("maximum_concept_matching",),
        paper=Paper(
            "Delving into Out-of-Distribution Detection with Vision-Language Representations",
            "Yifei Ming, Ziyang Cai, Jiuxiang Gu, Yiyou Sun, Wei Li, Yixuan Li",
            "NeurIPS",
            2022,
            "https://arxiv.org/abs/2211.13445",
            "https://github.com/deeplearning-wisc/MCM",
        ),
    )
    temperature: float = 1.0
    needs = ("features", "head")

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        return (cosines(block.features, block.head.weight) / self.temperature).softmax(dim=1).amax(dim=1)


@register_scorer("gl_mcm")
@dataclass
class GLMCM(Scorer):
    """Global and local maximum concept matching: ``mcm`` of the image plus ``weight`` times that of its best place.

    ``max_c softmax(cos(x, w) / T)_c + weight max_{i,c} softmax(cos(x_i, w) / T)_c``, where ``x_i`` are the features of
    places in the image. The second term is the extra ``local_mcm.<T>``, which a probe computes at extraction
    (``extract(..., probes=["local_mcm"])``); for another T, ``local_mcm:temperatures=(T,)``.

    Source: Miyai et al. 2025, "GL-MCM: Global and Local Maximum Concept Matching for Zero-Shot Out-of-Distribution
    Detection", and the authors' code, with T = 1 and a weight of 1.

    Fails like ``mcm``; images of several objects are in-distribution if one of these is.

    Args:
        temperature: The divisor T of the cosines.
        weight: The weight of the local term, at least 0.

    Cost: that of ``mcm``; at extraction, the last block of the image encoder again, without attention.
    """

    tags = Tags(
        formula=(
            r"s(x) = \max_c \operatorname{softmax}(\cos(z, w) / T)_c + \text{weight} \cdot \max_{i, c} "
            r"\operatorname{softmax}(\cos(z_i, w) / T)_c"
        ),
        aliases=("glmcm",),
        paper=Paper(
            "GL-MCM: Global and Local Maximum Concept Matching for Zero-Shot Out-of-Distribution Detection",
            "Atsuyuki Miyai, Qing Yu, Go Irie, Kiyoharu Aizawa",
            "IJCV",
            2025,
            "https://arxiv.org/abs/2304.04521",
            "https://github.com/AtsuMiyai/GL-MCM",
        ),
        small_extras={"local_mcm.1.0": lambda features, logits: logits.softmax(dim=1).amax(dim=1)},
        search_space={"weight": (0.5, 1.0, 2.0)},
    )
    temperature: float = 1.0
    weight: float = 1.0
    needs = ("features", "head", "local_mcm.1.0")

    def __post_init__(self) -> None:
        self.require_positive("temperature")
        self.require(0 <= self.weight < float("inf"), f"weight must be at least 0 and finite, got {self.weight}")

        self.needs = ("features", "head", f"local_mcm.{float(self.temperature)}")

    def score_block(self, block: Block) -> Tensor:
        local = block.extras[self.needs[-1]].double()
        return MCM(self.temperature).score_block(block) + self.weight * local


@register_scorer("neglabel")
@dataclass
class NegLabel(Scorer):
    """The softmax probability that an image shows a class and not one of many words that are not classes.

    ``sum_c exp(cos(x, w_c) / T) / (sum_c exp(cos(x, w_c) / T) + sum_j exp(cos(x, n_j) / T))``, averaged over groups of
    negatives ``n_j``, the nouns and adjectives of the head (``zero_shot_classifier(..., negatives=...)``).

    Source: Jiang et al. 2024, "Negative Label Guided OOD Detection with Pretrained Vision-Language Models", and the
    authors' code: the negatives are permuted, after those beyond a multiple of the groups are dropped. Departure: the
    permutation is another one, since theirs depends on the GPU. ``NegativeWords`` chooses the negatives.

    Fails where the list of words lacks what OoD images show, or has other names of the classes.

    Args:
        temperature: The divisor T of the cosines; 0.01 is that of CLIP's logits.
        groups: How many groups the negatives are split into; at most one for each word.

    Cost: one product with all negatives for each block, about ten times that of ImageNet's classes.
    """

    tags = Tags(
        formula=r"s(x) = \frac{\sum_c e^{\cos(z, w_c) / T}}{\sum_c e^{\cos(z, w_c) / T} + \sum_j e^{\cos(z, n_j) / T}}",
        waits=2,
        paper=Paper(
            "Negative Label Guided OOD Detection with Pretrained Vision-Language Models",
            "Xue Jiang, Feng Liu, Zhen Fang, Hong Chen, Tongliang Liu, Feng Zheng, Bo Han",
            "ICLR",
            2024,
            "https://openreview.net/forum?id=xUO1HXz4an",
            "https://github.com/XueJiang16/NegLabel",
        ),
        no_graph=NO_GRAPH,
        search_space={"temperature": (0.005, 0.01, 0.02, 0.05)},
    )
    temperature: float = 0.01
    groups: int = 100
    needs = ("features", "head", "negatives")

    def __post_init__(self) -> None:
        self.require_positive("temperature")
        self.require_count("groups")

    def negatives(self, head: Head) -> Tensor:
        """Return the text features ``[M, D]`` that images are compared with.

        Raises:
            MissingInput: if the head lacks them.
        """
        return _words(self.name, head, ("nouns", "adjectives"))

    def score_block(self, block: Block) -> Tensor:
        grouped = _grouped(self.negatives(block.head), self.groups)
        classes = block.head.weight
        rows = max(1, PIECE // grouped.shape[0] // grouped.shape[1])
        scores = [self._scores(part, classes, grouped) for part in block.features.split(rows)]
        return torch.cat(scores)

    def _scores(self, features: Tensor, classes: Tensor, grouped: Tensor) -> Tensor:
        positive = (cosines(features, classes) / self.temperature).logsumexp(dim=1)
        negative = cosines(features, grouped.flatten(0, 1)).unflatten(1, grouped.shape[:2]) / self.temperature
        return (positive[:, None] - negative.logsumexp(dim=2)).sigmoid().mean(dim=1)


@register_scorer("csp")
@dataclass
class CSP(NegLabel):
    """``neglabel`` with the conjugated semantic pool: adjectives are joined with superclasses, as "white creature".

    The formula is that of ``neglabel``. Its negatives are the nouns and the conjugated words of the head, which
    ``zero_shot_classifier(..., negatives=NegativeWords(nouns, adjectives))`` creates.

    Source: Chen, Gao & Xu 2024, "Conjugated Semantic Pool Improves OOD Detection with Pre-trained Vision-Language
    Models", and the authors' code, which also averages eight templates of nouns and classes and leaves out
    words with a cosine above 0.95 to a class: ``templates=CSP_TEMPLATES`` and ``too_similar=0.95`` of
    ``ood_scores.models.zero_shot.negatives``.

    Fails like ``neglabel``.

    Args:
        temperature: The divisor T of the cosines; 0.01 is that of CLIP's logits.
        groups: How many groups the negatives are split into; at most one for each word.

    Cost: that of ``neglabel``.
    """

    tags = Tags(
        formula=r"s(x) = \frac{\sum_c e^{\cos(z, w_c) / T}}{\sum_c e^{\cos(z, w_c) / T} + \sum_j e^{\cos(z, n_j) / T}}",
        waits=2,
        aliases=("conjugated_semantic_pool",),
        paper=Paper(
            "Conjugated Semantic Pool Improves OOD Detection with Pre-trained Vision-Language Models",
            "Mengyuan Chen, Junyu Gao, Changsheng Xu",
            "NeurIPS",
            2024,
            "https://arxiv.org/abs/2410.08611",
            "https://github.com/MengyuanChen21/NeurIPS2024-CSP",
        ),
        no_graph=NO_GRAPH,
        search_space={"temperature": (0.005, 0.01, 0.02, 0.05)},
    )
    needs = ("features", "head", "negatives.conjugated")

    def negatives(self, head: Head) -> Tensor:
        return _words(self.name, head, ("nouns", "conjugated"))


def cosines(features: Tensor, texts: Tensor) -> Tensor:
    """Return the cosines of features ``[B, D]`` with texts ``[K, D]``, float64 ``[B, K]``; 0 for a row of zeros."""
    return _unit(features) @ _unit(texts).T


def _unit(values: Tensor) -> Tensor:
    values = values.double()
    return values / row_norm(values, 2.0).clamp_min(1e-12)[:, None]


def _words(scorer: str, head: Head, kinds: Sequence[str]) -> Tensor:
    """Return the negatives ``[M, D]`` of some kinds, those that the head has."""
    found = [head.negatives[kind] for kind in kinds if kind in head.negatives]
    if not found:
        raise MissingInput(
            f"{scorer!r} needs {' or '.join(kinds)} among the negatives of the head, which are "
            f"{', '.join(head.negatives) or 'none'}: create it with zero_shot_classifier(..., negatives=...)."
        )
    return torch.cat(found)


def _grouped(words: Tensor, groups: int) -> Tensor:
    """Return the words ``[M, D]`` in groups of equal size, ``[G, M // G, D]``, in a random order."""
    count = min(groups, len(words))
    words = words[: len(words) - len(words) % count]
    order = torch.randperm(len(words), generator=torch.Generator("cpu").manual_seed(SEED), device="cpu")
    return words[order.to(words.device)].unflatten(0, (count, -1))
