"""Linear probes: heads for the features of an encoder, by multinomial logistic regression."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy

from ood_scores.errors import BadInput, BadLabels
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.head import Head
from ood_scores.progress import worked, working
from ood_scores.runtime import default_torch_state
from ood_scores.user_warnings import warn_user

L2 = tuple(10.0**power for power in range(0, -8, -1))
"""The weights of the penalty that are tried, from the strongest on."""

HELD_OUT = 10
"""One row of this many of each class is held out."""

MOST_ITERATIONS = 1000
TOLERANCE = 1e-6


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe.

    Attributes:
        head: the head, float32.
        l2: the weight of the penalty.
        losses: the cross-entropy on held-out rows by the weight of the penalty; empty if it was not chosen.
        accuracy: the accuracy on held-out rows with the chosen weight; None if it was not chosen.
    """

    head: Head
    l2: float
    losses: dict[float, float]
    accuracy: float | None


def fit_linear_probe(feats: FeatureSet, *, l2: float | None = None, seed: int = 0) -> FeatureSet:
    """Fit a linear classifier on the features of a set with labels, and return the set with its head and logits.

    The head of the result is that of other sets of the same model, too: ``other.with_head(probed.head)``; and
    ``extract(model, loader, head=probed.head)`` and detectors compute the same logits. With them, scorers that need
    logits or a head run on the features of an encoder.

    See ``linear_probe`` for the objective.

    Args:
        feats: the set, usually the training set.
        l2: the weight of the penalty; None to choose it on held-out rows.
        seed: the seed of the choice of held-out rows.

    Raises:
        BadLabels: if there are no labels, fewer than two classes, or a class without rows.
        BadInput: if ``l2`` is negative or not finite, or no class has two rows to hold one of them out.
        NotFinite, EmptyInput: if the features cannot be used.
    """
    return feats.with_head(linear_probe(feats, l2=l2, seed=seed).head)


@default_torch_state()
def linear_probe(feats: FeatureSet, *, l2: float | None = None, seed: int = 0) -> LinearProbe:
    """Fit a linear classifier, and tell how its penalty was chosen.

    ``mean_i CE(W z_i + b, y_i) + l2 / 2 ||W||^2`` is minimized by L-BFGS in float64, where z are the features with mean
    0 and variance 1 in each dimension; the head is ``W z + b`` as a map of the original features. Of eight weights from
    1 to 1e-7, the one with the smallest cross-entropy on held-out rows is chosen, a tenth of each class; then all rows
    are used. With standardized features, scikit-learn's ``LogisticRegression(C=1 / (l2 N))`` has the same minimum.

    Cost: 6 N D C operations and a pass over the set for each of some hundred steps per weight; memory for one block. On
    a large set, a GPU (``load(path, device="cuda")``) and a given ``l2`` save most of the time.

    Args and errors are those of ``fit_linear_probe``.
    """
    if l2 is not None and not 0 <= l2 < math.inf:
        raise BadInput(f"l2 must be at least 0 and finite, got {l2}.")
    labels = _labels(feats)
    problem = _Problem(feats, int(labels.max()) + 1, *_scale(feats))
    if l2 is not None:
        return LinearProbe(problem.head(problem.minimize(l2, None, None)), l2, {}, None)
    held_out = _held_out(labels, seed)
    working("fitting a linear probe", len(L2) + 1, "fits")
    losses: dict[float, float] = {}
    accuracies: dict[float, float] = {}
    start = best = None
    for number, weight in enumerate(L2):
        worked(number, f"l2={weight:g}")
        start = problem.minimize(weight, ~held_out, start)
        losses[weight], accuracies[weight] = problem.judge(start, held_out)
        if losses[weight] == min(losses.values()):
            best, chosen = start, weight
    worked(len(L2), "all rows")
    return LinearProbe(problem.head(problem.minimize(chosen, None, best)), chosen, losses, accuracies[chosen])


def _labels(feats: FeatureSet) -> Tensor:
    labels = feats.class_labels().cpu()
    found = labels.unique()
    if len(found) < 2:
        raise BadLabels("all rows have the same label: a linear probe needs at least two classes.")
    absent = (found != torch.arange(len(found))).nonzero()
    if len(absent):
        raise BadLabels(
            f"there are rows of {len(found):,} classes, but class {int(absent[0])} has none, and labels run to "
            f"{int(found[-1])}: fit the probe on all classes, or number those that there are from 0 on."
        )
    return labels


