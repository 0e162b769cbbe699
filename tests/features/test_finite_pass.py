"""A pass over a set, whose blocks are checked after their use."""

from __future__ import annotations

import pytest
import torch

from ood_scores import FeatureSet
from ood_scores.errors import NotFinite
from ood_scores.features.finite_pass import FinitePass

ROW = 7


@pytest.fixture
def spoiled() -> FeatureSet:
    features = torch.ones(10, 3)
    features[ROW, 1] = torch.nan
    return FeatureSet(features, torch.ones(10, 2)).in_blocks(4)


def use(feats: FeatureSet, column: str, used: list[int]) -> None:
    """Append the first row of each block that is used."""
    whole = FinitePass(feats, [column])
    for block in whole.blocks():
        with whole.used(block):
            used.append(block.start)


def test_a_block_is_checked_after_its_use(spoiled: FeatureSet) -> None:
    used: list[int] = []
    with pytest.raises(NotFinite, match=f"features hold NaN .* row {ROW}"):
        use(spoiled, "features", used)
    assert used == [0, 4]


def test_an_error_may_be_due_to_the_values(spoiled: FeatureSet) -> None:
    whole = FinitePass(spoiled, ["features"])
    blocks = whole.blocks()
    with pytest.raises(ZeroDivisionError), whole.used(next(blocks)):
        raise ZeroDivisionError
    with pytest.raises(NotFinite), whole.used(next(blocks)):
        raise ZeroDivisionError


def test_columns_that_are_not_read_are_not_checked(spoiled: FeatureSet) -> None:
    used: list[int] = []
    use(spoiled, "logits", used)
    assert used == [0, 4, 8]


@pytest.mark.gpu
def test_on_a_device_all_blocks_are_checked_at_the_end(spoiled: FeatureSet) -> None:
    used: list[int] = []
    with pytest.raises(NotFinite, match=f"features hold NaN .* row {ROW}"):
        use(FeatureSet(spoiled.features.cuda()).in_blocks(4), "features", used)
    assert used == [0, 4, 8]
