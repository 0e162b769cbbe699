"""What is expected to be costly is named before it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ood_scores
from ood_scores import FeatureSet
from ood_scores.features import Block
from ood_scores.scorers import Scorer, create_scorer
from ood_scores.scorers import work as works
from ood_scores.scorers.work import Sizes, Work

IMAGENET = Sizes(fit_rows=1_000_000, rows=60_000, features=2048, classes=1000)


@pytest.mark.parametrize(
    ("scorer", "operations", "memory"),
    [
        (create_scorer("energy"), 0, 0),
        (create_scorer("knn"), 2 * 1e6 * 6e4 * 2048, 8 * 1e6 * 2048),
        (create_scorer("knn", share=0.01), 2 * 1e4 * 6e4 * 2048, 8 * 1e4 * 2048),
        (create_scorer("nnguide", share=0.01), 2 * 1e4 * 6e4 * 2048, 8 * 1e4 * 2048),
        (create_scorer("dknn", layers=["features", "a"]), 4 * 1e6 * 6e4 * 2048, 16 * 1e6 * 2048),
        (create_scorer("relation"), 2 * 1e6 * 6e4 * 3048, 4 * 1e6 * 3048),
        (create_scorer("grood", by="norm"), 0, 0),
        (create_scorer("grood"), 4 * 1e6 * 6e4 * 2048, 4 * 1e6 * 2048),
        (create_scorer("gmm"), 4 * 6e4 * 1e3 * 2048**2 + 24 * 1e6 * 2048**2, 2**31),
        (create_scorer("weiper", repeats=50), 4 * 50 * 1e3 * 2048 * 1.06e6, 4 * 50 * 1e3 * 2048),
        (create_scorer("openmax"), 0, 4e9),
    ],
    ids=str,
)
def test_work(scorer: Scorer, operations: float, memory: float) -> None:
    work = scorer.work(IMAGENET)
    assert [work.operations, work.memory] == pytest.approx([operations, memory])


@dataclass
class Costly(Scorer):
    """A scorer that is said to be costly."""

    operations: float
    memory: float = 0
    needs = ("logits",)

    def work(self, sizes: Sizes) -> Work:
        assert sizes == Sizes(0, 24, 4, 3)
        return Work(self.operations, self.memory)

    def score_block(self, block: Block) -> Tensor:
        return block.logits.double().amax(dim=1)


def test_costly_scorers_are_named_before_they_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works, "_speed", lambda device: 1e11)
    feats = FeatureSet(torch.randn(12, 4), torch.randn(12, 3))
    scorers: dict[str, str | Scorer] = {
        "energy": "energy",
        "fast": Costly(5e12),
        "slow": Costly(2e13, 2**31),
        "slower": Costly(2e15),
        "large": Costly(0, 1.5 * 2**30),
    }
    ood_scores.evaluate(scorers, id=feats, ood={"other": feats})
    line = "expected to be costly: slower (about 6 h), slow (about 3 min, 2.0 GB), large (1.5 GB)"
    assert capsys.readouterr().err.splitlines() == [line]
    ood_scores.evaluate(scorers, id=feats, ood={"other": feats}, progress=False)
    assert capsys.readouterr().err == ""
    ood_scores.evaluate({"energy": "energy"}, id=feats, ood={"other": feats})
    assert capsys.readouterr().err == ""


def test_the_speed_of_the_cpu_is_measured() -> None:
    assert 1e8 < works._speed(torch.device("cpu")) < 1e14
