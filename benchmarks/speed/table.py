"""The table of results by group, in ``results.json`` and, for readers, in ``README.md``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import Figure, Line
from ood_scores.atomic import replace_text

Record = Mapping[str, Any]
"""A line or figure of ``results.json``, with its group and the machine."""

INTRODUCTION = """# Speed, as ratios

Written by `python -m benchmarks.speed`: medians of paired, alternating runs. Ratios carry over to other machines better
than seconds. `python -m benchmarks.speed knn metrics` measures two groups again and keeps the other lines.
[scorers.md](scorers.md) has the cost of each scorer, compared with pytorch-ood.
`python -m benchmarks.speed gpu --all --out FOLDER` runs the tests that need a GPU, measures the lines of the group
`gpu`, and profiles an extraction, in under nine minutes.
"""


def update(
    folder: Path, group: str, found: Iterable[Line | Figure], measured_on: str, groups: Sequence[str]
) -> list[Record]:
    """Replace the records of a group in the files of a folder, if there are new ones, and return the new records."""
    path = folder / "results.json"
    known: list[Record] = json.loads(path.read_text()) if path.exists() else []
    new: list[Record] = [{"group": group, "measured_on": measured_on} | _fields(each) for each in found]
    kept = [record for record in known if record["group"] != group or not new]
    records = sorted([*kept, *new], key=lambda record: groups.index(record["group"]))
    replace_text(path, json.dumps(records, indent=2) + "\n")  # in one step: a kill leaves the earlier lines
    replace_text(folder / "README.md", markdown(records))
    return new


def _fields(found: Line | Figure) -> dict[str, Any]:
    ratio = {"ratio": found.ratio} if isinstance(found, Line) else {}
    return asdict(found) | ratio | {"met": found.met}


def markdown(records: Sequence[Record]) -> str:
    """Write one table of ratios and one of other figures for each machine."""
    parts = [INTRODUCTION]
    for machine, here in groupby(sorted(records, key=_measured_on), key=_measured_on):
        ours = list(here)
        parts.append(f"Measured on {machine}.\n")
        lines, figures = ([record for record in ours if ("ratio" in record) is wanted] for wanted in (True, False))
        if lines:
            parts.append(_table(("what", "baseline", "ours", "baseline's time", "ratio", "asked"), map(_line, lines)))
        if figures:
            parts.append(_table(("what", "how", "measured", "asked"), map(_figure, figures)))
    return "\n".join(parts)


def _measured_on(record: Record) -> str:
    return str(record["measured_on"])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)) + "\n"


def _line(record: Record) -> Sequence[str]:
    times = (f"{record[whose]:.4g} s" for whose in ("ours_s", "baseline_s"))
    return record["name"], record["baseline"], *times, ratio(record), _asked(record)


def _figure(record: Record) -> Sequence[str]:
    return record["name"], record["how"], f"{record['value']:,.4g} {record['unit']}".strip(), _asked(record)


def ratio(record: Record) -> str:
    """Describe the ratio of a line in words."""
    found: float = record["ratio"]
    if record["better"] == "lower":
        return f"{found:.2f} times the baseline's time"
    return f"{found:.2f} of the baseline's speed" if found < 2 else f"{found:,.1f} times the baseline's speed"


def _asked(record: Record) -> str:
    if record["met"] is None:
        return ""
    return f"{_bounds(record)}: {'met' if record['met'] else '**missed**'}"


def _bounds(record: Record) -> str:
    if "ratio" in record:
        return f"{'at least' if record['better'] == 'higher' else 'at most'} {record['asked']:,g}"
    least, most = record["least"], record["most"]
    if least is not None and most is not None:
        return f"{least:g} to {most:g}"
    return f"at most {most:,g}" if least is None else f"at least {least:,g}"


def in_words(record: Record) -> str:
    """Describe a record in one line."""
    return " / ".join(cell for cell in (_line(record) if "ratio" in record else _figure(record)) if cell)
