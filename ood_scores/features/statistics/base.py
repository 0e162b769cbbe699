"""The protocols of statistics and their accumulators, and the results by statistic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Accumulator(Protocol[T_co]):
    """The computation of a statistic from one block after the other."""

    def update(self, block: Block) -> None: ...

    def result(self) -> T_co: ...


class Statistic(Protocol[T_co]):
    """A statistic of a feature set that a fit can request, usually a small frozen dataclass.

    It is hashable, and equal statistics share one result.
    """

    @property
    def reads(self) -> Sequence[str]:
        """The columns that the accumulator reads."""

    def start(self, feats: FeatureSet) -> Accumulator[T_co]:
        """Create an accumulator for the blocks of a set."""


@runtime_checkable
class Derivable(Statistic[T_co], Protocol[T_co]):
    """A statistic that follows from another statistic of some sets."""

    def source(self, feats: FeatureSet) -> Statistic[Any] | None:
        """Return the statistic that it follows from, or None if it is accumulated from the blocks of the set."""

    def derive(self, source: Any) -> T_co:
        """Compute the result from that of the source."""


@runtime_checkable
class Stored(Statistic[T_co], Protocol[T_co]):
    """A statistic whose result is stored beside the cache, since it is much smaller than the columns.

    ``stored_as`` is the type of the result: a tensor, or a dataclass of tensors.
    """

    stored_as: type


@runtime_checkable
class Costly(Statistic[T_co], Protocol[T_co]):
    """A statistic that costs much in a large and wide space, and is known by a name in messages."""

    space: str

    @property
    def title(self) -> str:
        """What messages call it; statistics of one title are computed once."""

    def operations(self, rows: int, width: int) -> float:
        """Return the operations for rows of a width, at the speed of a product of float32 matrices."""


class Found(dict[Statistic[Any], Any]):
    """The results by statistic, each of the type that its statistic computes."""

    def __getitem__(self, statistic: Statistic[T]) -> T:
        result: T = super().__getitem__(statistic)
        return result