def _held_out(labels: Tensor, seed: int) -> Tensor:
    """Return which rows ``[N]`` are held out: every tenth of each class, or every second if no class has ten."""
    most = int(labels.bincount().max())
    if most < 2:
        raise BadInput("no class has two rows, so that no row can be held out: pass l2=, such as 0.01.")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    step = min(HELD_OUT, most)
    found = torch.zeros(len(labels), dtype=torch.bool)
    found[order[rank % step == step - 1]] = True
    return found


def _scale(feats: FeatureSet) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each feature, float64 ``[D]``; 1 for a constant one."""
    total = squares = torch.zeros((), dtype=torch.float64)
    for block in feats.blocks(only=["features"]):
        block.require_finite()
        values = block.features.double()
        total, squares = total.to(values.device) + values.sum(0), squares.to(values.device) + values.square().sum(0)
    mean = total / len(feats)
    variance = (squares / len(feats) - mean.square()).clamp_min(0)
    constant = variance <= 1e-12 * mean.square()
    return mean, torch.where(constant, 1.0, variance.sqrt())


@dataclass(frozen=True)
class _Problem:
    """The regression on a set; parameters are one array ``[C (D + 1)]`` of W and b."""

    feats: FeatureSet
    classes: int
    mean: Tensor
    scale: Tensor

    def minimize(self, l2: float, used: Tensor | None, start: np.ndarray | None) -> np.ndarray:
        """Return the parameters that minimize the objective on the rows ``used`` ``[N]``, or on all."""
        width = len(self.mean) + 1
        first = np.zeros(self.classes * width) if start is None else start
        found = minimize(
            self._objective(l2, used),
            first,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MOST_ITERATIONS, "maxfun": 2 * MOST_ITERATIONS, "gtol": TOLERANCE, "ftol": 1e-12},
        )
        if found.status == 1:
            warn_user(
                f"the linear probe with l2={l2:g} has not converged after {found.nit} steps: a larger l2 converges "
                "faster.",
            )
        solution: np.ndarray = found.x
        return solution

    def _objective(self, l2: float, used: Tensor | None) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        rows = len(self.feats) if used is None else int(used.sum())

        def value_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            flat = self._as_tensor(parameters)
            weight = flat[:, :-1]
            value, gradient = (
                weight.square().sum() * l2 / 2,
                torch.cat([weight * l2, torch.zeros_like(flat[:, -1:])], 1),
            )
            for z, y in self._blocks(used):
                log_softmax = (z @ flat.T).log_softmax(dim=1)
                residual = log_softmax.exp()
                residual[torch.arange(len(y), device=y.device), y] -= 1
                value = value - log_softmax.gather(1, y[:, None]).sum() / rows
                gradient += residual.T @ z / rows
            return float(value), gradient.reshape(-1).cpu().numpy()

        return value_and_gradient

    def judge(self, parameters: np.ndarray, rows: Tensor) -> tuple[float, float]:
        """Return the cross-entropy and the accuracy on some rows."""
        loss, correct = 0.0, 0
        flat = self._as_tensor(parameters)
        for z, y in self._blocks(rows):
            logits = z @ flat.T
            loss += float(cross_entropy(logits, y, reduction="sum"))
            correct += int((logits.argmax(dim=1) == y).sum())
        return loss / int(rows.sum()), correct / int(rows.sum())

    def head(self, parameters: np.ndarray) -> Head:
        """Return the map from the original features."""
        flat = self._as_tensor(parameters)
        weight = flat[:, :-1] / self.scale
        return Head(weight.float().cpu(), (flat[:, -1] - weight @ self.mean).float().cpu())

    def _as_tensor(self, parameters: np.ndarray) -> Tensor:
        return torch.from_numpy(parameters).to(self.mean.device).reshape(self.classes, -1)

    def _blocks(self, used: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The standardized features with a 1 at the end, float64 ``[B, D + 1]``, and the labels of the rows used."""
        for block in self.feats.blocks(only=["features", "labels"]):
            z, y = (block.features.double() - self.mean) / self.scale, block.labels
            assert y is not None
            if used is not None:
                chosen = used[block.start : block.start + len(block)].to(z.device)
                z, y = z[chosen], y[chosen]
            yield torch.cat([z, z.new_ones(len(z), 1)], dim=1), y.long()
