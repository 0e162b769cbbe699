"""Blocks: consecutive rows of a feature set on a device, whose derived quantities are computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.features.finite import require_finite
from ood_scores.features.head import Head
from ood_scores.features.row_reductions import (
    below_largest,
    by_pieces,
    column_sums,
    entropy,
    exp_,
    odds_of,
    others_of,
    row_norm,
)
from ood_scores.features.storage.texts import unpacked
from ood_scores.runtime import CPU

if TYPE_CHECKING:
    from typing import Concatenate

    from typing_extensions import ParamSpec

    P = ParamSpec("P")
R = TypeVar("R")

NEARLY_UNIFORM = 1.05
"""A softmax is nearly uniform if no probability exceeds this multiple of 1 / C: quantities derived from its float32
logits are then computed in float64, because float32 rounds away the small differences between rows."""

CERTAIN = 1e-28
"""A softmax is certain if all odds but the largest sum to less than this: what small odds decide is then computed in
float64, because float32 exponentials lose digits below 1e-38 and are 0 below 1e-45."""


def once(method: Callable[Concatenate[Block, P], R]) -> Callable[Concatenate[Block, P], R]:
    """Compute a derived quantity once per block and set of arguments."""

    @wraps(method)
    def remembered(self: Block, *args: P.args, **kwargs: P.kwargs) -> R:
        key = (method.__name__, args, tuple(kwargs.items()))
        if key not in self._derived:
            self._derived[key] = method(self, *args, **kwargs)
        return self._derived[key]

    return remembered


class Block:
    """Rows of a feature set on one device, with the quantities that scorers derive from them.

    ``features`` ``[B, D]`` and ``logits`` ``[B, C]`` are float32 or float64 (half precision is widened). Quantities
    derived from the logits are float64: a softmax confidence must not saturate at 1 and create ties that the logits do
    not have. Exponentials are computed in the precision of the logits. Norms of the features are summed in the dtype of
    the features and returned as float64.
    """

    def __init__(
        self,
        features: Tensor | None = None,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        head: Head | None = None,
        extras: Mapping[str, Tensor] | None = None,
        start: int = 0,
        rows: int | None = None,
        ids: Tensor | None = None,
    ) -> None:
        self._ids = ids
        self._features = None if features is None else _at_least_float32(features)
        self._logits = None if logits is None else _at_least_float32(logits)
        self._labels = None if labels is None else labels.long()
        self._head = head
        self.extras = dict(extras or {})
        self.start = start
        self._rows = features.shape[0] if features is not None else rows or 0  # len() would fix it in a traced graph
        self._derived: dict[Any, Any] = {}
        self._totals: dict[str, Tensor] = {}
        self.postponed: list[Tensor] | None = None

    def __len__(self) -> int:
        return self._rows

    @property
    def features(self) -> Tensor:
        return _present(self._features, "features")

    @property
    def logits(self) -> Tensor:
        return _present(self._logits, "logits")

    @property
    def labels(self) -> Tensor:
        return _present(self._labels, "labels")

    @property
    def ids(self) -> NDArray[np.str_]:
        """The name of each row, ``[B]``; "" for a row without one."""
        return unpacked(_present(self._ids, "ids"))

    @property
    def head(self) -> Head:
        return _present(self._head, "head")

    def replaced(
        self, *, features: Tensor | None = None, logits: Tensor | None = None, head: Head | None = None
    ) -> Block:
        """Create a block of the same rows with other features, logits, or head. Derived quantities are not copied.

        Logits depend on the features and the head: if one of these is replaced and no logits are given, the new block
        has none.
        """
        stale = features is not None or head is not None
        new = Block(
            self._features if features is None else features,
            logits if logits is not None or stale else self._logits,
            self._labels,
            self._head if head is None else head,
            self.extras,
            self.start,
            self._rows,
            self._ids,
        )
        new.postponed = self.postponed
        return new

    def part(self, rows: slice) -> Block:
        """Create a block of some of the rows."""
        start, stop, _ = rows.indices(len(self))
        columns = (self._features, self._logits, self._labels)
        features, logits, labels = (None if values is None else values[rows] for values in columns)
        extras = {name: values[rows] for name, values in self.extras.items()}
        ids = None if self._ids is None else self._ids[rows]
        return Block(features, logits, labels, self._head, extras, self.start + start, stop - start, ids)

    @property
    def device(self) -> torch.device:
        """The device of the columns."""
        for values in (self._features, self._logits, *self.extras.values()):
            if values is not None and values.is_floating_point():
                return values.device
        return CPU

    def happens(self, rows: Tensor) -> bool:
        """Whether a condition that is rare holds for any row, bool ``[B]``, so that a scorer has to treat some apart.

        On a device the host would have to wait for the answer. While conditions are ``postponed``, the answer is
        False, and the condition is added to the list: if it turns out to hold, the block is scored again.
        """
        if self.postponed is None:
            return bool(rows.any())
        self.postponed.append(rows.any())
        return False

    def is_finite(self) -> Tensor:
        """Whether the sums of all columns are finite, as they cannot be if a value is not: bool, on the device."""
        columns = self.floating_columns().items()
        totals = [self._totals[name] if name in self._totals else values.sum() for name, values in columns]
        sums = [total.isfinite().to(self.device) for total in totals]
        return torch.stack(sums).all() if sums else torch.ones((), dtype=torch.bool, device=self.device)

    def require_finite(self) -> None:
        """Check that features, logits and extras hold neither NaN nor infinite values.

        Raises:
            NotFinite: if one does; the message names the column and its first such row.
        """
        if not self._sums_are_finite():
            require_finite(self.floating_columns(), self.start)

    def _sums_are_finite(self) -> bool:
        """Whether the sums of all columns are finite, as they cannot be if a value is not.

        A sum is the cheapest pass there is. Norms and sums of the features are not finite either if a feature is not,
        so where these have been derived the features are not read again; nor are columns that ``reduced`` has summed.
        """
        if self.device.type != "cpu":
            return bool(self.is_finite())  # the host waits once
        derived = [value for (name, *_), value in self._derived.items() if name in ("feature_norm", "feature_sums")]
        known = {"features"} if any(bool(value.isfinite().all()) for value in derived) else set()
        known |= {name for name, total in self._totals.items() if math.isfinite(total)}
        return all(math.isfinite(values.sum()) for name, values in self.floating_columns().items() if name not in known)

    def floating_columns(self) -> dict[str, Tensor]:
        """The features, logits, and extras that the block has, by name."""
        columns = {"features": self._features, "logits": self._logits} | self.extras
        return {name: values for name, values in columns.items() if values is not None and values.is_floating_point()}

    @once
    def logits64(self) -> Tensor:
        """Logits ``[B, C]`` as float64."""
        return self.logits.double()

    @once
    def max_logit(self) -> Tensor:
        """The largest logit, float64 ``[B]``."""
        return self._largest()[:, 0].double()

    @once
    def _largest(self) -> Tensor:
        return self.logits.amax(dim=1, keepdim=True)

    @once
    def native_below_max(self) -> Tensor:
        """``logits - max logit`` in the precision of the logits, ``[B, C]``: at most 0, rounded to half a digit."""
        return self.logits - self._largest()

    @once
    def below_max(self, temperature: float = 1.0) -> Tensor:
        """``(logits - max logit) / temperature``, float64 ``[B, C]``: at most 0."""
        below = self.logits64() - self.max_logit()[:, None]
        return below if temperature == 1.0 else below.div_(temperature)

    @once
    def odds(self, temperature: float = 1.0) -> Tensor:
        """The probability of each class divided by that of the predicted class, ``exp((f - max f) / T)``, ``[B, C]``.

        They are computed in the precision of the logits: the rounding errors of float32 logits are as large as those of
        the exponential.
        """
        below = self.native_below_max()
        return below.exp() if temperature == 1.0 else below.div(temperature).exp_()

    @once
    def total_odds(self, temperature: float = 1.0) -> Tensor:
        """The sum of the ``odds`` over the classes, float64 ``[B]``: the inverse of the largest probability, which
        therefore does not saturate."""
        total = self.odds(temperature).double().sum(dim=1)
        uniform = total > self.logits.shape[1] / NEARLY_UNIFORM
        return self.refined(total, uniform, lambda logits: below_largest(logits).exp_().sum(dim=1), temperature)

    @once
    def odds_of_others(self) -> tuple[Tensor, Tensor]:
        """The predicted class and the sum of the ``odds`` of all other classes, both ``[B, 1]``.

        The sum keeps the digits that ``total_odds() - 1`` loses for a confident prediction.
        """
        predicted = self.prediction()[:, None]
        others = self.odds().scatter(1, predicted, 0.0).double().sum(dim=1)
        extreme = (others < CERTAIN) | (others > self.logits.shape[1] / NEARLY_UNIFORM - 1)
        others = self.refined(others, extreme, lambda logits: others_of(odds_of(logits)))
        return predicted, others[:, None]

    @once
    def log_softmax(self, temperature: float = 1.0) -> Tensor:
        """``log softmax(logits / temperature)``, float64 ``[B, C]``."""
        return self.below_max(temperature) - self.total_odds(temperature).log()[:, None]

    @once
    def softmax(self, temperature: float = 1.0) -> Tensor:
        """``softmax(logits / temperature)``, float64 ``[B, C]``."""
        total = self.total_odds(temperature)
        uniform = total > self.logits.shape[1] / NEARLY_UNIFORM
        softmax = self.odds(temperature) / total[:, None]
        return self.refined(softmax, uniform, lambda logits: logits.softmax(dim=1), temperature)

    def refined(
        self, values: Tensor, extreme: Tensor, exact: Callable[[Tensor], Tensor], temperature: float = 1.0
    ) -> Tensor:
        """Replace the values ``[B, ...]`` of rows with a nearly uniform or certain softmax, in place; return all.

        ``exact`` computes them from ``logits / temperature`` in float64. A traced graph leaves the values as they are.
        """
        if self.logits.dtype != torch.float64 and not torch.compiler.is_compiling() and self.happens(extreme):
            values[extreme] = exact(self.logits[extreme].double().div_(temperature))
        return values

    def from_native_softmax(self, temperature: float, reduced: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce each row of ``softmax(logits / temperature)`` to one value, ``[B]``.

        The softmax is computed in the precision of the logits, at half the cost of ``softmax``, and is never in memory
        as a whole; in float32 every probability above 1 - 6e-8 is 1.
        """
        return self.reduced(lambda logits: reduced(_divided(logits, temperature).softmax(dim=1)))

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce the logits of each row as ``by_pieces`` does.

        The first time, each piece is also summed while it is in the processor's caches, for ``require_finite``.
        """
        if "logits" in self._totals or torch.compiler.is_compiling():
            return by_pieces(reduce, self.logits)
        totals: list[Tensor] = []

        def summed(logits: Tensor) -> Tensor:
            totals.append(logits.sum())
            return reduce(logits)

        values = by_pieces(summed, self.logits)
        self._totals["logits"] = sum(totals[1:], totals[0])
        return values

    @once
    def confidence(self, temperature: float = 1.0) -> Tensor:
        """The largest probability, float64 ``[B]``; it does not saturate, since near 1 it is 1 minus all others."""
        confidence = 1 / (1 + self.reduced(lambda logits: others_of(odds_of(logits, temperature))))
        uniform = confidence < NEARLY_UNIFORM / self.logits.shape[1]
        return self.refined(confidence, uniform, lambda logits: logits.softmax(dim=1).amax(dim=1), temperature)

    @once
    def logsumexp(self, temperature: float = 1.0) -> Tensor:
        """``logsumexp(logits / temperature)``, float64 ``[B]``.

        The difference to the largest logit is computed in the precision of the logits.
        """

        def parts(logits: Tensor) -> Tensor:
            largest = logits.amax(dim=1, keepdim=True)
            return torch.stack([largest[:, 0], exp_(logits - largest, temperature).sum(dim=1)])

        largest, total = self.reduced(parts).double()
        sums = total.log().add_(_divided(largest, temperature))
        uniform = total > self.logits.shape[1] / NEARLY_UNIFORM
        return self.refined(sums, uniform, lambda logits: logits.logsumexp(dim=1), temperature)

    @once
    def entropy(self) -> Tensor:
        """The entropy of the softmax in nats, float64 ``[B]``."""
        entropies = self.reduced(entropy)
        extreme = (entropies < CERTAIN) | (entropies > math.log(self.logits.shape[1] / NEARLY_UNIFORM))
        return self.refined(entropies, extreme, entropy)

    @once
    def prediction(self) -> Tensor:
        """The predicted class, int64 ``[B]``."""
        return self.logits.argmax(dim=1)

    @once
    def feature_norm(self, p: float = 2.0) -> Tensor:
        """``||features||_p`` for p in (0, inf], float64 ``[B]``."""
        return row_norm(self.features, p)

    @once
    def feature_sums(self) -> Tensor:
        """The sum of each feature over the rows, float64 ``[D]``."""
        return column_sums(self.features)

    @once
    def unit_features(self) -> Tensor:
        """``features / ||features||_2`` in the precision of the features; a row of zeros stays zero."""
        norm = self.feature_norm().clamp_min(torch.finfo(torch.float32).tiny)
        return self.features / norm[:, None].to(self.features)

    @once
    def space(self, name: str, normalize: bool = False) -> Tensor:
        """The ``features``, ``logits``, or an extra as float64 ``[B, K]``, L2-normalized if ``normalize``.

        A row of zeros stays zero.
        """
        if name == "logits":
            values = self.logits64()
        else:
            values = (self.features if name == "features" else self.extras[name]).double()
        return values / row_norm(values, 2.0).clamp_min(1e-12)[:, None] if normalize else values


def _divided(values: Tensor, temperature: float) -> Tensor:
    return values if temperature == 1.0 else values / temperature


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _present(value: R | None, name: str) -> R:
    if value is None:
        raise AttributeError(f"this block has no {name}: list it in the needs of the scorer.")
    return value


def _let_malloc_keep_what_is_freed() -> None:
    """Make glibc keep large freed arrays instead of returning them to the system, which costs more than most scores.

    It keeps arrays up to the size of the largest one that was freed so far, at most 32 MiB; so one is freed once.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


_let_malloc_keep_what_is_freed()
