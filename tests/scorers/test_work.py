"""What is expected to be costly is named before it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import ood_scores
from ood_scores import FeatureSet
from ood_scores.features import Block
from ood_scores.progress import showing_work
from ood_scores.scorers import Scorer, create_scorer
from ood_scores.scorers import work as works
from ood_scores.scorers.work import Sizes, Work

EXTRAS = {"layers.a": 256, "layers.b": 512, "gram.a": 5 * 256, "nac.a": 256}
IMAGENET = Sizes(fit_rows=1_000_000, rows=60_000, features=2048, classes=1000, extras=EXTRAS)


@pytest.mark.parametrize(
    ("scorer", "operations", "memory"),
    [
        (create_scorer("energy"), 0, 0),
        (create_scorer("knn"), 2 * 1e6 * 6e4 * 2048, 8 * 1e6 * 2048),
        (create_scorer("knn", share=0.01), 2 * 1e4 * 6e4 * 2048, 8 * 1e4 * 2048),
        (create_scorer("nnguide", share=0.01), 2 * 1e4 * 6e4 * 2048, 8 * 1e4 * 2048),
        (create_scorer("dknn", layers=["features", "a"]), 2 * 1e6 * 6e4 * 2304, 8 * 1e6 * 2304),
        (create_scorer("knn", space="layers.b"), 2 * 1e6 * 6e4 * 512, 8 * 1e6 * 512),
        (create_scorer("layers"), 2 * 5e5 * 5.6e5 * 768, 8 * 5e5 * 768),
        (create_scorer("layers", base="mahalanobis"), 4 * 5e5 * (256**2 + 512**2), 0),
        (create_scorer("mahalanobis_layers", combine="sum"), 4 * (1.06e6 * (256**2 + 512**2) + 6e4 * 768e3), 0),
        (
            create_scorer("mahalanobis_layers", layers=["a"]),
            4 * (1e6 * 256**2 + 2e6 * 256 * (256 + 2000) + 6e4 * 256 * 1256),
            0,
        ),
        (create_scorer("gram"), 1280 * (6000 * 1e6 + 2500 * 6e4), 16 * 1000 * 1280),
        (create_scorer("nac", layers=["features", "a"]), 2500 * 2304 * 1.06e6, 0),
        (create_scorer("react", base="knn"), 2 * 1e6 * 6e4 * 2048, 8 * 1e6 * 2048),
        (create_scorer("react", base="mahalanobis"), 4 * 1e6 * 2048**2, 0),
        (create_scorer("fusion", scorers=["energy", "knn"]), 2 * 5e5 * 5.6e5 * 2048, 8 * 5e5 * 2048),
        (create_scorer("excel", ranks=10), 0, 3e7),
        (create_scorer("relation"), 2 * 1e6 * 6e4 * 3048, 4 * 1e6 * 3048),
        (create_scorer("grood", by="norm"), 0, 0),
        (create_scorer("grood"), 2 * 1e6 * 6e4 * 2048, 4 * 1e6 * 2048),
        (create_scorer("gmm"), 4 * 6e4 * 1e3 * 2048**2, 2**31),
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
    with showing_work("costly …"):  # as the command score does
        ood_scores.score(Costly(2e13), FeatureSet(torch.randn(24, 4), torch.randn(24, 3)))
    assert capsys.readouterr().err.splitlines() == ["expected to be costly: Costly (about 3 min)"]


SHARED = {name: create_scorer(name) for name in ("vim", "residual", "mahalanobis", "mahalanobis_pp", "wdiscood", "gmm")}


def test_statistics_that_scorers_share_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "_speed", lambda device: 1e11)
    monkeypatch.setattr(create_scorer("gmm").__class__, "work", Scorer.work)
    assert works.costly(SHARED, IMAGENET) == [
        "the covariance of features of each class for gmm (about 17 min)",
        "the covariance of normalized features for mahalanobis_pp (about 3 min)",
        "the covariance of features for vim, residual, mahalanobis and wdiscood (about 3 min)",
    ]


@pytest.mark.filterwarnings("ignore:.*rows")
def test_statistics_that_are_known_are_not_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works, "_speed", lambda device: 1.0)
    monkeypatch.setattr(works, "FASTEST", 1e-9)
    feats = FeatureSet(torch.randn(24, 4), torch.randn(24, 3), torch.arange(24) % 3, ood_scores.Head(torch.eye(3, 4)))
    given: dict[str, Any] = {"id": feats, "ood": {"other": feats}, "fit": feats}
    ood_scores.evaluate(["residual", "mahalanobis"], **given)
    line = "expected to be costly: the covariance of features for residual and mahalanobis (about 26 min)"
    assert capsys.readouterr().err.splitlines() == [line]
    ood_scores.evaluate(["residual", "mahalanobis"], **given)
    assert capsys.readouterr().err == ""


def test_the_speed_of_the_cpu_is_measured() -> None:
    assert 1e8 < works._speed(torch.device("cpu")) < 1e14
