"""The properties that extraction reads from a loader: inputs, labels, length, order, name, and checksum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingData, UnreadableRow
from ood_scores.extraction import loaders
from ood_scores.extraction.loaders import IMAGE_KEYS, LABEL_KEYS, Batches, unpack

X = torch.arange(12.0).reshape(4, 3)
Y = torch.tensor([2, 0, 1, 2])


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)

    def __len__(self) -> int:
        return 4


def data(rows: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(rows, 3, 2, generator=generator), torch.arange(rows) % 5)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [X, (X,), [X], (X, None), {"image": X}, {"pixel_values": X, "labels": None}], ids=str)
def test_inputs_without_labels(batch: Any) -> None:
    inputs, labels = unpack(batch)
    assert inputs is X
    assert labels is None


@pytest.mark.parametrize("key", IMAGE_KEYS)
@pytest.mark.parametrize("label_key", LABEL_KEYS)
def test_dicts(key: str, label_key: str) -> None:
    inputs, labels = unpack({"path": ["a", "b", "c", "d"], key: X, label_key: Y})
    assert inputs is X
    assert labels is not None
    assert labels.equal(Y)


@pytest.mark.parametrize(
    "labels",
    [Y, Y.int(), Y.to(torch.uint8), Y.numpy(), Y.tolist(), tuple(Y.tolist()), Y.numpy().astype(np.uint16), list(Y)],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)
@pytest.mark.parametrize("container", [tuple, list])
def test_labels_become_int64(labels: Any, container: Any) -> None:
    found = unpack(container([X, labels]))[1]
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y[:, None], r"got torch.int64 \(4, 1\)"),
        (torch.eye(3, dtype=torch.int64)[Y], r"got torch.int64 \(4, 3\)"),
        (Y.float(), r"got torch.float32 \(4,\)"),
        (Y > 0, r"got torch.bool \(4,\)"),
        (Y + 0j, "got torch.complex64"),
        (Y[:3], r"\[4\], one per input, got torch.int64 \(3,\)"),
        (2, r"got torch.int64 \(\)"),
        (["cat", "dog", "cat", "dog"], "one per input: can't convert"),
        ([[1], [1, 2], [1], [1]], "one per input: .* inhomogeneous"),
    ],
    ids=str,
)
def test_labels_that_are_not_class_indices(labels: Any, message: str) -> None:
    with pytest.raises(BadLabels, match=rf"labels must be integer class indices.*{message}"):
        unpack((X, labels))


def test_the_error_for_a_dict_without_inputs_lists_keys() -> None:
    with pytest.raises(BadInput, match="with the keys jpg, 7: use one of pixel_values, image,"):
        unpack({"jpg": X, 7: Y})


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (X[0], r"\(3,\)"),
        (torch.tensor(3.0), r"\(\)"),
        (X.numpy(), "ndarray"),
        ((), "NoneType"),
        ([], "NoneType"),
        (None, "NoneType"),
        ("abc", "str"),
        ({"image": ["a.png"]}, "list"),
    ],
)
def test_batch_without_a_tensor_of_inputs(batch: Any, got: str) -> None:
    with pytest.raises(
        BadInput, match=rf"must contain a tensor of inputs \[batch, ...\], got {got}: pass a DataLoader"
    ):
        unpack(batch)


# --- length, order, name ----------------------------------------------------------------------------------------------


class Unsized(Sampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


@pytest.mark.parametrize(
    ("loader", "rows"),
    [
        (DataLoader(data(), batch_size=8), 40),
        (DataLoader(data(43), batch_size=8), 43),
        (DataLoader(data(43), batch_size=8, drop_last=True), 40),
        (DataLoader(data(7), batch_size=8, drop_last=True), 0),
        (DataLoader(data(), batch_size=8, sampler=SubsetRandomSampler(range(11))), 11),
        (DataLoader(Subset(data(), range(5)), batch_size=2), 5),
        (DataLoader(data(), batch_sampler=BatchSampler(SequentialSampler(range(9)), 4, drop_last=True)), 8),
        (DataLoader(data(), batch_sampler=[[0, 1], [2]]), None),
        (DataLoader(data(), batch_size=None), None),
        (DataLoader(data(), batch_size=2, sampler=Unsized()), None),
        (DataLoader(Stream(), batch_size=2), None),
        ([(X, Y)], None),
        (iter([(X, Y)]), None),
    ],
)
def test_row_count(loader: Any, rows: int | None) -> None:
    assert loaders.row_count(loader) == rows


@pytest.mark.parametrize(
    ("loader", "shuffled"),
    [
        (DataLoader(data(), batch_size=8), False),
        (DataLoader(data(), batch_size=8, shuffle=True), True),
        (DataLoader(data(), batch_size=8, sampler=SubsetRandomSampler(range(11))), True),
        (DataLoader(data(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 40)), True),
        (DataLoader(data(), batch_sampler=BatchSampler(RandomSampler(data()), 4, False)), True),
        (DataLoader(data(), batch_size=None, shuffle=True), True),
        (DataLoader(data(), batch_size=8, sampler=range(3)), False),
        (DataLoader(data(), batch_sampler=[[0, 1], [2]]), False),
        (DataLoader(Stream(), batch_size=2), False),
        ([(X, Y)], False),
    ],
)
def test_is_shuffled(loader: Any, shuffled: bool) -> None:
    assert loaders.is_shuffled(loader) is shuffled


def test_wrapper_around_a_shuffling_loader_is_shuffled() -> None:
    class Prefetching:
        def __init__(self, loader: DataLoader) -> None:
            self.loader, self.sampler = loader, loader.sampler

        def __iter__(self) -> Iterator[Any]:
            return iter(self.loader)

    assert loaders.is_shuffled(Prefetching(DataLoader(data(), shuffle=True)))
    assert not loaders.is_shuffled(Prefetching(DataLoader(data())))


def test_workers_that_do_not_keep_the_order_count_as_shuffling() -> None:
    loader = DataLoader(data(), batch_size=8, num_workers=2)
    assert not loaders.is_shuffled(loader)
    loader.in_order = False
    assert loaders.is_shuffled(loader)


class Damaged(Dataset):
    """Rows of which one cannot be read, and nothing else is wrong."""

    def __init__(self, row: int, error: type[Exception]) -> None:
        self.row, self.error = row, error

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        if index == self.row:
            raise self.error(f"cannot read the image {index}.png (errors.BadInput: it is cut): replace or remove it.")
        return torch.zeros(3)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [BadInput, MissingData])
@pytest.mark.parametrize(("row", "done"), [(3, 0), (30, 0), (30, 24)])
def test_error_of_a_worker_is_one_line(workers: int, error: type[Exception], row: int, done: int) -> None:
    loader = DataLoader(Damaged(row, error), batch_size=8, num_workers=workers)
    with pytest.raises(UnreadableRow if error is BadInput else MissingData) as raised:
        list(Batches.look_into(loader).after(done))
    remedy = " To leave out such rows and continue, pass on_error='skip'." if error is BadInput else ""
    assert str(raised.value) == (
        f"cannot read the image {row}.png (errors.BadInput: it is cut): replace or remove it.{remedy}"
    )


def test_other_errors_of_a_worker_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)DataLoader worker process 0.*Traceback"):
        Batches.look_into(DataLoader(Damaged(3, RuntimeError), batch_size=8, num_workers=1))


def test_name_and_preprocessing() -> None:
    class Named(Dataset):
        name = "svhn"
        transform = "Normalize(\n    mean=0.5\n)"

    assert loaders.dataset_name(DataLoader(Named(), sampler=[0])) == "svhn"
    assert loaders.preprocessing(DataLoader(Named(), sampler=[0])) == "'Normalize(\\n mean=0.5\\n)'"
    assert loaders.dataset_name(DataLoader(data())) == "TensorDataset"
    assert loaders.preprocessing(DataLoader(data())) == ""
    assert loaders.dataset_name([(X, Y)]) == "list"


# --- looking into a loader --------------------------------------------------------------------------------------------


def batches(loader: Any) -> list[tuple[int, int]]:
    return [(start, len(unpack(batch)[0])) for start, batch in Batches.look_into(loader).after(0)]


@pytest.mark.parametrize("size", [1, 3, 8, 16, 40, 64])
def test_no_batch_is_lost_by_reading_the_first_rows(size: int) -> None:
    expected = [(start, min(size, 40 - start)) for start in range(0, 40, size)]
    assert batches(DataLoader(data(), batch_size=size)) == expected
    assert batches(iter(DataLoader(data(), batch_size=size))) == expected


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 8, 16, 17, 39, 40])
def test_batches_after_a_row(rows: int, known: bool) -> None:
    loader = DataLoader(data(), batch_size=8)
    found = Batches.look_into(loader if known else iter(loader)).after(rows)
    assert [start for start, _ in found] == list(range(rows // 8 * 8, 40, 8))


def test_rows_after_a_row_are_correct() -> None:
    expected = data().tensors[0]
    for start, (inputs, _) in Batches.look_into(DataLoader(data(), batch_size=8, num_workers=1)).after(20):
        assert inputs.equal(expected[start : start + 8])


def test_empty_batches_are_skipped() -> None:
    assert batches([(X[:0], Y[:0]), (X, Y), (X[:0], Y[:0]), (X, Y)]) == [(0, 4), (4, 4)]


@pytest.mark.parametrize(
    "loader",
    [
        [],
        iter([]),
        DataLoader(TensorDataset(X[:0]), batch_size=2),
        DataLoader(data(7), batch_size=8, drop_last=True),
        [(X[:0], Y[:0])],
    ],
)
def test_empty_loader(loader: Any) -> None:
    with pytest.raises(EmptyInput, match=r"yields no batch: check whether the dataset is empty, or .* drop_last=True"):
        Batches.look_into(loader)


def test_dataset_instead_of_a_loader() -> None:
    with pytest.raises(BadInput, match=r"got a dataset: pass DataLoader\(dataset, batch_size=...\)"):
        Batches.look_into(data())  # type: ignore[arg-type]


def checksum(inputs: Tensor, labels: Tensor | None = None, size: int = 8) -> str:
    tensors = (inputs,) if labels is None else (inputs, labels)
    return Batches.look_into(DataLoader(TensorDataset(*tensors), batch_size=size)).checksum()


def test_checksum_detects_every_change_in_the_first_rows() -> None:
    inputs, labels = data().tensors
    changed_input, changed_label = inputs.clone(), labels.clone()
    changed_input[15, 2, 1] += 1e-6
    changed_label[15] += 1
    different = [
        checksum(inputs, labels),
        checksum(inputs),
        checksum(changed_input, labels),
        checksum(inputs, changed_label),
        checksum(inputs.double(), labels),
        checksum(inputs.transpose(1, 2).reshape(40, 3, 2), labels),
        checksum(inputs.reshape(40, 2, 3), labels),
        checksum((inputs - 0.1) / 0.3, labels),
        checksum(inputs[:15], labels[:15]),
        checksum(inputs.roll(1, 0), labels),
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_checksum_does_not_depend_on_the_batch_size(dtype: torch.dtype) -> None:
    inputs, labels = data().tensors
    assert len({checksum(inputs.to(dtype), labels, size) for size in (1, 3, 8, 16, 40)}) == 1


def test_checksum_of_inputs_of_several_widths() -> None:
    one, other = ([torch.zeros(2, 3, width) for width in widths] for widths in ((4, 5), (5, 4)))
    assert Batches.look_into(one).checksum() != Batches.look_into(other).checksum()
