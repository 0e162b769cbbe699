"""Convolution with a bounded spectral norm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpectralConv2d(nn.Conv2d):
    """Convolution with ``W / max(1, sigma/coefficient)``, sigma the largest singular value of W ``[out, in*kh*kw]``.

    Weights with sigma below the coefficient are used unchanged. Every forward pass in training improves the buffer
    ``u``, the estimate of W's left singular vector ``[out]``, by one power iteration. Eval mode does not change it, so
    outputs are deterministic and the same after a checkpoint. ``weight`` is the unconstrained parameter.

    Source: Miyato et al. 2018, with the soft bound of Gouk et al. 2018 as in SNGP (Liu et al. 2020) and DDU (Mukhoti
    et al. 2021). DDU's code bounds the matrix for 1x1 convolutions but, for 3x3, the norm of the whole operator on
    images of one size, which is up to 3 times larger, so its bound is tighter. This class always uses the matrix, as
    SNGP does, which does not tie the weights to an image size.
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
        """Return the weight that the convolution uses, ``[out, in, kh, kw]``."""
        u = self.u.clone()  # the next forward pass may change the buffer before this one's backward pass
        sigma = (self.weight.flatten(1).T @ u).norm()
        return self.weight / (sigma / self.coefficient).clamp(min=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._power_iteration()
        return self._conv_forward(x, self.constrained_weight(), self.bias)
