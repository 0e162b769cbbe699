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
    _widths: dict[str, tuple[int, int] | str] = field(default_factory=dict)

    def costly(self, unit: Unit, scorers: Mapping[str, ScorerTable]) -> list[str]:
        """Return the scorers of a unit that will take more than a minute or keep more than 1 GB, see ``work.costly``.

        Returns:
            Nothing if the sizes are not known yet, see ``unknown``.
        """
        sizes = self._sizes(unit)
        return (
            [] if isinstance(sizes, str) else costly({name: table.create() for name, table in scorers.items()}, sizes)
        )

    def unknown(self, unit: Unit) -> str | None:
        """Return why the costs of a unit are not known before the extraction, as a clause; None if they are."""
        sizes = self._sizes(unit)
        return sizes if isinstance(sizes, str) else None

    def _sizes(self, unit: Unit) -> Sizes | str:
        """Return the sizes of the sets of a unit, those of the first member of an ensemble, or why they are unknown."""
        fits, scored = unit.fit[:1], [jobs[0] for jobs in unit.sets.values()]
        rows = {job.set: self._rows(job) for job in (*fits, *scored)}
        if lacking := [repr(name) for name, count in rows.items() if count is None]:
            return f"the number of rows of {', '.join(lacking)} is known only then"
        fit_rows, scored_rows = (sum(rows[job.set] or 0 for job in jobs) for jobs in (fits, scored))
        found = next(_extracted([*fits, *scored]), None)
        if found is not None:
            return replace(sizes_of(None, [found]), fit_rows=fit_rows, rows=scored_rows)
        widths = self._widths_of(scored[0].network)
        return widths if isinstance(widths, str) else Sizes(fit_rows, scored_rows, *widths)

    def _rows(self, job: Job) -> int | None:
        feats = job.features()
        return len(feats) if feats is not None else self.facts[job.source].rows

    def _widths_of(self, network: Network) -> tuple[int, int] | str:
        if network.key not in self._widths:
            self._widths[network.key] = network.widths()
        return self._widths[network.key]


def _extracted(jobs: list[Job]) -> Iterator[FeatureSet]:
    for job in jobs:
        if (feats := job.features()) is not None:
            yield feats
