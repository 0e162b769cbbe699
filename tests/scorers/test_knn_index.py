"""KNN with approximate faiss indexes, on a share of the rows, and the index files beside a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import faiss
import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from ood_scores import FeatureSet, create_scorer, load, load_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.row_samples import drawn_numbers
from ood_scores.scorers.numerics import faiss_index
from ood_scores.scorers.one_pass import score_all

Array = NDArray[np.float32]
WIDTH = 16


def rows(count: int, seed: int = 0) -> Array:
    """Rows around 20 centers."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(20, WIDTH))
    return (centres[np.arange(count) % 20] + 0.2 * rng.normal(size=(count, WIDTH))).astype(np.float32)


BANK, VALUES = rows(1000), rows(100, seed=1)


@pytest.mark.parametrize("index", ["IVF16,Flat", "HNSW8", "PCA8,Flat", "PCA8,IVF4,SQ8", "LSH"])
def test_the_neighbors_are_those_of_faiss(index: str) -> None:
    """Their distances are computed again from the features."""
    reference = faiss.index_factory(WIDTH, index)
    reference.train(BANK)
    reference.add(BANK)
    kth = reference.search(VALUES, 5)[1][:, 4]
    expected = -np.linalg.norm(VALUES.astype(float) - BANK[kth], axis=1)
    found = score("knn", FeatureSet(VALUES), fit=FeatureSet(BANK), k=5, index=index, normalize=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_recall_of_a_coarse_index() -> None:
    """There are as many cells as centers, and one is searched: nearly all rows find their fifth neighbor in it."""
    exact, coarse = (
        score("knn", FeatureSet(VALUES), fit=FeatureSet(BANK), k=5, index=index) for index in ("Flat", "IVF20,Flat")
    )
    assert (coarse <= exact + 1e-6).all()
    assert 0.8 < np.isclose(coarse, exact, rtol=1e-5).mean() <= 1


@pytest.mark.parametrize("share", [0.05, 0.3, 0.999])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_share_of_the_rows_is_drawn_by_number(share: float, normalize: bool) -> None:
    params: Any = {"k": 3, "share": share, "normalize": normalize}
    scorers: list[Any] = [
        create_scorer("knn", **params).fit(FeatureSet(BANK)),
        create_scorer("knn", seed=1, **params).fit(FeatureSet(BANK)),
    ]
    one, other = (scorer.bank_ for scorer in scorers)
    assert len(one) == round(share * len(BANK))
    whole = vars(create_scorer("knn", k=3, normalize=normalize).fit(FeatureSet(BANK)))["bank_"]
    assert torch.equal(one, whole[drawn_numbers(len(BANK), share, 0)])
    assert not torch.equal(one, other)
    unit = VALUES / np.linalg.norm(VALUES, axis=1, keepdims=True) if normalize else VALUES
    expected = -np.sort(cdist(unit, one), axis=1)[:, 2]
    np.testing.assert_allclose(scorers[0].score(FeatureSet(VALUES)), expected, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_share_is_the_same_in_any_blocks(at_once: int) -> None:
    expected: Any = create_scorer("knn", k=1, share=0.1).fit(FeatureSet(BANK))
    found: Any = create_scorer("knn", k=1, share=0.1).fit(FeatureSet(BANK), block_rows=at_once)
    assert torch.equal(found.bank_, expected.bank_)


def test_a_share_is_fair() -> None:
    """Each row is in the bank of one seed in four, independently of its position and its length."""
    lengths = np.linspace(0.1, 10, 400)
    feats = FeatureSet(rows(400) * lengths[:, None].astype(np.float32))
    banks = [vars(create_scorer("knn", k=1, share=0.25, seed=seed, normalize=False).fit(feats)) for seed in range(60)]
    chosen = [(feats.features[:, None] == bank["bank_"]).all(dim=2).any(dim=1) for bank in banks]
    times = torch.stack(chosen).sum(dim=0).numpy()
    assert times.mean() == 15
    assert 8 < times.var() < 15  # 11.25 for a binomial distribution
    assert abs(np.corrcoef(times, lengths)[0, 1]) < 0.15


def test_one_search_serves_all_scorers_of_a_share() -> None:
    fit, feats = FeatureSet(BANK, BANK[:, :3]), FeatureSet(VALUES, VALUES[:, :3])
    together = [create_scorer("knn", k=2, share=0.2), create_scorer("nnguide", k=2, share=0.2)]
    alone = [scorer.fit(fit).score(feats) for scorer in together]
    assert len({scorer.scored_with() for scorer in together}) == 1
    for found, expected in zip(score_all(together, feats), alone, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"index": "Nonsense"},
            r"the index 'Nonsense' for 40 rows of 16 features \(could not parse index string Nonsen",
        ),
        ({"index": "IVF64,Flat"}, r"\(Number of training points \(40\) should be at least as large as number of clust"),
        (
            {"index": "PCA64,Flat"},
            r"\(PCA matrix cannot output 64 dimensions from 16\): use another factory string, such as",
        ),
        ({"share": 0.1, "k": 5}, "k=5 needs at least as many bank rows, got 4: lower k"),
        ({"share": 0.0}, "share must be in \\(0, 1\\], got 0.0"),
        ({"share": 1.5}, "share must be in \\(0, 1\\], got 1.5"),
    ],
)
def test_bad_indexes_and_shares_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"knn: .*{message}"):
        create_scorer("knn", **({"k": 2} | params)).fit(FeatureSet(rows(40)))


