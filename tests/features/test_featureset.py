"""FeatureSet, Block, and Head behave the same in memory and on disk."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ood_scores
from ood_scores import FeatureSet, Head, ensemble, load
from ood_scores.errors import (
    BadInput,
    BadLabels,
    CacheError,
    EmptyInput,
    NotFinite,
    OodScoresError,
    ShapeMismatch,
)
from ood_scores.features import Block

ROWS = 23
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(ROWS, 4, generator=GENERATOR)
LABELS = torch.randint(3, (ROWS,), generator=GENERATOR)
HEAD = Head(torch.randn(3, 4, generator=GENERATOR), torch.randn(3, generator=GENERATOR))
LOGITS = HEAD(FEATURES)
EXTRAS = {"layer1.0": torch.randn(ROWS, 2, 3, generator=GENERATOR), "gradient": torch.rand(ROWS, generator=GENERATOR)}


def in_memory() -> FeatureSet:
    return FeatureSet(FEATURES, LOGITS, LABELS, HEAD, EXTRAS)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    path = tmp_path_factory.mktemp("features") / "feats.h5"
    in_memory().save(path)
    return ood_scores.load(path)


def columns(feats: FeatureSet | Block) -> dict[str, Tensor]:
    found = {"features": feats.features, "logits": feats.logits, "labels": feats.labels, **feats.extras}
    return {name: values for name, values in found.items() if values is not None}


def assert_same(one: FeatureSet | Block, other: FeatureSet | Block) -> None:
    mine, theirs = columns(one), columns(other)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert values.dtype == theirs[name].dtype, name
        assert values.equal(theirs[name]), name
    assert (one.head is None) == (other.head is None)
    if one.head and other.head:
        assert one.head.weight.equal(other.head.weight)
        assert one.head.bias.equal(other.head.bias)


# --- construction -----------------------------------------------------------------------------------------------------


def test_attributes_of_a_set() -> None:
    feats = in_memory()
    assert len(feats) == ROWS
    assert (feats.num_features, feats.num_classes) == (4, 3)
    assert feats.features.equal(FEATURES)
    assert feats.logits is not None
    assert feats.logits.equal(LOGITS)
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)
    assert list(feats.extras) == ["layer1.0", "gradient"]
    assert len(feats.extras) == 2
    assert feats.extras["gradient"].equal(EXTRAS["gradient"])
    with pytest.raises(KeyError):
        feats.extras["layer2"]
    assert [feats.has(name) for name in ("features", "logits", "labels", "head", "gradient", "layer2")] == [
        True
    ] * 5 + [False]
    assert (feats.file, feats.provenance) == (None, None)


def test_numpy_and_lists() -> None:
    from_numpy = FeatureSet(
        FEATURES.numpy(), LOGITS.numpy(), LABELS.numpy(), HEAD, {n: e.numpy() for n, e in EXTRAS.items()}
    )
    assert_same(from_numpy, in_memory())
    from_lists = FeatureSet(FEATURES.double().tolist(), labels=LABELS.tolist())
    assert from_lists.features.equal(FEATURES.double())
    assert from_lists.labels is not None
    assert from_lists.labels.equal(LABELS)


def test_numpy_arrays_are_shared_unless_torch_does_not_support_them() -> None:
    array = FEATURES.numpy().copy()
    feats = FeatureSet(array)
    array[0, 0] = 7
    assert feats.features[0, 0] == 7
    assert FeatureSet(array[::-1]).features.equal(torch.from_numpy(array.copy()).flip(0))
    assert FeatureSet(array.astype(">f4")).features.equal(torch.from_numpy(array))


def test_gradients_are_detached() -> None:
    assert not FeatureSet(FEATURES.clone().requires_grad_()).features.requires_grad


def test_h5py_datasets_are_read_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with h5py.File("mine.h5", "w", userblock_size=512) as h5:  # as MATLAB writes them
        h5["group/z"] = FEATURES.numpy()
        h5["big"] = LOGITS.numpy().astype(">f8")
        h5["y"] = LABELS.numpy().astype(np.uint8)
        feats = FeatureSet(h5["group/z"], h5["big"], h5["y"], extras={"half": h5["group/z"]})
    monkeypatch.chdir("/")
    assert feats.file == tmp_path / "mine.h5"
    assert feats.features.equal(FEATURES)
    assert feats.logits is not None
    assert feats.logits.equal(LOGITS.double())
    assert feats.labels is not None
    assert feats.labels.equal(LABELS)
    assert feats.extras["half"].equal(FEATURES)
    (tmp_path / "mine.h5").unlink()
    with pytest.raises(FileNotFoundError):
        feats.features  # noqa: B018


def test_closed_h5py_dataset(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "mine.h5", "w") as h5:
        h5["z"] = FEATURES.numpy()
        closed = h5["z"]
    with pytest.raises(BadInput, match=r"features must be .* an open h5py dataset"):
        FeatureSet(closed)


@pytest.mark.parametrize(
    ("given_as", "error", "message"),
    [
        ({"features": FEATURES[0]}, ShapeMismatch, r"features must be \[rows, width\], got \(4,\): pool or flatten"),
        ({"features": FEATURES[:, :, None]}, ShapeMismatch, r"features must be \[rows, width\], got \(23, 4, 1\)"),
        ({"features": torch.tensor(1.0)}, ShapeMismatch, r"features must be \[rows, width\], got \(\)"),
        ({"features": FEATURES.long()}, BadInput, "features must be floating point, got torch.int64"),
        ({"features": FEATURES + 0j}, BadInput, "features must be floating point, got torch.complex64"),
        ({"features": [["a"]]}, BadInput, "features must be a torch tensor, a NumPy array, or an open h5py dataset"),
        ({"features": [[1.0], [1.0, 2.0]]}, BadInput, "features must be a torch tensor, a NumPy array"),
        ({"logits": LOGITS[:5]}, ShapeMismatch, r"features have 23 rows, but logits has shape \(5, 3\)"),
        ({"logits": LOGITS[:, 0]}, ShapeMismatch, r"logits must be \[rows, width\], got \(23,\)"),
        ({"logits": LOGITS[:, :2]}, ShapeMismatch, "the head has 3 classes, but the set has 2 logits"),
        ({"logits": LOGITS > 0}, BadInput, "logits must be floating point, got torch.bool"),
        ({"labels": LABELS[:5]}, ShapeMismatch, "features have 23 rows, but labels has shape"),
        ({"labels": LABELS[:, None]}, ShapeMismatch, r"labels must be \[rows\], got \(23, 1\)"),
        ({"labels": LABELS.float()}, BadLabels, "labels must be integer class indices, got torch.float32"),
        ({"labels": LABELS > 0}, BadLabels, "labels must be integer class indices, got torch.bool"),
        ({"head": Head(torch.ones(3, 5))}, ShapeMismatch, "the head has 5 inputs, but the set has 4 features"),
        ({"head": Head(torch.ones(2, 4))}, ShapeMismatch, "the head has 2 classes, but the set has 3 logits"),
        ({"extras": {"layer": FEATURES[:5]}}, ShapeMismatch, "features have 23 rows, but extras/layer has shape"),
        ({"extras": {"layer": 3.0}}, ShapeMismatch, "features have 23 rows, but extras/layer has shape"),
        ({"extras": {"a/b": FEATURES}}, BadInput, "hold no '/', got 'a/b'"),
        ({"extras": {"": FEATURES}}, BadInput, "must be valid in HDF5"),
        ({"extras": {"..": FEATURES}}, BadInput, "must be valid in HDF5"),
    ],
)
def test_mismatched_arrays(given_as: dict[str, Any], error: type[OodScoresError], message: str) -> None:
    arguments: dict[str, Any] = {"features": FEATURES, "logits": LOGITS, "labels": LABELS, "head": HEAD}
    with pytest.raises(error, match=message):
        FeatureSet(**arguments | given_as)


def test_class_labels() -> None:
    assert in_memory().class_labels().equal(LABELS)
    assert FeatureSet(FEATURES, labels=LABELS + 50).class_labels().max() == LABELS.max() + 50
    with pytest.raises(BadLabels, match=r"labels run from 1 to 3, but class indices must be in 0 .. 2"):
        FeatureSet(FEATURES, LOGITS, LABELS + 1).class_labels()
    with pytest.raises(BadLabels, match="labels run from -1 to 1"):
        FeatureSet(FEATURES, head=HEAD, labels=LABELS - 1).class_labels()
    with pytest.raises(BadLabels, match="labels run from -1 to 1, but class indices must be at least 0"):
        FeatureSet(FEATURES, labels=LABELS - 1).class_labels()
    with pytest.raises(BadLabels, match=r"no labels: extract it from a loader of \(images, labels\)"):
        FeatureSet(FEATURES).class_labels()
    with pytest.raises(EmptyInput):
        in_memory()[:0].class_labels()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype_become_int64(dtype: torch.dtype, tmp_path: Path) -> None:
    feats = FeatureSet(FEATURES, labels=LABELS.to(dtype))
    feats.save(tmp_path / "feats.h5")
    for each in (feats, ood_scores.load(tmp_path / "feats.h5"), next(feats.blocks())):
        assert each.labels is not None
        assert each.labels.dtype == torch.int64
        assert each.labels.equal(LABELS)


def test_check_finite() -> None:
    in_memory().check_finite()
    for name in ("features", "logits"):
        arrays: dict[str, Any] = {"features": FEATURES.clone(), "logits": LOGITS.clone()}
        arrays[name][17, 1] = torch.inf
        arrays[name][19, 0] = torch.nan
        with pytest.raises(NotFinite, match=f"{name} hold NaN or infinite values, first in row 17"):
            FeatureSet(**arrays).check_finite()


def test_repr(on_disk: FeatureSet) -> None:
    head = "23 rows, 4 features, 3 classes, labels, head"
    assert repr(in_memory()) == f"FeatureSet({head}, 'layer1.0', 'gradient', in memory)"
    assert repr(on_disk) == f"FeatureSet({head}, 'layer1.0', 'gradient', on disk: {on_disk.file})"
    assert repr(FeatureSet(torch.ones(12345, 2))) == "FeatureSet(12,345 rows, 2 features, in memory)"


# --- slices -----------------------------------------------------------------------------------------------------------

BOUND = st.none() | st.integers(-ROWS - 5, ROWS + 5)
ROW = st.integers(-ROWS, ROWS - 1)
SELECTIONS = st.one_of(
    st.builds(slice, BOUND, BOUND, st.none() | st.integers(-6, 6).filter(bool)),
    st.lists(ROW, max_size=40),
    st.lists(ROW, max_size=40).map(lambda rows: np.array(rows, dtype=np.int8)),
    st.lists(st.integers(0, ROWS - 1), max_size=40).map(lambda rows: np.array(rows, dtype=np.uint16)),
    st.lists(ROW, max_size=40).map(lambda rows: torch.tensor(rows, dtype=torch.int32)),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(torch.tensor),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SELECTIONS)
def test_selected_rows_are_those_numpy_selects(on_disk: FeatureSet, rows: Any) -> None:
    index: Any = rows if isinstance(rows, slice) else np.asarray(rows, dtype=None if len(rows) else int)
    for feats in (in_memory(), on_disk, on_disk[:], in_memory()[:]):
        part = feats[rows]
        assert len(part) == len(FEATURES.numpy()[index])
        assert part.head is feats.head
        for name, values in columns(part).items():
            np.testing.assert_array_equal(values.numpy(), columns(in_memory())[name].numpy()[index])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(BOUND, BOUND), min_size=2, max_size=3))
def test_slices_of_slices(on_disk: FeatureSet, bounds: list[tuple[int | None, int | None]]) -> None:
    expected, part = FEATURES, on_disk
    for start, stop in bounds:
        expected, part = expected[start:stop], part[start:stop]
    assert part.features.equal(expected)
    assert part.file == on_disk.file


def test_slices_stay_on_disk(on_disk: FeatureSet) -> None:
    assert on_disk[3:9].file == on_disk.file
    assert on_disk[::2].file is None
    assert on_disk[[1, 2]].file is None


def test_selection_over_many_runs_of_rows(tmp_path: Path) -> None:
    features = torch.arange(40_000.0)[:, None]
    FeatureSet(features).save(tmp_path / "long.h5")
    rows = torch.randperm(40_000, generator=torch.Generator().manual_seed(0))[:5000]
    assert ood_scores.load(tmp_path / "long.h5")[rows].features.equal(features[rows])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, ROWS], BadInput, "the row numbers 0 to 23 exceed the 23 rows"),
        ([-ROWS - 1], BadInput, "the row numbers -24 to -24"),
        ([True] * 5, ShapeMismatch, "the mask has 5 values, but the set has 23 rows"),
        ([0.5], BadInput, "rows must be a slice, a one-dimensional index array, or a mask"),
        (3, BadInput, "rows must be a slice"),
        ([[1, 2]], BadInput, "rows must be a slice"),
        ("labels", BadInput, "rows must be a slice"),
    ],
)
def test_invalid_row_selections(on_disk: FeatureSet, rows: Any, error: type[OodScoresError], message: str) -> None:
    for feats in (in_memory(), on_disk):
        with pytest.raises(error, match=message):
            feats[rows]


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 7, 22, 23, 24, 1000, None])
@pytest.mark.parametrize("window", [slice(None), slice(5, 17), slice(None, None, 3)])
def test_blocks_are_all_rows_in_order(on_disk: FeatureSet, rows: int | None, window: slice) -> None:
    for feats in (in_memory()[window], on_disk[window]):
        blocks = list(feats.blocks(rows))
        assert [block.start for block in blocks] == list(range(0, len(feats), rows or len(feats)))
        assert {len(block) for block in blocks[:-1]} <= {rows}
        for name, values in columns(feats).items():
            assert torch.cat([columns(block)[name] for block in blocks]).equal(values)
        assert all(block.head is feats.head for block in blocks)


def test_default_blocks_are_bounded() -> None:
    blocks = list(FeatureSet(torch.zeros(3000, 2048)).blocks())
    assert [len(block) for block in blocks] == [1024, 1024, 952]


def test_blocks_widen_half_precision(tmp_path: Path) -> None:
    FeatureSet(FEATURES.half(), LOGITS.half()).save(tmp_path / "half.h5")
    feats = ood_scores.load(tmp_path / "half.h5")
    assert feats.features.dtype == torch.float16
    block = next(feats.blocks())
    assert (block.features.dtype, block.logits.dtype) == (torch.float32, torch.float32)
    assert block.features.equal(FEATURES.half().float())
    assert next(FeatureSet(FEATURES.bfloat16()).blocks()).features.dtype == torch.float32
    assert next(FeatureSet(FEATURES.double()).blocks()).features.dtype == torch.float64


def test_invalid_blocks(on_disk: FeatureSet) -> None:
    for feats in (in_memory(), on_disk):
        with pytest.raises(EmptyInput, match="no rows"):
            list(feats[:0].blocks())
        with pytest.raises(BadInput, match="rows must be at least 1, got 0"):
            list(feats.blocks(0))
    block = next(FeatureSet(FEATURES).blocks())
    for name in ("logits", "labels", "head"):
        with pytest.raises(AttributeError, match=f"this block has no {name}"):
            getattr(block, name)


def test_derived_quantities_are_correct_and_computed_once() -> None:
    block = next(in_memory().blocks())
    logits = LOGITS.double()
    torch.testing.assert_close(block.softmax(), logits.softmax(1))
    torch.testing.assert_close(block.softmax(2.0), (logits / 2).softmax(1))
    torch.testing.assert_close(block.log_softmax(0.5), (logits * 2).log_softmax(1))
    torch.testing.assert_close(block.logsumexp(), logits.logsumexp(1))
    assert block.prediction().equal(LOGITS.argmax(1))
    assert block.softmax() is block.softmax()
    assert block.softmax(2.0) is not block.softmax()
    for p in (0.3, 1.0, 2.0, 3.0, float("inf")):
        torch.testing.assert_close(block.feature_norm(p), FEATURES.double().norm(p, dim=1), rtol=1e-6, atol=0)
    assert block.space("features").equal(FEATURES.double())
    assert block.space("logits").equal(logits)
    assert block.space("layer1.0").equal(EXTRAS["layer1.0"].double())
    torch.testing.assert_close(block.space("features", True).norm(dim=1), torch.ones(ROWS).double())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_save_and_load(compress: bool, tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    in_memory().save(path, compress=compress)
    loaded = ood_scores.load(os.fspath(path))
    assert loaded.file == path
    assert_same(loaded, in_memory())
    loaded[5:15].save(tmp_path / "part.h5", compress=compress)
    assert_same(ood_scores.load(tmp_path / "part.h5"), in_memory()[5:15])
    with h5py.File(path, "r") as h5:
        assert (h5["features"].chunks is not None) is compress
    assert sorted(file.name for file in tmp_path.iterdir()) == ["feats.h5", "part.h5"]


def test_compressed_file_is_smaller(tmp_path: Path) -> None:
    feats = FeatureSet(torch.zeros(1000, 100))
    feats.save(tmp_path / "plain.h5")
    feats.save(tmp_path / "small.h5", compress=True)
    assert (tmp_path / "small.h5").stat().st_size < 0.1 * (tmp_path / "plain.h5").stat().st_size
    assert ood_scores.load(tmp_path / "small.h5").features.equal(feats.features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("compress", [False, True])
def test_dtype_survives_saving(dtype: torch.dtype, compress: bool, tmp_path: Path) -> None:
    extras = {"mask": LABELS > 0, "counts": LABELS.to(torch.int16), "phase": FEATURES + 1j}
    feats = FeatureSet(FEATURES.to(dtype), LOGITS.to(dtype), extras=extras, head=Head(HEAD.weight.to(dtype)))
    feats.save(tmp_path / "feats.h5", compress=compress)
    loaded = ood_scores.load(tmp_path / "feats.h5")
    assert_same(loaded, feats)
    assert loaded.head is not None
    assert loaded.head.weight.dtype == dtype


@pytest.mark.parametrize("compress", [False, True])
def test_features_alone_and_no_rows(compress: bool, tmp_path: Path) -> None:
    for number, feats in enumerate((FeatureSet(FEATURES), FeatureSet(FEATURES[:0], LOGITS[:0], LABELS[:0]))):
        feats.save(tmp_path / f"{number}.h5", compress=compress)
        assert_same(ood_scores.load(tmp_path / f"{number}.h5"), feats)


def test_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="HDF5 has no bfloat16: convert the features to float32 or float16"):
        FeatureSet(FEATURES.bfloat16()).save(tmp_path / "feats.h5")
    assert list(tmp_path.iterdir()) == []
    FeatureSet(FEATURES, head=Head(HEAD.weight.bfloat16())).save(tmp_path / "feats.h5")
    head = ood_scores.load(tmp_path / "feats.h5").head
    assert head is not None
    assert head.weight.equal(HEAD.weight.bfloat16().float())


@pytest.mark.parametrize("compress", [False, True])
def test_save_over_the_file_being_read(compress: bool, tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    in_memory().save(path)
    loaded = ood_scores.load(path)
    loaded[3:20].save(path, compress=compress)
    assert_same(ood_scores.load(path), in_memory()[3:20])
    for read in (lambda: loaded.features, lambda: loaded.labels, lambda: next(loaded.blocks()), lambda: loaded[[1]]):
        with pytest.raises(CacheError, match="was replaced after it was loaded: load it again"):
            read()
    assert len(loaded) == ROWS


def test_blocks_keep_reading_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    in_memory().save(path)
    blocks = ood_scores.load(path).blocks(10)
    first = next(blocks)
    FeatureSet(torch.zeros(3, 4)).save(path)
    assert torch.cat([first.features, *(block.features for block in blocks)]).equal(FEATURES)


def test_lazy_set_can_be_pickled(on_disk: FeatureSet) -> None:
    pickled = pickle.dumps(on_disk[2:9])
    assert_same(pickle.loads(pickled), in_memory()[2:9])
    assert pickle.loads(pickled).file == on_disk.file
    assert_same(pickle.loads(pickle.dumps(in_memory())), in_memory())


# --- head -------------------------------------------------------------------------------------------------------------


def test_head_maps_features_to_logits() -> None:
    weight, bias = HEAD.weight.numpy(), HEAD.bias.numpy()
    np.testing.assert_allclose(Head(weight, bias)(FEATURES).numpy(), FEATURES.numpy() @ weight.T + bias, rtol=1e-5)
    assert (HEAD.num_classes, HEAD.num_features) == (3, 4)
    assert repr(HEAD) == "Head(4 features -> 3 classes)"
    assert HEAD(FEATURES.double()).dtype == torch.float64
    assert Head(HEAD.weight.double())(FEATURES).dtype == torch.float64


def test_head_without_bias_has_zero_bias() -> None:
    head = Head(HEAD.weight)
    assert head.bias.equal(torch.zeros(3))
    torch.testing.assert_close(head(FEATURES), FEATURES @ HEAD.weight.T)


def test_integer_head_becomes_floating_point() -> None:
    head = Head([[1, 2], [3, 4]], [1, 0])
    assert head(torch.tensor([[1.0, 1.0]])).tolist() == [[4.0, 7.0]]


@pytest.mark.parametrize(
    ("weight", "bias", "error", "message"),
    [
        (torch.ones(3), None, ShapeMismatch, r"weight of a head must be \[classes, features\], got \(3,\)"),
        (torch.ones(3, 4, 1, 1), None, ShapeMismatch, r"got \(3, 4, 1, 1\)"),
        (torch.ones(3, 4), torch.ones(4), ShapeMismatch, r"needs a bias of shape \[3\], got \(4,\)"),
        (torch.ones(3, 4), torch.ones(3, 1), ShapeMismatch, r"needs a bias of shape \[3\], got \(3, 1\)"),
        (torch.full((3, 4), torch.nan), None, NotFinite, "weight or bias of the head holds NaN or infinite"),
        (
            torch.ones(3, 4),
            torch.tensor([0, torch.inf, 0]),
            NotFinite,
            "weight or bias of the head holds NaN or infinite",
        ),
        ("weights", None, BadInput, "torch tensors or NumPy arrays"),
        ([[1.0], [1.0, 2.0]], None, BadInput, "torch tensors or NumPy arrays"),
    ],
)
def test_invalid_heads(weight: Any, bias: Any, error: type[OodScoresError], message: str) -> None:
    with pytest.raises(error, match=message):
        Head(weight, bias)


def test_blocks_are_on_the_device_of_a_loaded_set(tmp_path: Path) -> None:
    FeatureSet(torch.ones(3, 2), torch.ones(3, 4)).save(tmp_path / "a.h5")
    feats = load(tmp_path / "a.h5", device="cpu")
    joint = ensemble([feats, feats])
    feats.device = joint.device = torch.device("meta")
    assert ensemble([feats, feats]).device == feats.device
    for each in (feats, feats[:2], feats[[2, 0]], joint[1:]):
        (block,) = each.blocks()
        assert {block.features.device, block.logits.device} == {torch.device("meta")}
        (block,) = each.blocks(device="cpu")
        assert block.features.device == torch.device("cpu")
    with pytest.raises(BadInput, match="the device 'tpu' is not available"):
        load(tmp_path / "a.h5", device="tpu")


@pytest.mark.gpu
def test_blocks_of_a_set_on_disk_arrive_on_the_gpu_in_order(tmp_path: Path) -> None:
    values = torch.arange(60_000.0).reshape(20_000, 3)
    FeatureSet(values).save(tmp_path / "a.h5")
    blocks = list(load(tmp_path / "a.h5", device="cuda").blocks(777))
    assert {block.features.device.type for block in blocks} == {"cuda"}
    assert torch.equal(torch.cat([block.features.cpu() for block in blocks]), values)


def test_view_with_other_block_rows_reads_the_same_set() -> None:
    feats = FeatureSet(torch.arange(20.0).reshape(10, 2), labels=torch.arange(10))
    view = feats.in_blocks(4)
    assert [len(block) for block in view.blocks()] == [4, 4, 2]
    assert [len(block) for block in view.blocks(7)] == [7, 3]
    assert [len(block) for block in view[1:].blocks()] == [4, 4, 1]
    assert [len(block) for block in feats.blocks()] == [10]
    assert view.statistics is feats.statistics
    assert feats.in_blocks(None) is feats
    with pytest.raises(BadInput, match="rows must be at least 1"):
        next(iter(feats.in_blocks(0).blocks()))
