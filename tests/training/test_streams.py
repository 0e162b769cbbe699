"""Orders of images, the auxiliary stream, and the validation split."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from gpu_waits import waits_of
from torch import Generator

from ood_scores.data.subsets import validation_split
from ood_scores.training import train
from ood_scores.training.augment import AUGMENTATIONS
from ood_scores.training.recipe_file import recipe_from
from ood_scores.training.streams import HeldImages, cycled, order, share


def test_an_epoch_contains_every_image_once() -> None:
    rows = order(3, 1, 103, 25, drop_last=False)
    assert [len(batch) for batch in rows] == [25, 25, 25, 25, 3]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(103))
    assert [len(batch) for batch in order(3, 1, 103, 25, drop_last=True)] == [25] * 4
    assert len(order(3, 1, 100, 25, drop_last=True)) == 4
    assert not torch.equal(rows[0], order(3, 2, 103, 25, drop_last=False)[0])


def test_auxiliary_stream_repeats_in_new_orders() -> None:
    rows = torch.cat(cycled(7, 0, 0, 9, 20, 8))
    assert len(rows) == 72
    rounds = rows[:60].reshape(3, 20)
    assert torch.equal(rounds.sort(dim=1).values, torch.arange(20).expand(3, 20))
    assert not torch.equal(rounds[0], rounds[1])
    assert torch.equal(torch.cat(cycled(7, 0, 4, 5, 20, 8)), rows[32:])
    assert [len(batch) for batch in cycled(7, 0, 0, 3, 5, 8)] == [8, 8, 8]


def test_shares_of_all_processes_form_the_batch() -> None:
    batch = order(0, 0, 64, 64, drop_last=False)[0]
    parts = [share([batch], rank, 4)[0] for rank in range(4)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(), batch)


def test_validation_split_is_stratified_and_keeps_single_images_for_training() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 45, 9, 1])
    kept, aside = validation_split(labels, 0.1)
    assert np.bincount(labels[aside], minlength=4).tolist() == [10, 4, 0, 0]
    assert sorted([*kept, *aside]) == list(range(155))
    assert aside.tolist() == validation_split(labels, 0.1)[1].tolist()
    assert len(validation_split(labels, 0.0)[1]) == 0


def test_held_images_are_those_of_the_rows() -> None:
    images, labels = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2), torch.arange(10)
    rows = [torch.tensor([3, 1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([9])]
    held = HeldImages(images, labels, torch.device("cpu"))
    found = list(held.batches(rows, [0] * 3))
    assert [own.tolist() for _, own in found] == [[3, 1, 2], [], [9]]
    assert all(torch.equal(batch, images[chosen]) for (batch, _), chosen in zip(found, rows, strict=True))
    assert list(held.batches([], [])) == []


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_no_step_of_a_training_waits_for_the_gpu(tmp_path: Path) -> None:
    recipes = {size: recipe_from(tiny.tables(epochs=1, batch_size=size)) for size in (64, 32)}
    few, many = (
        waits_of(partial(train, recipe, tmp_path / str(size), device="cuda", progress=False))
        for size, recipe in recipes.items()
    )
    assert many == few


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_do_not_wait_for_the_gpu(name: str) -> None:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device="cuda")
    augment = partial(AUGMENTATIONS[name], images, Generator("cuda").manual_seed(0))
    augment()  # copies constants
    assert waits_of(augment) == 0
