"""GMM with covariances that exceed the memory bound: the same scores with less memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores import FeatureSet, Head, create_scorer, load, load_scorer
from ood_scores.errors import BadInput, CacheWriteFailed
from ood_scores.features import Block
from ood_scores.features.statistics import moments
from ood_scores.scorers.mixture import GMM
from ood_scores.scorers.numerics.cholesky import (
    JITTERS,
    cholesky_with_jitter,
    pack_covariance,
    pack_rows,
    packed_size,
    packed_squares,
    pivots,
    reserved,
)

Array = NDArray[Any]
WIDTH = 20
FULL, SINGULAR, FEW = 60, 12, 5
"""Numbers of rows of a class: more than the features, fewer, and at most a quarter of them."""


def train(*counts: int, width: int = WIDTH, seed: int = 0) -> FeatureSet:
    """Correlated features, sorted by class, with these numbers of rows; as many logits as features."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    mix = rng.normal(size=(width, width)) / width**0.5
    features = rng.normal(size=(len(counts), width))[labels] + rng.normal(size=(len(labels), width)) @ mix
    head = Head(torch.from_numpy(mix[: len(counts)]))
    return FeatureSet(features, features @ mix[:, : len(counts)], labels, head)


def rows_to_score(width: int = WIDTH, classes: int = 4) -> FeatureSet:
    rng = np.random.default_rng(1)
    return FeatureSet(rng.normal(size=(30, width)), rng.normal(size=(30, classes)))


def fitted(feats: FeatureSet, most: int, **params: Any) -> GMM:
    """Fit with this many bytes for the scatter of all classes."""
    feats.statistics.clear()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(moments, "CLASS_SCATTER_BYTES", most)
        warnings.simplefilter("ignore")
        scorer = GMM(**params)
        scorer.fit(feats)
    assert (scorer.packed_ is None) == (most > 10**6)
    return scorer


def dense(feats: FeatureSet, **params: Any) -> GMM:
    return fitted(feats, 2**30, **params)


def packed(feats: FeatureSet, most: int = 8 * WIDTH * WIDTH - 1, **params: Any) -> GMM:
    """By default, there is room for less than one triangle at a time."""
    return fitted(feats, most, **params)


CASES = {
    "full rank": ((FULL, FULL, FULL, FULL), 1e-10),
    "fewer rows than features": (
        (SINGULAR, SINGULAR, SINGULAR + 1, SINGULAR),
        1e-5,
    ),  # 1e-16 / 1e-10, as in the dense fit
    "a quarter": ((FEW, FEW, FEW - 1, 2), 1e-5),
    "all kinds": ((FULL, FEW, SINGULAR, 1), 1e-5),
    "a class without rows": ((FULL, 0, FEW, SINGULAR), 1e-5),
}


