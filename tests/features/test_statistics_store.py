"""Stored statistics of a cache: the second fit reads nothing, and a wrong file is never used."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import ood_scores
from ood_scores import FeatureSet, Head, atomic, create_scorer, evaluate, load
from ood_scores.cli import app
from ood_scores.errors import NotFinite
from ood_scores.features import Block
from ood_scores.features.statistics.base import Accumulator, Statistic
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import FeatureMean, Means
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments
from ood_scores.features.statistics.row_hashes import ROW_HASHES
from ood_scores.features.statistics.row_samples import Logits, SampledRows
from ood_scores.features.storage import cache, statistics_store

SUMMARIES: list[Statistic] = [
    ClassMoments(),
    ClassMoments("logits", normalize=True, per_class=True),
    ClassMoments("pooled", per_class=True),
    GlobalMoments(normalize=True),
    Means(),
    Means("softmax", "predicted"),
    Means("features", "correct"),
    FeatureMean(),
]
COPIES: list[Statistic] = [SampledRows(), SampledRows(64), Logits()]


def problem(rows: int = 600, seed: int = 0) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 4
    means = 1.5 + 3 * torch.eye(4, 8)
    features = (means[labels] + torch.randn(rows, 8, generator=generator)).relu()
    head = Head(means - means.mean(dim=1, keepdim=True), torch.full((4,), 0.1))
    return FeatureSet(features, head(features), labels, head, {"pooled": features[:, ::2] - 1})


ID = problem(50, seed=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    problem().save(tmp_path / "train.h5")
    return tmp_path / "train.h5"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[FeatureSet]:
    """The sets whose blocks were read, one entry per pass."""
    seen: list[FeatureSet] = []
    blocks = FeatureSet.blocks

    def counted(self: FeatureSet, *args: Any, **kwargs: Any) -> Iterator[Block]:
        seen.append(self)
        return blocks(self, *args, **kwargs)

    monkeypatch.setattr(FeatureSet, "blocks", counted)
    return seen


def statistics_path(path: Path) -> Path:
    return path.with_name(path.name + ".statistics")


def assert_same(one: Any, other: Any) -> None:
    """Check equality bit for bit, including dtypes, shapes, and memory order."""
    assert type(one) is type(other)
    if is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


# --- stored -----------------------------------------------------------------------------------------------------------


def test_the_second_fit_reads_nothing(path: Path, passes: list[FeatureSet]) -> None:
    first = create_scorer("mahalanobis").fit(load(path))
    assert len(passes) == 1
    second = create_scorer("mahalanobis").fit(load(path))
    assert len(passes) == 1
    assert torch.equal(first.score(ID), second.score(ID))


def test_stored_results_equal_the_computed_ones(path: Path, passes: list[FeatureSet]) -> None:
    computed = collect(load(path), SUMMARIES)
    recalled = collect(load(path), SUMMARIES)
    assert len(passes) == 1
    in_memory = collect(problem(), SUMMARIES)
    for statistic in SUMMARIES:
        assert_same(recalled[statistic], computed[statistic])
        assert_same(recalled[statistic], in_memory[statistic])


SCORERS = [
    "mahalanobis",
    "gmm",
    "vim",
    "neco",
    "she",
    "kl_matching",
    "fdbd",
    "dice",
    "react",
    "knn",
    "relative_mahalanobis",
]


def test_scores_from_stored_and_computed_statistics_are_equal(path: Path) -> None:
    fresh = {name: create_scorer(name).fit(problem()).score(ID) for name in SCORERS}
    for _ in range(2):
        for name in SCORERS:
            assert torch.equal(create_scorer(name).fit(load(path)).score(ID), fresh[name]), name
    assert statistics_store.names(path, identity(path))


def identity(path: Path) -> str:
    with h5py.File(path) as h5:
        return h5.attrs["identity"]


def test_only_missing_statistics_are_computed_and_all_are_stored(path: Path, passes: list[FeatureSet]) -> None:
    collect(load(path), [ClassMoments()])
    both = collect(load(path), [ClassMoments(), FeatureMean()])
    assert len(passes) == 2
    again = collect(load(path), [FeatureMean(), ClassMoments()])
    assert len(passes) == 2
    for statistic in both:
        assert_same(again[statistic], both[statistic])
    assert statistics_store.names(path, identity(path)) == [repr(ClassMoments()), repr(FeatureMean())]


def test_other_parameters_make_another_statistic(path: Path, passes: list[FeatureSet]) -> None:
    collect(load(path), [ClassMoments()])
    found = collect(load(path), [ClassMoments(normalize=True)])
    assert len(passes) == 2
    assert_same(
        found[ClassMoments(normalize=True)],
        collect(problem(), [ClassMoments(normalize=True)])[ClassMoments(normalize=True)],
    )


def test_evaluate_reads_the_fit_set_only_once(path: Path, passes: list[FeatureSet]) -> None:
    tables = []
    for expected in (1, 0):
        fit = load(path)
        tables.append(evaluate(["mahalanobis", "gmm", "she"], id=ID, ood={"ood": problem(40, 2)}, fit=fit))
        assert passes.count(fit) == expected
    assert tables[0].equals(tables[1])


def test_cache_is_not_changed_and_links_to_its_statistics(path: Path) -> None:
    before = path.read_bytes()
    found = collect(load(path), SUMMARIES)
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["train.h5", "train.h5.statistics"]
    with h5py.File(path) as h5:
        means = h5[f"statistics/{ClassMoments()!r}/means"]
        np.testing.assert_array_equal(means, found[ClassMoments()].means)
        np.testing.assert_array_equal(h5[f"statistics/{FeatureMean()!r}/value"], found[FeatureMean()])
        assert "class_scatter" not in h5[f"statistics/{ClassMoments()!r}"]


def test_compressed_cache(tmp_path: Path, passes: list[FeatureSet]) -> None:
    problem().save(tmp_path / "small.h5", compress=True)
    passes.clear()
    found = [collect(load(tmp_path / "small.h5"), [ClassMoments()])[ClassMoments()] for _ in range(2)]
    assert len(passes) == 1
    assert_same(*found)


def test_inspect_lists_stored_statistics(path: Path) -> None:
    for expected in (False, True):
        shown = CliRunner().invoke(app, ["inspect", str(path)]).output
        assert "features" in shown
        assert (
            "statistics kept: ClassMoments(space='features', normalize=False, per_class=False), Means(" in shown
        ) == expected
        collect(load(path), [ClassMoments(), Means()])


# --- not stored -------------------------------------------------------------------------------------------------------


def test_copies_of_rows_are_not_stored(path: Path, passes: list[FeatureSet]) -> None:
    for expected in (1, 2):
        collect(load(path), COPIES)
        assert len(passes) == expected
    assert not statistics_path(path).exists()


def test_third_party_statistics_are_not_stored(path: Path, passes: list[FeatureSet]) -> None:
    """Their results may change between runs while their names do not."""

    @dataclass(frozen=True)
    class Count:
        reads: ClassVar[Sequence[str]] = ("features",)

        def start(self, feats: FeatureSet) -> Accumulator:
            return Counter()

    class Counter:
        rows = 0

        def update(self, block: Block) -> None:
            self.rows += len(block)

        def result(self) -> Tensor:
            return torch.tensor(self.rows)

    for expected in (1, 2):
        assert int(collect(load(path), [Count()])[Count()]) == 600
        assert len(passes) == expected
    assert not statistics_path(path).exists()


def test_large_statistics_are_not_stored(tmp_path: Path, passes: list[FeatureSet]) -> None:
    """With one more row, the scatter and mean of 8 features are at most a quarter of the data."""
    size = 8 * (1 + 8 + 64)
    rows = 4 * size // (8 * 8)
    for count, expected in ((rows, 2), (rows + 1, 1)):
        FeatureSet(torch.randn(count, 8, dtype=torch.float64)).save(tmp_path / f"{count}.h5")
        passes.clear()
        for _ in range(2):
            collect(load(tmp_path / f"{count}.h5"), [GlobalMoments()])
        assert len(passes) == expected


PARTS: dict[str, Callable[[FeatureSet], FeatureSet]] = {
    "slice": lambda feats: feats[:300],
    "all rows, as a slice": lambda feats: feats[:],
    "chosen rows": lambda feats: feats[torch.arange(600)],
    "a set of its columns": lambda feats: FeatureSet(feats._columns["features"], None, feats._columns["labels"]),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_of_a_cache_neither_read_nor_write_stored_statistics(
    part: Callable[[FeatureSet], FeatureSet], path: Path, passes: list[FeatureSet]
) -> None:
    collect(part(load(path)), [FeatureMean()])
    assert not statistics_path(path).exists()
    collect(load(path), [FeatureMean()])
    before = statistics_path(path).read_bytes()
    passes.clear()
    collect(part(load(path)), [FeatureMean(), Means()])
    assert len(passes) == 1
    assert statistics_path(path).read_bytes() == before


def test_shaped_sets_neither_read_nor_write_stored_statistics(path: Path) -> None:
    collect(load(path), [*SUMMARIES, ROW_HASHES])
    before = statistics_path(path).read_bytes()
    scorer = create_scorer("react", q=0.5, base="mahalanobis")
    expected = create_scorer("react", q=0.5, base="mahalanobis").fit(problem()).score(ID)
    assert torch.equal(scorer.fit(load(path)).score(ID), expected)
    assert statistics_path(path).read_bytes() == before


def test_nothing_is_stored_for_values_that_are_not_finite(tmp_path: Path) -> None:
    feats = problem()
    features = feats.features.clone()
    features[33, 2] = torch.nan
    FeatureSet(features, feats.logits, feats.labels).save(tmp_path / "bad.h5")
    with pytest.raises(NotFinite):
        collect(load(tmp_path / "bad.h5"), [FeatureMean()])
    assert not statistics_path(tmp_path / "bad.h5").exists()


# --- never used ------------------------------------------------------------------------------------------------------


def test_statistics_of_an_overwritten_cache_are_not_used(path: Path, passes: list[FeatureSet]) -> None:
    collect(load(path), SUMMARIES)
    problem(seed=7).save(path)
    passes.clear()
    for _ in range(2):
        found = collect(load(path), SUMMARIES)
    assert len(passes) == 1
    for statistic, expected in collect(problem(seed=7), SUMMARIES).items():
        assert_same(found[statistic], expected)


def test_set_of_an_overwritten_cache_stores_nothing_for_the_new_one(path: Path) -> None:
    feats = load(path)
    shutil.copy(path, path.with_name("old.h5"))
    problem(seed=7).save(path)
    statistics_store.remember(feats, {FeatureMean(): torch.zeros(8, dtype=torch.float64)})
    assert_same(
        collect(load(path), [FeatureMean()])[FeatureMean()], collect(problem(seed=7), [FeatureMean()])[FeatureMean()]
    )


def test_two_caches_never_share_statistics(tmp_path: Path) -> None:
    names = ["a.h5", "a.hdf5", "a", "a.b.h5", "b.h5"]
    for seed, name in enumerate(names):
        problem(seed=seed).save(tmp_path / name)
    for _ in range(2):
        for seed, name in enumerate(names):
            found = collect(load(tmp_path / name), [FeatureMean()])
            assert_same(found[FeatureMean()], collect(problem(seed=seed), [FeatureMean()])[FeatureMean()])
    assert len(list(tmp_path.iterdir())) == 2 * len(names)


def test_moved_cache_needs_its_statistics_moved_too(path: Path, passes: list[FeatureSet]) -> None:
    collect(load(path), [FeatureMean()])
    other = path.with_name("other.h5")
    path.rename(other)
    statistics_path(path).rename(statistics_path(other))
    collect(load(other), [FeatureMean()])
    assert len(passes) == 1
    statistics_path(other).unlink()
    collect(load(other), [FeatureMean()])
    assert len(passes) == 2


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _empty(file: Path) -> None:
    os.truncate(file, 0)


def _flip_a_bit(file: Path) -> None:
    with h5py.File(file) as h5:
        offset = h5[f"{FeatureMean()!r}/value"].id.get_offset()
    content = bytearray(file.read_bytes())
    content[offset + 3] ^= 16
    file.write_bytes(content)


def _another_number(file: Path) -> None:
    with h5py.File(file, "r+") as h5:
        h5[f"{FeatureMean()!r}/value"][0] += 1


def _an_array_less(file: Path) -> None:
    with h5py.File(file, "r+") as h5:
        del h5[f"{FeatureMean()!r}/value"]


def _an_array_in_place_of_the_entry(file: Path) -> None:
    with h5py.File(file, "r+") as h5:
        del h5[repr(FeatureMean())]
        h5[repr(FeatureMean())] = np.zeros(8)


def _other_version(file: Path) -> None:
    with h5py.File(file, "r+") as h5:
        h5.attrs["ood_scores"] = "0.0.1"
        h5[f"{FeatureMean()!r}/value"][:] = 0


DAMAGE = [
    _truncate,
    _empty,
    _flip_a_bit,
    _another_number,
    _an_array_less,
    _an_array_in_place_of_the_entry,
    _other_version,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_statistics_are_computed_and_written_again(
    damage: Callable[[Path], None], path: Path, passes: list[FeatureSet]
) -> None:
    expected = collect(load(path), [FeatureMean()])[FeatureMean()]
    damage(statistics_path(path))
    passes.clear()
    for _ in range(2):
        assert_same(collect(load(path), [FeatureMean()])[FeatureMean()], expected)
    assert len(passes) == 1


@pytest.mark.parametrize("seed", range(20))
def test_wrong_bytes_are_never_used(seed: int, path: Path) -> None:
    expected = collect(load(path), SUMMARIES)
    content = np.frombuffer(statistics_path(path).read_bytes(), np.uint8).copy()
    rng = np.random.default_rng(seed)
    places = rng.integers(0, len(content), 40)
    content[places] ^= rng.integers(1, 256, 40, dtype=np.uint8)
    statistics_path(path).write_bytes(content.tobytes())
    found = collect(load(path), SUMMARIES)
    for statistic in SUMMARIES:
        assert_same(found[statistic], expected[statistic])


def test_damaged_entry_does_not_affect_the_others(path: Path, passes: list[FeatureSet]) -> None:
    collect(load(path), [FeatureMean(), ClassMoments()])
    _flip_a_bit(statistics_path(path))
    passes.clear()
    collect(load(path), [ClassMoments()])
    assert not passes
    collect(load(path), [FeatureMean()])
    assert len(passes) == 1
    collect(load(path), [FeatureMean(), ClassMoments()])
    assert len(passes) == 1


# --- where nothing can be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["open", "write", "replace"])
def test_refused_write_is_not_an_error(refused: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    place = {
        "open": (atomic.LockedFile, "__init__"),
        "write": (atomic.LockedFile, "check"),
        "replace": (os, "replace"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*place[refused], refuse)
        found = collect(load(path), [FeatureMean()])
    assert_same(found[FeatureMean()], collect(problem(), [FeatureMean()])[FeatureMean()])
    assert [file.name for file in path.parent.iterdir()] == ["train.h5"]


def _text(file: Path) -> None:
    file.write_text("notes")


def _a_feature_cache(file: Path) -> None:
    problem().save(file)


@pytest.mark.parametrize("make", [_text, _a_feature_cache, Path.mkdir])
def test_foreign_file_is_not_replaced(make: Callable[[Path], None], path: Path) -> None:
    make(statistics_path(path))
    before = statistics_path(path).read_bytes() if statistics_path(path).is_file() else None
    for _ in range(2):
        found = collect(load(path), [FeatureMean()])
        assert_same(found[FeatureMean()], collect(problem(), [FeatureMean()])[FeatureMean()])
    assert statistics_path(path).is_dir() if before is None else statistics_path(path).read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_not_an_error(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        found = collect(load(path), [FeatureMean()])
    finally:
        path.parent.chmod(0o700)
    assert_same(found[FeatureMean()], collect(problem(), [FeatureMean()])[FeatureMean()])


def test_full_disk_is_not_an_error_and_leaves_the_old_file(path: Path) -> None:
    """The system refuses the write, because the size of files is limited."""
    collect(load(path), [FeatureMean()])
    before = statistics_path(path).read_bytes()
    code = f"""
        import resource, ood_scores
        from ood_scores.features.statistics.moments import ClassMoments
        from ood_scores.features.statistics.collect import collect
        feats = ood_scores.load({str(path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        print(float(collect(feats, [ClassMoments()])[ClassMoments()].scatter.sum()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(
        float(collect(problem(), [ClassMoments()])[ClassMoments()].scatter.sum())
    )
    assert statistics_path(path).read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("instant", ["h5py.File.create_group", "os.fsync", "os.replace"])
def test_killed_while_writing_leaves_the_old_statistics(instant: str, path: Path, passes: list[FeatureSet]) -> None:
    collect(load(path), [FeatureMean()])
    before = statistics_path(path).read_bytes()
    code = f"""
        import h5py, os, signal, ood_scores
        from ood_scores.features.statistics.moments import ClassMoments
        from ood_scores.features.statistics.collect import collect
        feats = ood_scores.load({str(path)!r})
        {instant} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        collect(feats, [ClassMoments()])
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -signal.SIGKILL
    assert statistics_path(path).read_bytes() == before
    passes.clear()
    collect(load(path), [FeatureMean()])
    assert not passes
    collect(load(path), [ClassMoments()])
    assert sorted(file.name for file in path.parent.iterdir()) == ["train.h5", "train.h5.statistics"]


# --- the link ---------------------------------------------------------------------------------------------------------


def test_cache_without_statistics_can_be_read(path: Path) -> None:
    with h5py.File(path) as h5:
        assert cache.column_names(h5) == ["features", "logits", "labels", "extras/pooled"]
        assert sorted(h5) == ["checksums", "extras", "features", "head", "labels", "logits", "progress", "statistics"]
        assert [name for name, item in h5.items() if item is None] == ["statistics"]
        visited: list[str] = []
        h5.visit(visited.append)
        assert not [name for name in visited if name.startswith("statistics")]
        link = h5.get("statistics", getlink=True)
        assert (link.filename, link.path) == ("train.h5.statistics", "/")
        with pytest.raises(KeyError):
            h5["statistics"]


def test_every_new_cache_has_the_link(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    batches = [(torch.randn(500, 6), torch.arange(500) % 3) for _ in range(3)]
    ood_scores.extract(model, DataLoader(TensorDataset(*batches[0]), batch_size=50), cache=tmp_path / "sized.h5")
    ood_scores.extract(model, iter(batches), cache=tmp_path / "grown.h5")
    problem().save(tmp_path / "small.h5", compress=True)
    for name in ("sized.h5", "grown.h5", "small.h5"):
        with h5py.File(tmp_path / name) as h5:
            assert h5.get("statistics", getlink=True).filename == f"{name}.statistics"
