"""Metrics of scores that come in batches equal those of all scores at once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import distributed, multiprocessing

from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch, UnknownName
from ood_scores.integrations.streaming import OODMetric
from ood_scores.metrics import fpr95_id


def batches(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of scores with ties, of 17 rows each."""
    generator = torch.Generator().manual_seed(seed)
    is_ood = torch.rand(17 * count, generator=generator) < 0.4
    scores = (torch.randn(17 * count, generator=generator) - is_ood.float()).mul(4).round()
    return list(zip(scores.split(17), is_ood.split(17), strict=True))


def test_batches_are_one_set() -> None:
    metric = OODMetric()
    for batch in batches(5):
        metric.update(*batch)
    scores, is_ood = (torch.cat(parts).numpy() for parts in zip(*batches(5), strict=True))
    found = metric.compute()
    assert found.keys() == {"auroc", "fpr95_id"}
    assert found["auroc"] == pytest.approx(roc_auc_score(~is_ood, scores), abs=1e-12)
    assert found["fpr95_id"] == fpr95_id(scores[~is_ood], scores[is_ood])
    metric.reset()
    (later,) = batches(1, seed=1)
    metric.update(*later)
    assert metric.compute()["auroc"] == pytest.approx(roc_auc_score(~later[1], later[0]), abs=1e-12)


def test_metrics_on_request_follow_from_scores_or_are_refused() -> None:
    metric = OODMetric(["autc"])
    metric.update(torch.tensor([2.0, 3.0, 1.0]), torch.tensor([False, False, True]))
    assert metric.compute() == {"autc": pytest.approx(0.125)}
    for name in ("oscr", "ece"):
        with pytest.raises(BadInput, match=f"{name} does not follow from scores alone"):
            OODMetric([name])


def in_a_group(rank: int, file: str, results: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = OODMetric()
    for batch in batches(4)[rank::2]:
        metric.update(*batch)
    results[rank] = metric.compute()
    distributed.destroy_process_group()


def test_processes_share_their_scores() -> None:
    with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
        results = manager.dict()
        group = str(Path(folder) / "group")
        multiprocessing.start_processes(in_a_group, (group, results), nprocs=2, start_method="fork")
        found = dict(results)
    alone = OODMetric()
    for batch in batches(4):
        alone.update(*batch)
    assert found == {0: alone.compute(), 1: alone.compute()}


def test_half_precision_scores_keep_their_values() -> None:
    metric = OODMetric(["auroc"])
    metric.update(torch.tensor([2.0, 1.0], dtype=torch.bfloat16), torch.tensor([False, True]))
    assert metric.compute() == {"auroc": 1.0}


def test_refuses_what_has_no_value() -> None:
    metric = OODMetric()
    with pytest.raises(EmptyInput, match="no scores of ID rows, or none of OoD rows"):
        metric.compute()
    metric.update(torch.ones(3), torch.zeros(3))
    with pytest.raises(EmptyInput, match="call update with both kinds"):
        metric.compute()
    with pytest.raises(ShapeMismatch, match=r"scores have shape \[3\] and is_ood \[2\]"):
        metric.update(torch.ones(3), torch.zeros(2))
    metric.update(torch.tensor([np.nan]), torch.ones(1))
    with pytest.raises(NotFinite):
        metric.compute()
    with pytest.raises(UnknownName, match="aurok"):
        OODMetric(["aurok"])