# --- index files beside the cache -------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    FeatureSet(BANK).save(tmp_path / "train.h5")
    return tmp_path / "train.h5"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The indexes that were trained."""
    seen: list[str] = []
    train = faiss_index.trained_index

    def noted(description: str, bank: torch.Tensor) -> Any:
        seen.append(description)
        return train(description, bank)

    monkeypatch.setattr(faiss_index, "trained_index", noted)
    return seen


def kept(path: Path) -> list[Path]:
    return sorted(path.parent.glob("train.h5.*.faiss"))


def knn(path: Path, index: str = "IVF16,Flat", **params: Any) -> Any:
    return create_scorer("knn", k=5, index=index, **params).fit(load(path))


@pytest.mark.parametrize("index", ["IVF16,Flat", "HNSW8", "PCA8,IVF4,SQ8"])
def test_the_second_fit_trains_nothing(index: str, path: Path, trained: list[str]) -> None:
    first, second = knn(path, index), knn(path, index)
    assert trained == [index]
    assert torch.equal(first.score(FeatureSet(VALUES)), second.score(FeatureSet(VALUES)))
    assert torch.equal(first.score(FeatureSet(VALUES)), knn_in_memory(index).score(FeatureSet(VALUES)))
    assert faiss.read_index(str(kept(path)[0])).ntotal == len(BANK)
    assert {file.name for file in path.parent.iterdir()} == {path.name, kept(path)[0].name}


def knn_in_memory(index: str) -> Any:
    return create_scorer("knn", k=5, index=index).fit(FeatureSet(BANK))


def test_each_index_has_its_own_file(path: Path, trained: list[str]) -> None:
    different: list[dict[str, Any]] = [
        {},
        {"index": "HNSW8"},
        {"normalize": False},
        {"index": "HNSW8", "share": 0.5},
        {"index": "HNSW8", "share": 0.5, "seed": 1},
    ]
    scores = [knn(path, **params).score(FeatureSet(VALUES)) for params in different]
    assert len(trained) == len(kept(path)) == len(different)
    for params, expected in zip(different, scores, strict=True):
        assert torch.equal(knn(path, **params).score(FeatureSet(VALUES)), expected)
    knn(path, seed=7)  # the seed does not matter for all rows
    assert len(trained) == len(different)


def test_the_exact_index_is_not_kept(path: Path) -> None:
    knn(path, "Flat").score(FeatureSet(VALUES))
    assert not kept(path)


def test_only_the_index_of_a_whole_cache_is_kept(path: Path, trained: list[str]) -> None:
    for feats in (FeatureSet(BANK), load(path)[:500]):
        create_scorer("knn", k=5, index="IVF4,Flat").fit(feats)
    assert trained == ["IVF4,Flat"] * 2
    assert not kept(path)


def test_the_index_of_another_cache_is_replaced(path: Path, trained: list[str]) -> None:
    knn(path)
    FeatureSet(rows(1000, seed=5)).save(path)
    found = knn(path)
    assert len(trained) == 2
    assert len(kept(path)) == 1
    expected = create_scorer("knn", k=5, index="IVF16,Flat").fit(FeatureSet(rows(1000, seed=5)))
    assert torch.equal(found.score(FeatureSet(VALUES)), expected.score(FeatureSet(VALUES)))


def test_the_index_of_a_cache_that_another_program_edited_is_not_used(path: Path, trained: list[str]) -> None:
    knn(path)
    with h5py.File(path, "r+") as h5:
        del h5["checksums"]
        h5["features"][:] = rows(1000, seed=5)
    found = knn(path)
    assert len(trained) == 2
    expected = create_scorer("knn", k=5, index="IVF16,Flat").fit(FeatureSet(rows(1000, seed=5)))
    assert torch.equal(found.score(FeatureSet(VALUES)), expected.score(FeatureSet(VALUES)))


def test_pipes_in_place_of_an_index_or_of_statistics_are_not_waited_for(path: Path) -> None:
    FeatureSet(BANK, labels=np.arange(len(BANK)) % 20).save(path)

    def scores() -> list[torch.Tensor]:
        fitted = (knn(path), create_scorer("mahalanobis").fit(load(path)))
        return [scorer.score(FeatureSet(VALUES)) for scorer in fitted]

    expected = scores()
    for file in (*kept(path), path.with_name(f"{path.name}.statistics")):
        file.unlink()
        os.mkfifo(file)
    assert all(map(torch.equal, scores(), expected))


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "other"])
def test_a_damaged_index_is_trained_again(damage: str, path: Path, trained: list[str]) -> None:
    expected = knn(path).score(FeatureSet(VALUES))
    (file,) = kept(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(
        {"a bit": bytes(content), "cut": bytes(content[:3000]), "empty": b"", "other": b"notes" * 100}[damage]
    )
    assert torch.equal(knn(path).score(FeatureSet(VALUES)), expected)
    assert len(trained) == 2
    knn(path)
    assert len(trained) == 2


@pytest.mark.parametrize("refused", ["fsync", "replace"])
def test_an_index_that_cannot_be_written_is_not_kept(refused: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, refused, refuse)
    expected = knn_in_memory("IVF16,Flat").score(FeatureSet(VALUES))
    assert torch.equal(knn(path).score(FeatureSet(VALUES)), expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saved_and_loaded(path: Path, tmp_path: Path) -> None:
    scorer = knn(path, share=0.5)
    scorer.save(tmp_path / "knn.safetensors")
    again = load_scorer(tmp_path / "knn.safetensors")
    assert again == scorer
    assert torch.equal(again.score(FeatureSet(VALUES)), scorer.score(FeatureSet(VALUES)))
