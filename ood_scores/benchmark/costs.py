"""What the scorers of a benchmark are expected to cost, as far as it is known before the extraction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ood_scores.benchmark.networks import Network
from ood_scores.benchmark.planning import Job, SetFacts, Unit
from ood_scores.benchmark.spec import ScorerTable
from ood_scores.features import FeatureSet
from ood_scores.scorers.work import Sizes, costly, sizes_of


@dataclass(frozen=True)
class Estimates:
    """Estimates from the caches that exist, and else from the numbers of rows and the architectures of the networks.

    Attributes:
        facts: facts about the datasets, by source, see ``Plan``.
    """

    facts: Mapping[str, SetFacts]
    _widths: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def costly(self, unit: Unit, scorers: Mapping[str, ScorerTable]) -> list[str]:
        """Return the scorers of a unit that will take more than a minute or keep more than 1 GB, see ``work.costly``.

        Returns:
            Nothing if the sizes are not known yet.
        """
        sizes = self._sizes(unit)
        return [] if sizes is None else costly({label: table.create() for label, table in scorers.items()}, sizes)

    def _sizes(self, unit: Unit) -> Sizes | None:
        """Return the sizes of the sets of a unit, those of the first member of an ensemble; None if unknown."""
        fits, scored = unit.fit[:1], [jobs[0] for jobs in unit.sets.values()]
        fit_rows, rows = (sum(map(self._rows, jobs)) for jobs in (fits, scored))
        found = next(_extracted([*fits, *scored]), None)
        if found is not None:
            return replace(sizes_of(None, [found]), fit_rows=fit_rows, rows=rows)
        widths = self._widths_of(scored[0].network)
        return None if widths is None else Sizes(fit_rows, rows, *widths)

    def _rows(self, job: Job) -> int:
        feats = job.features()
        return len(feats) if feats is not None else self.facts[job.source].rows or 0

    def _widths_of(self, network: Network) -> tuple[int, int] | None:
        if network.key not in self._widths:
            self._widths[network.key] = network.widths()
        return self._widths[network.key]


def _extracted(jobs: list[Job]) -> Iterator[FeatureSet]:
    for job in jobs:
        if (feats := job.features()) is not None:
            yield feats
