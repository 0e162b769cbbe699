"""Convolution with a bounded spectral norm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpectralConv2d(nn.Conv2d):
    """Convolution with W / max(1, sigma/coefficient), sigma the largest singular value of W as `[out, in·kh·kw]`.

    Weights whose sigma is below the coefficient are used as they are. Every training forward improves the buffer `u`,
    the estimate of W's left singular vector `[out]`, by one power iteration; eval mode leaves it alone, so outputs
    are deterministic and survive a checkpoint. `weight` keeps its name and is the unconstrained parameter.

    Source: Miyato et al. 2018, with the soft bound of Gouk et al. 2018 as in SNGP (Liu et al. 2020) and DDU (Mukhoti
    et al. 2021). DDU's code bounds the matrix of 1x1 convolutions but, for 3x3, the norm of the whole operator on
    images of one size, which is up to 3 times larger, so its bound is tighter. The matrix is used throughout here, as
    in SNGP: it does not tie the weights to an image size.
    """

    u: Tensor

    def __init__(self, *args: Any, coefficient: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.coefficient = coefficient
        self.register_buffer("u", F.normalize(torch.randn(self.out_channels), dim=0))

    @torch.no_grad()
    def _power_iteration(self) -> None:
        matrix = self.weight.flatten(1)
        self.u.copy_(F.normalize(matrix @ (matrix.T @ self.u), dim=0))

    def constrained_weight(self) -> Tensor:
        """The weight that the convolution uses, `[out, in, kh, kw]`."""
        u = self.u.clone()  # the next forward changes the buffer, perhaps before this one's backward
        sigma = (self.weight.flatten(1).T @ u).norm()
        return self.weight / (sigma / self.coefficient).clamp(min=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._power_iteration()
        return self._conv_forward(x, self.constrained_weight(), self.bias)
