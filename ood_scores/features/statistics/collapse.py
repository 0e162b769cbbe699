"""Terms of neural collapse as functions of class means and classifier weights, for training and for evaluation.

All functions except ``variability_of_covariance`` are differentiable everywhere. ``C`` is the number of classes, ``D``
that of features. Centered means are the class means minus their unweighted mean.

Source: Papyan, Han & Donoho (2020), "Prevalence of neural collapse during the terminal phase of deep learning
training", and their code; Haas, Yolland & Rabus (2022), Eq. 4 to 8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def variability(deviations: Tensor, centered: Tensor) -> Tensor:
    """Return the variability within classes relative to that between them, ``tr(S_W S_B^+) / C`` (NC1).

    The means sum to 0, so they have C-1 coordinates B, with ``M = Q B`` and Q orthonormal. Both factors C cancel, and
    the term is ``||deviations B^+||_F^2 / N``. No singular value of B is 0 up to rounding. The gradient is therefore
    that of a pseudo-inverse of constant rank, which is finite where singular values coincide, as they do on a simplex.

    Args:
        deviations: Features minus their class means ``[N, D]``.
        centered: Centered class means M ``[C, D]``.
    """
    coordinates = _contrasts(centered).mT @ centered
    return (deviations @ torch.linalg.pinv(coordinates)).square().sum() / len(deviations)


def variability_of_covariance(within: Tensor, centered: Tensor) -> Tensor:
    """Return ``tr(S_W S_B^+)``, without the division by C, from the within-class covariance instead of the features.

    The pseudo-inverse is truncated at rank C-1, and where a singular value of M is below the rounding of the largest.
    The gradient is infinite where singular values coincide.

    Args:
        within: Within-class covariance S_W ``[D, D]``.
        centered: Centered class means M ``[C, D]``, of which ``S_B = M^T M / C``.
    """
    _, values, directions = torch.linalg.svd(centered, full_matrices=False)
    smallest = values[0] * max(centered.shape) * torch.finfo(centered.dtype).eps
    kept = (values > smallest) & (torch.arange(len(values)) < len(centered) - 1)
    spread = ((directions @ within) * directions).sum(dim=1)
    return len(centered) * (spread[kept] / values[kept].square()).sum()


def equinormality(vectors: Tensor) -> Tensor:
    """Return the unbiased standard deviation of the norms of rows ``[C, D]`` over their mean (NC2)."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    return norms.std() / norms.mean()


def equiangularity(vectors: Tensor) -> Tensor:
    """Return the mean of ``|cos(v_i, v_j) + 1/(C-1)|`` over rows i != j of ``[C, D]`` (NC2); cosines of zero are 0."""
    classes = len(vectors)
    unit = unit_rows(vectors)
    excess = (unit @ unit.mT + 1 / (classes - 1)).abs()
    itself = torch.eye(classes, dtype=torch.bool, device=vectors.device)
    return excess.masked_fill(itself, 0).sum() / (classes * (classes - 1))


def self_duality(weight: Tensor, centered: Tensor, columns: bool = False) -> Tensor:
    """Return ``|| W/||W||_F - M/||M||_F ||_F^2`` of weights and centered class means ``[C, D]`` (NC3).

    Args:
        weight: Weight W of the classifier.
        centered: Centered class means M.
        columns: Whether to scale each ``w_c`` and ``m_c`` to length one instead of the whole matrices, as the text of
            Haas et al. (2022) does; the default is Papyan's definition.
    """
    scaled = unit_rows if columns else _unit_matrix
    return (scaled(weight) - scaled(centered)).square().sum()


def unit_rows(vectors: Tensor) -> Tensor:
    """Scale the rows to length one; a zero row stays zero."""
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1)


def _unit_matrix(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors)


def _contrasts(centered: Tensor) -> Tensor:
    """Return an orthonormal basis ``[C, C-1]`` of the vectors that sum to 0."""
    spanning = torch.eye(len(centered), dtype=centered.dtype, device=centered.device)
    spanning[:, 0] = 1
    return torch.linalg.qr(spanning).Q[:, 1:]
