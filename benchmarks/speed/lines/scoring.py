"""The cost of scores for feature sets of the size of ImageNet, from RAM and from disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

import ood_scores
from benchmarks.speed.lines.data import CLASSES, WIDTH, fitted, random_set
from benchmarks.speed.measure import Line, Product, paired, scaled

ROWS = 50_000


def gradnorm(scale: float) -> Iterator[Line]:
    """Measure GradNorm against reading its inputs, and against the autograd that it avoids."""
    rows = scaled(scale, ROWS)
    feats, head = random_set(rows)
    features, logits = feats.features, feats.logits
    assert logits is not None
    scored = partial(ood_scores.score, "gradnorm", feats)
    name = f"GradNorm, {rows:,} x {WIDTH:,}, C={CLASSES:,}, from RAM"
    yield paired(
        name, scored, "one read of features and logits", lambda: features.sum() + logits.sum(), better="lower", asked=4
    )
    few = scaled(scale, 100, least=20)
    yield paired(
        name,
        scored,
        f"per-sample autograd of the last layer, the loop of the authors' code ({few} rows, scaled)",
        lambda: _gradnorm_by_autograd(head, features[:few]),
        better="higher",
        asked=1000,
        pairs=5,
        baseline_share=few / rows,
    )


def _gradnorm_by_autograd(head: nn.Linear, features: torch.Tensor) -> list[torch.Tensor]:
    """Run the loop of ``iterate_data_gradnorm`` of Huang et al., with the network reduced to its last layer."""
    norms = []
    targets = torch.ones(1, head.out_features)
    for row in features.split(1):
        head.zero_grad()
        loss = torch.mean(torch.sum(-targets * head(row).log_softmax(dim=-1), dim=-1))
        loss.backward()
        assert head.weight.grad is not None
        norms.append(torch.sum(torch.abs(head.weight.grad)))
    return norms


def mahalanobis(scale: float) -> Iterator[Line]:
    """Measure against the textbook's operations, whitening and all class products, at the speed of a large product."""
    rows = scaled(scale, ROWS)
    scorer, feats = fitted("mahalanobis", rows)
    product = Product(scaled(scale, 4096, least=512), torch.float32)
    yield paired(
        f"Mahalanobis, {rows:,} x {WIDTH:,}, C={CLASSES:,}, from RAM",
        partial(scorer.score, feats),
        f"2 N D (D + C) operations, zeros of the triangular root included, at the speed of a {product}",
        product.runner(),
        better="higher",
        asked=0.5,
        baseline_share=product.flops / (2 * rows * WIDTH * (WIDTH + CLASSES)),
    )


def disk(scale: float) -> Iterator[Line]:
    """Measure scores from an HDF5 cache in the page cache against RAM, for a set of many blocks."""
    rows = scaled(scale, ROWS)
    scorer, feats = fitted("mahalanobis", rows)
    with tempfile.TemporaryDirectory() as folder:
        feats.save(Path(folder) / "cache.h5")
        cached = ood_scores.load(Path(folder) / "cache.h5")
        for each in (*map(ood_scores.create_scorer, ("energy", "feature_norm", "gradnorm")), scorer):
            yield paired(
                f"{each.name} from HDF5, {rows:,} x {WIDTH:,}, C={CLASSES:,}",
                partial(each.score, cached),
                "from RAM",
                partial(each.score, feats),
                better="lower",
                asked=1.5,
            )
