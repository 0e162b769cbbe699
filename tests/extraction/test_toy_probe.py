"""The mean of every input."""

import torch
from torch import nn

import ood_scores


def test_mean_input_is_the_mean_of_each_input() -> None:
    inputs = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    feats = ood_scores.extract(model, [inputs], probes=["mean_input"], progress=False)
    torch.testing.assert_close(feats.extras["mean_input"], inputs.mean(dim=(1, 2, 3)))
