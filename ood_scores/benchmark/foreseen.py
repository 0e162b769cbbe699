"""Which scorers a unit will run, as far as can be told before the extraction."""

from __future__ import annotations

from collections.abc import Mapping

from ood_scores.benchmark.planning import Job, SetFacts, Unit
from ood_scores.scorers.requirements import Has, unmet


def foreseen(unit: Unit, facts: Mapping[str, SetFacts]) -> tuple[list[str], dict[str, list[str]]]:
    """Labels of the scorers that will run; and of the others, by reason."""
    fit = _has(unit.fit, facts) if unit.fit else None
    sets = [_has(jobs, facts) for jobs in unit.sets.values()]
    run: list[str] = []
    left_out: dict[str, list[str]] = {}
    for table in unit.part.scorer_tables:
        missing = unmet(table.create(), fit, sets)
        if missing is None:
            run.append(table.label)
        else:
            reason = f"{missing.reason}: {missing.how_to_get('benchmark')}"
            left_out.setdefault(reason, []).append(table.label)
    return run, left_out


def _has(jobs: tuple[Job, ...], facts: Mapping[str, SetFacts]) -> Has:
    """Whether a scorer will find what it needs in a set, or in the sets of an ensemble's members."""
    if len(jobs) > 1:
        labelled = _has(jobs[:1], facts)("labels")
        there = {"features", "logits", "head", "ensemble"} | ({"labels"} if labelled else set())
        return lambda name: name.partition(".")[0] in there
    (job,) = jobs
    feats = job.features()
    if feats is not None:
        return feats.has
    there = {"features", "logits", "head", *(text.partition(":")[0] for text in job.extraction.probes)}
    there |= {"labels"} if facts[job.source].labelled else set()
    there |= {"layers"} if job.extraction.layers is not None else set()
    return lambda name: name.partition(".")[0] in there
