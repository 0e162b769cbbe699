"""The check that all values of a tensor are finite."""

from __future__ import annotations

import math

import pytest
import torch

from ood_scores.errors import NotFinite
from ood_scores.features.finite import all_finite, require_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    values = torch.ones(30, 4)
    assert all_finite(values)
    values[17, 2] = value
    assert not all_finite(values)


def test_finite_values_with_an_infinite_sum_are_finite() -> None:
    assert all_finite(torch.full((10, 3), 3e38))
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


def test_no_columns_are_finite() -> None:
    require_finite({})
    with pytest.raises(NotFinite, match="row 5"):
        require_finite({"features": torch.tensor([[1.0], [math.nan]])}, start=4)
