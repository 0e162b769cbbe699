"""Statistics of a feature set: correct for any blocks, computed in one pass, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ood_scores import FeatureSet
from ood_scores.errors import BadLabels, EmptyInput, NotFinite
from ood_scores.features import Block
from ood_scores.features.row_reductions import PIECE, column_sums
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments, Moments
from ood_scores.features.statistics.row_samples import Logits, Rows

Array = NDArray[Any]
PER_CLASS = ClassMoments(per_class=True)


def balanced(rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.normal(size=(120, 5)), np.arange(120) % 4


def imbalanced(rng: np.random.Generator) -> tuple[Array, Array]:
    labels = np.repeat(np.arange(4), [100, 13, 2, 1])
    return rng.normal(size=(116, 5)) + labels[:, None], rng.permutation(labels)


def missing(rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.normal(size=(60, 5)), rng.choice([1, 3], 60)


def sorted_by_class(rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.normal(size=(80, 5)), np.sort(np.arange(80) % 4)


def collapsed(rng: np.random.Generator) -> tuple[Array, Array]:
    """Features whose within-class variance is 1e-8 of that between classes."""
    labels = np.arange(200) % 4
    return rng.normal(size=(4, 5))[labels] + 1e-4 * rng.normal(size=(200, 5)), labels


def far_away(rng: np.random.Generator) -> tuple[Array, Array]:
    return 1e6 + rng.normal(size=(150, 5)), np.arange(150) % 4


def few_rows(rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.normal(size=(3, 5)), np.array([0, 0, 2])


CASES = [balanced, imbalanced, missing, sorted_by_class, collapsed, far_away, few_rows]
Case = Callable[[np.random.Generator], tuple[Array, Array]]


def feature_set(features: Any, labels: Any, classes: int = 4) -> FeatureSet:
    return FeatureSet(features, np.zeros((len(features), classes)), labels)


def moments(feats: FeatureSet, statistic: ClassMoments = PER_CLASS, rows: int | None = None) -> Moments:
    """Compute the moments from blocks of the given size."""
    accumulator = statistic.start(feats)
    for block in feats.blocks(rows):
        accumulator.update(block)
    return accumulator.result()


def two_pass(features: Array, labels: Array, classes: int = 4) -> tuple[Array, Array, Array]:
    """Compute counts, means, and class scatter by their definition."""
    groups = [features[labels == c] for c in range(classes)]
    means = np.stack([group.mean(axis=0) if len(group) else np.zeros(features.shape[1]) for group in groups])
    scatter = np.stack([(group - mean).T @ (group - mean) for group, mean in zip(groups, means, strict=True)])
    return np.array([len(group) for group in groups]), means, scatter


def assert_close(found: Moments, expected: tuple[Array, Array, Array]) -> None:
    counts, means, scatter = expected
    assert found.counts.dtype == torch.int64
    assert found.class_scatter is not None
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.means, means, rtol=1e-13, atol=1e-14)
    scale = np.abs(scatter).max(initial=1e-300)
    rounding = 1e-14 * np.abs(means).max() ** 2 / scale  # the reference rounds its means to 1e-16
    np.testing.assert_allclose(found.class_scatter / scale, scatter / scale, atol=1e-12 + min(rounding, 1e-10))
    np.testing.assert_allclose(found.scatter / scale, scatter.sum(axis=0) / scale, atol=1e-12 + min(rounding, 1e-10))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 7, 64, None])
def test_class_moments_equal_two_passes(case: Case, rows: int | None) -> None:
    features, labels = case(np.random.default_rng(0))
    assert_close(moments(feature_set(features, labels), rows=rows), two_pass(features, labels))


@pytest.mark.parametrize("case", CASES)
def test_float32_features_are_summed_in_float64(case: Case) -> None:
    features, labels = case(np.random.default_rng(1))
    single = features.astype(np.float32)
    assert_close(moments(feature_set(single, labels), rows=16), two_pass(single.astype(np.float64), labels))


@given(rows=st.integers(1, 130), seed=st.integers(0, 99), case=st.sampled_from(CASES))
@settings(max_examples=40, deadline=None)
def test_blocks_and_order_do_not_matter(rows: int, seed: int, case: Case) -> None:
    features, labels = case(np.random.default_rng(2))
    order = np.random.default_rng(seed).permutation(len(features))
    found = moments(feature_set(features[order], labels[order]), rows=rows)
    whole = moments(feature_set(features, labels), rows=len(features))
    assert whole.class_scatter is not None
    assert_close(found, (whole.counts.numpy(), whole.means.numpy(), whole.class_scatter.numpy()))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_large_offset_costs_no_accuracy(offset: float, rows: int) -> None:
    """The features are integers, so that adding the offset is exact and does not change the scatter."""
    features = np.random.default_rng(3).integers(-8, 9, size=(500, 4)).astype(np.float64)
    labels = np.arange(500) % 3
    expected = two_pass(features, labels, classes=3)[2]
    found = moments(feature_set(features + offset, labels, 3), rows=rows)
    assert found.class_scatter is not None
    np.testing.assert_allclose(found.class_scatter, expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_scatter_of_constants_is_exactly_zero(rows: int) -> None:
    """This includes constants without an exact binary fraction, and features that are constant within each class."""
    rng = np.random.default_rng(4)
    labels = np.arange(31) % 4
    features = np.column_stack([np.full(31, 0.1), np.array([0.1, 1 / 3, 1e6 / 7, 0.0])[labels], rng.normal(size=31)])
    found = moments(feature_set(features, labels), rows=rows)
    assert found.class_scatter is not None
    assert found.scatter[:2].count_nonzero() == 0
    assert found.class_scatter[:, :2].count_nonzero() == 0
    assert torch.equal(found.means[:, :2], torch.from_numpy(features[:4, :2]))


def test_class_scatter_is_kept_on_request_and_sums_to_the_pooled_scatter() -> None:
    features, labels = imbalanced(np.random.default_rng(5))
    pooled = moments(feature_set(features, labels), ClassMoments())
    per_class = moments(feature_set(features, labels))
    assert pooled.class_scatter is None
    assert per_class.class_scatter is not None
    torch.testing.assert_close(pooled.scatter, per_class.class_scatter.sum(dim=0))


def test_class_scatter_is_left_out_if_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3
    for spare, is_there in ((0, True), (-1, False)):
        monkeypatch.setattr("ood_scores.features.statistics.moments.CLASS_SCATTER_BYTES", 8 * 4 * 4 * 4 + spare)
        found = moments(feature_set(features, labels))
        assert (found.class_scatter is not None) == is_there
        torch.testing.assert_close(found.scatter, moments(feature_set(features, labels), ClassMoments()).scatter)


def test_spaces_and_normalization() -> None:
    rng = np.random.default_rng(6)
    features, logits, extra = (rng.normal(size=(50, width)) for width in (5, 4, 3))
    labels = np.arange(50) % 4
    features[7] = 0  # stays zero when normalized
    feats = FeatureSet(features, logits, labels, extras={"pooled": extra})
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    normalised = np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
    assert_close(moments(feats, ClassMoments("logits", per_class=True)), two_pass(logits, labels))
    assert_close(moments(feats, ClassMoments("pooled", per_class=True)), two_pass(extra, labels))
    assert_close(moments(feats, ClassMoments(normalize=True, per_class=True)), two_pass(normalised, labels))


def test_number_of_classes_follows_from_labels_without_logits() -> None:
    features, labels = balanced(np.random.default_rng(7))
    assert_close(moments(FeatureSet(features, labels=labels)), two_pass(features, labels))


@pytest.mark.parametrize("rows", [1, 9, 100])
def test_rows(rows: int) -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    features[5] = 0
    feats = FeatureSet(features)
    found = collect(feats.in_blocks(rows), [Rows(), Rows(normalize=True)])
    assert torch.equal(found[Rows()], features)
    expected = torch.nn.functional.normalize(features.double(), dim=1).float()
    assert torch.equal(found[Rows(normalize=True)], expected)
    assert found[Rows(normalize=True)][5].count_nonzero() == 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[FeatureSet]:
    """The sets whose blocks were read, one entry per pass."""
    passes: list[FeatureSet] = []
    blocks = FeatureSet.blocks

    def counted(self: FeatureSet, *args: Any, **kwargs: Any) -> Iterator[Block]:
        passes.append(self)
        return blocks(self, *args, **kwargs)

    monkeypatch.setattr(FeatureSet, "blocks", counted)
    return passes


def test_one_pass_computes_all_statistics_that_are_not_known(reads: list[FeatureSet]) -> None:
    features, labels = balanced(np.random.default_rng(8))
    feats = feature_set(features, labels)
    first = collect(feats, [ClassMoments(), PER_CLASS, Rows(), ClassMoments("logits"), ClassMoments()])
    assert len(reads) == 1
    assert len(first) == 4
    again = collect(feats, [ClassMoments(), Rows()])
    assert len(reads) == 1
    assert again[Rows()] is first[Rows()]
    assert again[ClassMoments()] is first[ClassMoments()]
    collect(feats, [ClassMoments(), Rows(normalize=True)])
    assert len(reads) == 2
    collect(feats[:60], [Rows()])
    assert len(reads) == 3


def test_no_statistics_read_nothing(reads: list[FeatureSet]) -> None:
    features, labels = balanced(np.random.default_rng(9))
    assert collect(feature_set(features, labels), []) == {}
    assert not reads


@pytest.mark.parametrize("labels", [[0, 1, 4], [-1, 0, 1]])
def test_labels_must_be_class_indices(labels: list[int]) -> None:
    with pytest.raises(BadLabels, match=r"class indices must be in 0 \.\. 3"):
        collect(feature_set(np.zeros((3, 2)), np.array(labels)), [ClassMoments()])


def test_labels_are_required() -> None:
    with pytest.raises(BadLabels, match="no labels"):
        collect(FeatureSet(np.zeros((3, 2))), [ClassMoments()])


def test_no_rows() -> None:
    with pytest.raises(EmptyInput):
        collect(FeatureSet(np.zeros((0, 2))), [Rows()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", ["features", "logits"])
def test_values_that_are_not_finite_are_refused_and_not_kept(value: float, column: str) -> None:
    columns: dict[str, Any] = {"features": torch.ones(20, 3), "logits": torch.ones(20, 2)}
    columns[column][13, 1] = value
    feats = FeatureSet(**columns)
    with pytest.raises(NotFinite, match=f"{column} hold NaN or infinite values, first in row 13"):
        collect(feats.in_blocks(6), [Rows() if column == "features" else Logits()])
    assert not feats.statistics


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    feats = FeatureSet(torch.full((8, 4), 3e38))
    assert torch.equal(collect(feats, [Rows()])[Rows()], feats.features)


class TestMomentsOfAllFromThoseOfTheClasses:
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300) % 3 + (rng.random(300) < 0.01)  # class 3 is rare, 4 has no row
    features = np.concatenate([rng.normal(size=(300, 5)) + 5 * labels[:, None], np.full((300, 1), 0.1)], axis=1)

    def feats(self) -> FeatureSet:
        return FeatureSet(self.features + 1000, torch.zeros(300, 5), self.labels)

    @pytest.mark.parametrize("per_class", [False, True])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_equal_the_moments_of_all_rows(
        self, per_class: bool, normalize: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = GlobalMoments(normalize=normalize)
        direct = collect(self.feats(), [wanted])[wanted]
        monkeypatch.setattr(GlobalMoments, "start", lambda *_: pytest.fail("they were accumulated"))
        derived = collect(self.feats(), [wanted, ClassMoments(normalize=normalize, per_class=per_class)])[wanted]
        assert derived.counts.tolist() == [300]
        torch.testing.assert_close(derived.means, direct.means, rtol=1e-14, atol=0)
        torch.testing.assert_close(
            derived.scatter, direct.scatter, rtol=1e-10, atol=1e-10 * float(direct.scatter.max())
        )
        assert derived.class_scatter is None

    def test_constant_has_no_scatter(self) -> None:
        derived = collect(self.feats(), [GlobalMoments(), ClassMoments()])[GlobalMoments()]
        assert derived.means[0, 5] == 1000.1
        assert not derived.scatter[5].any()

    def test_known_class_moments_are_reused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        feats = self.feats()
        collect(feats, [ClassMoments()])
        monkeypatch.setattr(FeatureSet, "blocks", None)
        assert collect(feats, [GlobalMoments()])[GlobalMoments()].counts.tolist() == [300]


def test_column_sums_of_more_values_than_a_piece() -> None:
    values = 1e3 + torch.randn(PIECE // 16 + 50, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(column_sums(values), values.double().sum(dim=0), rtol=1e-14, atol=0)
