"""The cost of exact neighbors, compared with faiss alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ood_scores
from benchmarks.speed.measure import Line, paired, scaled
from benchmarks.speed.scorers import problem


def knn(scale: float) -> Iterator[Line]:
    """Measure ``knn`` with default parameters against faiss on normalized queries and a normalized bank."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    for full_bank, full_queries, width in ((50_000, 10_000, 512), (100_000, 1_000, 2048)):
        bank, queries = scaled(scale, full_bank, least=1000), scaled(scale, full_queries, least=100)
        data = problem(bank, queries, width, 100)
        scorer = ood_scores.create_scorer("knn", k=50).fit(data.train)
        index = faiss.IndexFlatL2(width)
        index.add(torch.nn.functional.normalize(data.train.features).numpy())
        rows = torch.nn.functional.normalize(data.test.features).numpy()
        yield paired(
            f"Exact knn, k=50, {queries:,} rows against {bank:,} x {width:,}",
            partial(scorer.score, data.test),
            "search of faiss's IndexFlatL2",
            partial(index.search, rows, 50),
            better="lower",
            asked=1.1,
            pairs=5,
        )