@pytest.mark.parametrize(("counts", "rtol"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("params", [{}, {"normalize": True, "prior": "empirical"}, {"output": "entropy"}], ids=str)
def test_scores_are_those_of_the_dense_fit(counts: tuple[int, ...], rtol: float, params: dict[str, Any]) -> None:
    fit, feats = train(*counts), rows_to_score()
    one, other = dense(fit, **params), packed(fit, **params)
    assert torch.equal(other.jitter_, one.jitter_)
    if (one.jitter_ == JITTERS[1]).any():
        rtol = 0.05  # 1e-17 / 2e-16: features of length one vary so little that this jitter is accepted
    np.testing.assert_allclose(other.score(feats), one.score(feats), rtol=rtol, atol=1e-12)


MANY_SINGLE = (FULL, *[1] * 7, FEW, SINGULAR, *[1] * 5)


@pytest.mark.parametrize("fit", [dense, packed], ids=["dense", "packed"])
def test_classes_with_one_row_share_one_factor(fit: Any, tmp_path: Path) -> None:
    feats, rows = train(*MANY_SINGLE), rows_to_score()
    scorer = fit(feats)
    assert scorer.factors_.tolist() == [0, *[3] * 7, 1, 2, *[3] * 5]
    stored = (scorer.cholesky_ if scorer.packed_ is None else scorer.packed_).numel()
    assert stored <= 4 * WIDTH * WIDTH
    assert scorer.jitter_.shape == (4,)
    features, labels = feats.features.double(), feats.labels
    assert labels is not None
    centered = features - torch.stack([features[labels == c].mean(dim=0) for c in range(len(MANY_SINGLE))])[labels]
    tied = centered.T @ centered / len(feats)
    normal = torch.distributions.MultivariateNormal(features[labels == 3][0], tied)
    one_class = FeatureSet(rows.features, labels=torch.zeros(len(rows), dtype=torch.int64))
    densities = scorer._log_densities(one_class.features.double())
    np.testing.assert_allclose(densities[:, 3], normal.log_prob(rows.features.double()), rtol=1e-8)
    scorer.save(tmp_path / "gmm")
    assert torch.equal(load_scorer(tmp_path / "gmm").score(rows), scorer.score(rows))


def test_many_classes_with_one_row_take_no_file_and_little_room(tmp_path: Path) -> None:
    """Each of these 200 classes had a triangle of its own: 200 times the file."""
    classes, width = 200, 128
    values = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    feats = FeatureSet(
        torch.cat([values, values[:1] + 1]), labels=torch.cat([torch.arange(classes), torch.zeros(1).long()])
    )
    scorer = fitted(feats, 10**6)
    scorer.save(tmp_path / "gmm")
    assert (tmp_path / "gmm").stat().st_size < 3 * 8 * width * width


def test_a_scorer_saved_before_factors_were_shared_returns_the_same_scores(tmp_path: Path) -> None:
    """Its file has one factor for each class and no ``factors_``."""
    fit, rows = train(FULL, 1, SINGULAR, 1), rows_to_score()
    for scorer in (dense(fit), packed(fit)):
        expected = scorer.score(rows)
        number = scorer.factors_
        assert number is not None
        scorer.jitter_, scorer.factors_ = scorer.jitter_[number], None
        if scorer.packed_ is None or scorer.ranks_ is None:
            scorer.cholesky_ = scorer.cholesky_[number]
        else:
            parts = scorer.packed_.split([packed_size(rank, WIDTH) for rank in scorer.ranks_.tolist()])
            scorer.packed_ = torch.cat([parts[n] for n in number.tolist()])
            scorer.ranks_ = scorer.ranks_[number]
        scorer.save(tmp_path / "gmm")
        np.testing.assert_allclose(load_scorer(tmp_path / "gmm").score(rows), expected, rtol=1e-12)


def test_on_logits() -> None:
    fit, feats = train(FULL, FULL, FULL, SINGULAR), rows_to_score()
    one, other = (fitted(fit, most, space="logits") for most in (2**30, 8 * 4))
    np.testing.assert_allclose(other.score(feats), one.score(feats), rtol=1e-10)


def exact_log_density(rows: Array, jitter: float, values: Array) -> Array:
    """Log density of the Gaussian with the mean and covariance of the rows, in long double throughout."""
    centered = rows.astype(np.longdouble) - rows.astype(np.longdouble).mean(axis=0)
    covariance = centered.T @ centered / (len(rows) - 1) + np.longdouble(jitter) * np.eye(rows.shape[1])
    lower = np.zeros_like(covariance)
    for i in range(len(lower)):
        lower[i, i] = np.sqrt(covariance[i, i] - lower[i, :i] @ lower[i, :i])
        lower[i + 1 :, i] = (covariance[i + 1 :, i] - lower[i + 1 :, :i] @ lower[i, :i]) / lower[i, i]
    columns = (values - rows.astype(np.longdouble).mean(axis=0)).T
    for i in range(len(lower)):
        columns[i] = (columns[i] - lower[i, :i] @ columns[:i]) / lower[i, i]
    constant = len(lower) * np.log(2 * np.longdouble(np.pi)) + 2 * np.log(np.diag(lower)).sum()
    return -0.5 * ((columns**2).sum(axis=0) + constant)


@pytest.mark.parametrize("rows", [2, FEW])
def test_few_rows_keep_their_digits(rows: int) -> None:
    """Compare with long double, which has three more digits; the dense fit keeps 5 or 6 (its jitter is 1e-10)."""
    fit, feats = train(rows), rows_to_score()
    inside = fit.features[:1] * 0.7 + fit.features[1:2] * 0.3
    values = np.concatenate([feats.features.numpy(), inside.numpy()])
    scorer = packed(fit)
    expected = exact_log_density(fit.features.numpy(), float(scorer.jitter_), values).astype(float)
    np.testing.assert_allclose(scorer.score(FeatureSet(values)), expected, rtol=1e-8)


@pytest.mark.parametrize("spread", [0.0, 3.0, 6.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_the_jitter_is_that_of_the_dense_matrix(spread: float, scale: float) -> None:
    """The scales of the features differ by this many powers of ten, and a dead or a copied feature is among them."""
    generator = torch.Generator().manual_seed(0)
    for count in range(2, 42, 2):
        width = 4 * count + int(torch.randint(0, 40, (1,), generator=generator))
        rows = scale * torch.randn(count, width, generator=generator, dtype=torch.float64)
        rows *= 10 ** (spread * torch.rand(width, generator=generator, dtype=torch.float64) - spread / 2)
        rows[:, 1] = 0 if count % 4 else rows[:, 0]
        rows = (rows - rows.mean(dim=0)) / (count - 1) ** 0.5
        assert pack_rows(rows, 0)[1] == float(cholesky_with_jitter((rows.T @ rows)[None])[1])


@pytest.mark.parametrize("size", [1, 7, 128])
def test_pivots(size: int) -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.cholesky(rows.T @ rows + 1e-3 * torch.eye(50, dtype=torch.float64)).diagonal().square()
    torch.testing.assert_close(pivots(rows, 1e-3, size), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("rows", "width"), [(300, 5), (300, 200), (400, 256), (30, 256)])
def test_a_packed_factor_is_the_inverse(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centered = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    columns = torch.randn(width, 9, generator=generator, dtype=torch.float64)
    few = rows < width
    flat, jitter, log_determinant = pack_rows(centered, 0) if few else pack_covariance(centered.T @ centered, 0)
    assert len(flat) == packed_size(rows if few else width, width)
    covariance = centered.T @ centered + jitter * torch.eye(width, dtype=torch.float64)
    expected = (columns * torch.linalg.solve(covariance, columns)).sum(dim=0)
    rtol = 1e-3 if few else 1e-10  # of the reference
    found = packed_squares(flat, rows if few else width, jitter, columns.clone())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    torch.testing.assert_close(log_determinant, torch.logdet(covariance), rtol=rtol, atol=0)


def test_covariances_that_no_jitter_fixes_are_named() -> None:
    with pytest.raises(BadInput, match=r"class covariance 7 is not positive definite even with 0\.1"):
        pack_rows(1e12 * torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 7)
    with pytest.raises(BadInput, match="class covariance 7 is not"):
        pack_covariance(-torch.eye(3, dtype=torch.float64), 7)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows that each pass read."""
    read: list[int] = []
    blocks = FeatureSet.blocks

    def counted(self: FeatureSet, *args: Any, **kwargs: Any) -> Iterator[Block]:
        read.append(0)
        for block in blocks(self, *args, **kwargs):
            read[-1] += len(block)
            yield block

    monkeypatch.setattr(FeatureSet, "blocks", counted)
    return read


COUNTS = (FULL, FEW, SINGULAR, FULL, FEW, 1)


@pytest.mark.parametrize("order", ["sorted", "sorted the other way", "shuffled"])
def test_sorted_rows_are_read_twice_and_others_once_for_each_group(order: str, rows_read: list[int]) -> None:
    fit = train(*COUNTS)
    rows = {
        "sorted": torch.arange(len(fit)),
        "sorted the other way": torch.arange(len(fit)).flip(0),
        "shuffled": torch.randperm(len(fit), generator=torch.Generator().manual_seed(0)),
    }[order]
    scorer = packed(fit[rows], most=8 * WIDTH * 2 * WIDTH)  # two triangles, or one and its neighbors with few rows
    groups = len(rows_read) - 1
    assert rows_read[0] == len(fit)
    assert groups >= 2
    needed = len(fit) - COUNTS.count(1)  # a class with a single row has no covariance of its own
    assert needed <= sum(rows_read[1:]) <= len(fit) or order == "shuffled"
    expected = packed(fit).score(rows_to_score(classes=6))
    np.testing.assert_allclose(scorer.score(rows_to_score(classes=6)), expected, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_blocks_do_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, feats = train(*COUNTS), rows_to_score(classes=6)
    expected = packed(fit).score(feats)
    monkeypatch.setattr("ood_scores.scorers.mixture.DENSITY_BYTES", 8 * WIDTH * rows)
    found = packed(train(*COUNTS).in_blocks(rows)).score(feats, block_rows=rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_with_few_rows_in_each_class_the_order_changes_only_rounding() -> None:
    fit, feats = train(FEW, FEW, FEW, FEW), rows_to_score()
    shuffled = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(0))]
    np.testing.assert_allclose(packed(shuffled).score(feats), packed(fit).score(feats), rtol=1e-9)


def test_shaped_features() -> None:
    fit, feats = train(FULL, FULL, FULL), rows_to_score(classes=3)
    expected = create_scorer("react", base="gmm").fit(fit).score(feats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "CLASS_SCATTER_BYTES", 8 * WIDTH**2)
        scorer: Any = create_scorer("react", base="gmm").fit(train(FULL, FULL, FULL))
    assert scorer._inner.packed_ is not None
    np.testing.assert_allclose(scorer.score(feats), expected, rtol=1e-9)


def test_from_a_cache_and_from_the_statistics_beside_it(tmp_path: Path, rows_read: list[int]) -> None:
    fit, feats = train(*COUNTS), rows_to_score(classes=6)
    fit.save(tmp_path / "train.h5")
    for passes in (2, 1):
        rows_read.clear()
        found = packed(load(tmp_path / "train.h5"))
        assert passes * len(fit) - 2 * COUNTS.count(1) <= sum(rows_read) <= passes * len(fit)
        assert torch.equal(found.score(feats), packed(fit).score(feats))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.h5", "train.h5.statistics"]


def test_a_refit_chooses_dense_or_packed_for_its_own_set() -> None:
    small, large, feats = train(FULL, FULL, FULL, FULL), train(*COUNTS[:4]), rows_to_score()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "CLASS_SCATTER_BYTES", 10**4)
        scorer = GMM()
        scorer.fit(large)
    assert torch.equal(scorer.score(feats), packed(large, 10**4).score(feats))
    scorer.fit(small)
    assert torch.equal(scorer.score(feats), dense(small).score(feats))


def test_a_graph_leaves_the_dense_scorer_unchanged_and_the_packed_one_has_none() -> None:
    class Scored(torch.nn.Module):
        def __init__(self, scorer: GMM) -> None:
            super().__init__()
            self.scorer = scorer

        def forward(self, features: Tensor) -> Tensor:
            return self.scorer.score_block(Block(features=features))

    fit, feats = train(FULL, FULL, FULL, FULL), rows_to_score()
    scorer = dense(fit)
    graph = torch.export.export(Scored(scorer), (feats.features,), strict=False).module()
    torch.testing.assert_close(scorer.score(feats), dense(fit).score(feats))
    torch.testing.assert_close(graph(feats.features), scorer.score(feats))
    with pytest.raises(BadInput, match="gmm: its covariances are too large for an exported graph"):
        torch.export.export(Scored(packed(fit)), (feats.features,), strict=False)


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_packed_scorers_are_saved_if_they_fit_in_memory(tmp_path: Path) -> None:
    fit, feats = train(FEW, FEW, FEW, SINGULAR), rows_to_score()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "CLASS_SCATTER_BYTES", 8 * 3 * WIDTH**2)
        scorer = GMM().fit(fit)
        scorer.save(tmp_path / "gmm.safetensors")
        assert torch.equal(load_scorer(tmp_path / "gmm.safetensors").score(feats), scorer.score(feats))
        patch.setattr(moments, "CLASS_SCATTER_BYTES", 8 * WIDTH**2)
        with pytest.raises(BadInput, match=r"gmm: its 4 covariances take 0\.0 GiB, too much to save"):
            GMM().fit(fit).save(tmp_path / "gmm.safetensors")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to see what is mapped")
@pytest.mark.parametrize("place", ["beside the cache", "temporary folder"])
def test_the_file_has_no_name_and_is_gone_with_the_scorer(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped() -> int:
        return sum(f"{tmp_path}/" in line and "(deleted)" in line for line in open("/proc/self/maps"))

    fit = train(*COUNTS)
    if place == "beside the cache":
        fit.save(tmp_path / "train.h5")
        fit = load(tmp_path / "train.h5")
    else:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scorer = packed(fit)
    assert mapped() == 1
    assert {file.name for file in tmp_path.iterdir()} <= {"train.h5", "train.h5.statistics"}
    del scorer
    assert mapped() == 0


def test_no_room_is_an_error_that_says_how_much(tmp_path: Path) -> None:
    with pytest.raises(CacheWriteFailed, match=rf"take 524,288\.0 GiB, for which there is no space in {tmp_path}"):
        reserved(2**46, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on data is Linux's")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """40 classes at D = 512: 84 MB of covariances, four times that to factorize them, in 128 MiB above the import."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 150)
    FeatureSet(rng.normal(size=(len(labels), 512)).astype(np.float32), labels=labels).save(tmp_path / "train.h5")
    code = f"""
        import re, resource, torch, ood_scores
        from pathlib import Path
        from ood_scores.features.statistics import moments
        torch.linalg.cholesky(torch.eye(300, dtype=torch.float64))
        feats = ood_scores.load({str(tmp_path / "train.h5")!r})
        (data,) = re.findall(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
        most = int(data) * 1024 + 128 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        for moments.CLASS_SCATTER_BYTES in (8 * 2**20, 2**30):
            try:
                print(float(ood_scores.create_scorer("gmm").fit(feats).score(feats[:300], block_rows=50).mean()))
            except (MemoryError, RuntimeError) as error:
                print("not enough memory")
            feats.statistics.clear()
            Path(f"{{feats.file}}.statistics").unlink(missing_ok=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mean, too_much = done.stdout.splitlines()
    train = load(tmp_path / "train.h5")
    assert float(mean) == pytest.approx(float(GMM().fit(train).score(train[:300]).mean()), rel=1e-5)
    assert too_much == "not enough memory"
