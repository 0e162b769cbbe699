"""Tests of the comparison with published numbers."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from ood_scores.benchmark.published import compared
from ood_scores.benchmark.spec import ModelTable, Part, Published, ScorerTable, Spec

AUROCS = {("near_set", 0): 0.8, ("near_set", 1): 0.9, ("far_set", 0): 0.6, ("far_set", 1): 0.9}


def found(published: Published, aurocs: dict[tuple[str, int], float] = AUROCS) -> dict[str, float]:
    part = Part(
        title="part",
        models=(ModelTable("net", checkpoint=("a.safetensors", "b.safetensors")),),
        sets={name: f"npz:{name}.npz" for name in ("test", "near_set", "far_set")},
        id="test",
        near=("near_set",),
        far=("far_set",),
        scorers=(ScorerTable("msp", "msp"),),
        published=(published,),
    )
    table = pd.DataFrame(
        [
            {"part": "part", "model": "net", "checkpoint": checkpoint, "scorer": "msp", "ood": ood, "auroc": auroc}
            for (ood, checkpoint), auroc in aurocs.items()
        ]
    )
    measures = pd.DataFrame(
        [
            {"part": "part", "model": "net", "checkpoint": number, "measure": "accuracy", "value": value}
            for number, value in enumerate((0.91, 0.93))
        ]
    )
    (row,) = compared(Spec("spec", "title", (part,)), table, measures)
    return row


def test_ours_is_the_mean_over_checkpoints_and_sets() -> None:
    on_set = found(Published("net", "msp", "near_set", "auroc", 84.0, "paper"))
    assert (on_set["ours"], on_set["difference"], on_set["n"]) == pytest.approx((85.0, 1.0, 2))
    on_all = found(Published("net", "msp", "mean", "auroc", 80.0, "paper"))
    assert on_all["ours"] == pytest.approx(80.0)
    assert on_all["sd"] == pytest.approx(math.sqrt(2 * 10**2))  # 70 and 90


@pytest.mark.parametrize(("statistic", "value"), [("sd", math.sqrt(2) * 10), ("min", 70.0), ("max", 90.0)])
def test_ours_is_a_statistic_over_checkpoints(statistic: str, value: float) -> None:
    row = found(Published("net", "msp", "mean", f"auroc_{statistic}", 1.0, "paper"))
    assert (row["ours"], row["difference"]) == pytest.approx((value, value - 1))


def test_published_accuracy_of_a_model() -> None:
    assert found(Published("net", None, None, "accuracy", 90.0, "paper"))["ours"] == pytest.approx(92.0)
    assert found(Published("net", None, None, "accuracy_max", 90.0, "paper"))["ours"] == pytest.approx(93.0)


def test_ours_is_nan_if_a_set_of_a_group_is_missing() -> None:
    row = found(Published("net", "msp", "mean", "auroc", 80.0, "paper"), {("near_set", 0): 0.8})
    assert math.isnan(row["ours"])
    assert math.isnan(row["difference"])
    assert row["n"] == 0
