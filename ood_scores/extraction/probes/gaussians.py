"""A probe that moves inputs toward the Gaussians of a fit set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ood_scores.data.dataset_spec import expanded, located
from ood_scores.errors import BadInput, OtherModel
from ood_scores.extraction.probes.base import Pass, Probe, register_probe
from ood_scores.extraction.probes.input_perturbation import step
from ood_scores.features import FeatureSet, load
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments
from ood_scores.models.running import weights_sha256


@register_probe
@dataclass(frozen=True)
class MahalanobisODIN(Probe):
    """Features of inputs moved toward the nearest class: the extra ``mahalanobis_odin`` ``[N, D]``.

    ``z(x - epsilon sign(grad_x M(x)))``, where ``M(x) = min_c (z - mu_c)^T Sigma^-1 (z - mu_c)`` is the Mahalanobis
    distance of the features, with the class means and the tied covariance of a fit set. Used by the scorer
    ``mahalanobis_odin``.

    Source: Lee et al. 2018, section 2.2; epsilon is the default of pytorch-ood, whose detector has this name. The
    authors tune it on OoD data, for each dataset. Departure: directions in which the fit data do not vary are left out.

    Args:
        fit: the cache with features and labels of the fit set, of the same model, which is opened when the probe runs.
        epsilon: the size of the step, in units of the model's inputs, after their normalization.
        std: the same as for ``ODIN``.
        normalize: whether to L2-normalize the features in the distance.
        one_class: whether to use one mean, and the covariance around it; no labels are needed.
        identity: the identity of the cache, which is read from it if it is "".
        root: the folder where a relative path ``fit`` starts; defaults to the current folder.

    Cost: one additional forward and backward pass, and a forward pass.
    """

    name: str = "mahalanobis_odin"
    fit: str = ""
    epsilon: float = 0.002
    std: tuple[float, ...] | None = None
    normalize: bool = False
    one_class: bool = False
    identity: str = ""
    root: str = field(default="", repr=False)
    gradients: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    reads_a_file: ClassVar[bool] = True
    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset({"root"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0:
            raise BadInput(f"{self.name}: epsilon must be at least 0, got {self.epsilon}.")
        if self.fit and not self.identity:
            object.__setattr__(self, "identity", _identity(load(self._cache)))

    @property
    def _cache(self) -> Path:
        """The path of the cache; environment variables are expanded."""
        return located(expanded(self.fit), Path(self.root))

    def for_model(self, model: nn.Module, inputs: Tensor) -> Probe:
        if not self.fit:
            raise BadInput(f"{self.name} needs the cache of the fit set: pass fit=CACHE ({self.name}:fit=train.h5).")
        origin = load(self._cache).provenance
        if origin and origin.weights_sha256 != weights_sha256(model):
            raise OtherModel(
                f"the features in {self.fit} come from other weights than those of the model: extract them again."
            )
        return self

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert done.features_of is not None
        if self.epsilon == 0:
            return {self.name: done.features_of(done.inputs)}
        if not done.inputs.is_floating_point():
            raise BadInput(f"{self.name} differentiates, which needs floating-point inputs, got {done.inputs.dtype}.")
        with torch.enable_grad():
            inputs = done.inputs.detach().clone().requires_grad_()  # unlike its source, no inference tensor
            (gradient,) = torch.autograd.grad(self._distances(done.features_of(inputs)).sum(), inputs)
        return {self.name: done.features_of(done.inputs - step(gradient, self.epsilon, self.std))}

    def _distances(self, features: Tensor) -> Tensor:
        """Return half of the squared distance to the nearest mean, float64 ``[B]``."""
        means, precision = _gaussians(self._cache, self.identity, self.normalize, self.one_class)
        rows = features.double()
        if self.normalize:
            rows = torch.nn.functional.normalize(rows)
        if rows.shape[1] != means.shape[1]:
            raise BadInput(
                f"the features in {self.fit} have {means.shape[1]} values, those of the model {rows.shape[1]}: extract "
                "them with the same pooling and head."
            )
        means, precision = means.to(rows), precision.to(rows)
        with torch.no_grad():
            scaled = means @ precision
            nearest = ((scaled * means).sum(dim=1) - 2 * rows @ scaled.T).argmin(dim=1)
        deviations = rows - means[nearest]
        return ((deviations @ precision) * deviations).sum(dim=1) / 2


def _identity(feats: FeatureSet) -> str:
    return str(getattr(feats.columns["features"], "identity", None) or "none")


@lru_cache(maxsize=2)
def _gaussians(fit: Path, identity: str, normalize: bool, one_class: bool) -> tuple[Tensor, Tensor]:
    """Return the class means ``[C, D]`` and the inverse of the tied covariance ``[D, D]`` of a cache, float64."""
    feats = load(fit)
    if _identity(feats) != identity:
        raise BadInput(f"{fit} was replaced after the probe was created: create the probe again.")
    statistic = (GlobalMoments if one_class else ClassMoments)("features", normalize)
    moments = collect(feats, [statistic])[statistic]
    covariance = moments.scatter / moments.counts.sum()
    return moments.means[moments.counts > 0], torch.linalg.pinv(covariance, hermitian=True)
