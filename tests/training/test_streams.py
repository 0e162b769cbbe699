"""Orders of images, the auxiliary stream, and the validation split."""

from __future__ import annotations

import numpy as np
import torch

from ood_scores.data.subsets import validation_split
from ood_scores.training.streams import cycled, order, share


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
