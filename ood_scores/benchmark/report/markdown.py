"""The report as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ood_scores.benchmark.measures import shown_as
from ood_scores.benchmark.report.comparison import Compared, ComparisonTable, comparison_tables
from ood_scores.benchmark.report.tables import (
    Cell,
    ScoreTable,
    compact_metrics,
    measure_table,
    not_run,
    notes,
    titles,
    versions,
)
from ood_scores.benchmark.results import NotRun, Results
from ood_scores.evaluation.metrics import NONE

LEGEND = """Percent. Each cell is {in_cells}; on the right: {on_the_right} of the first column. Overall, near
and far are unweighted means over datasets. The best of a column is bold; † marks an AUROC that is not significantly
below the best (DeLong's paired tests with Holm's correction, 5%). Intervals (95%, DeLong) are those of the AUROC of the
first column, or of all columns if there are no more than three. ± is the standard deviation over checkpoints. Scores of
a scorer marked as experimental may not be those of its paper: `ood-scores list NAME` tells why. All metrics, intervals
and hashes are in results.csv.
"""


MOST_INTERVALS = 3
"""The number of columns up to which a table shows the intervals of all."""


def report(results: Results, parts: Mapping[str, Sequence[ScoreTable]]) -> str:
    """Render the page."""
    return "\n".join(_lines(results, parts)) + "\n"


def _lines(results: Results, parts: Mapping[str, Sequence[ScoreTable]]) -> Iterator[str]:
    yield f"# {escape(results.title)}\n"
    in_cells, on_the_right = compact_metrics(results)
    yield LEGEND.format(in_cells=titles(in_cells, " / "), on_the_right=titles(on_the_right, ", "))
    yield from (f"- {metric.title}: {metric.legend}." for metric in results.headline)
    yield ""
    for part, tables in parts.items():
        if list(parts) != [results.title]:
            yield f"## {escape(part)}\n"
        if notes(results, part):
            yield f"{notes(results, part)}\n"
        if warned(results, part):
            yield f"{warned(results, part)}\n"
        for table in tables:
            yield from _scores(results, table)
        for comparison in comparison_tables(results, part):
            yield from _comparison(comparison)
        yield from _measures(results, part)
        yield from _not_run(not_run(results, part))
    yield from _provenance(results)


def warned(results: Results, part: str) -> str:
    """Return the warnings of a part as a list in Markdown."""
    of_part = results.warnings[results.warnings["part"] == part][["model", "warning"]].drop_duplicates()
    return "\n".join(
        f"- **Warning**, {escape(model)}: {escape(text)}" for model, text in of_part.itertuples(index=False)
    )


def _scores(results: Results, table: ScoreTable) -> Iterator[str]:
    seeds = f" Mean ± standard deviation of {table.checkpoints} checkpoints." if table.checkpoints > 1 else ""
    yield f"### {escape(table.model)}\n"
    yield f"{table.known}.{seeds}\n"
    in_cells, on_the_right = compact_metrics(results)
    names = [escape(column.name) for column in table.columns]
    with_interval = _with_interval(table)
    intervals = [f"{names[i]}, AUROC 95%" for i in with_interval]
    heads = ["scorer", *names, *intervals, *(f"{names[0]}, {metric.title}" for metric in on_the_right)]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in table.rows:
        of_columns = ["\u00a0/\u00a0".join(_marked(row.cells[m.name][i]) for m in in_cells) for i in range(len(names))]
        scorer = f"{_code(row.scorer)}{' (experimental)' if row.experimental else ''}"
        intervals = [row.cells["auroc"][i].interval for i in with_interval]
        cells = [scorer, *of_columns, *intervals, *(_marked(row.cells[metric.name][0]) for metric in on_the_right)]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _with_interval(table: ScoreTable) -> range:
    """Return the columns whose AUROC is shown with its interval."""
    if table.checkpoints > 1:
        return range(0)
    return range(len(table.columns) if len(table.columns) <= MOST_INTERVALS else 1)


def _marked(cell: Cell) -> str:
    return (f"**{cell}**" if cell.best else str(cell)) + ("†" if cell.tied and not cell.best else "")


def _comparison(table: ComparisonTable) -> Iterator[str]:
    yield f"### Compared with {escape(table.source)}\n"
    yield "Ours / published / difference, in percent except for neural collapse (NC).\n"
    heads = [escape(column or "model") for column in table.columns]
    yield f"| model | scorer | metric | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 3) + "|"
    for row in table.rows:
        names = " | ".join(map(escape, (row.model, row.scorer, row.metric)))
        yield f"| {names} | {' | '.join(map(_compared, row.cells))} |"
    yield ""


def _compared(cell: Compared | None) -> str:
    if cell is None:
        return ""
    ours = f"{cell.ours} ± {cell.sd}" if cell.sd else cell.ours
    return " / ".join(filter(None, (ours, cell.published, cell.difference)))


def _measures(results: Results, part: str) -> Iterator[str]:
    models, rows = measure_table(results, part)
    if not rows:
        return
    yield "### Measures of the models\n"
    yield "Measures of neural collapse (NC) are 0 if collapse is complete.\n"
    yield f"| measure | {' | '.join(map(escape, models))} |"
    yield "|---" * (len(models) + 1) + "|"
    for measure, cells in rows.items():
        yield f"| {escape(shown_as(measure).title)} | {' | '.join(map(str, cells))} |"
    yield ""


def _not_run(missing: list[NotRun]) -> Iterator[str]:
    if missing:
        yield "### Not run\n"
        for each in missing:
            remedy = f" To get it: {_code(each.remedy)}" if each.remedy else ""
            yield f"- **{escape(each.what)}**: {escape(each.reason)}.{remedy}"
        yield ""


def _provenance(results: Results) -> Iterator[str]:
    made = results.environment
    yield "## Provenance\n"
    yield f"- {made.get('created', NONE)}, on {made.get('device', NONE)}: {versions(results)}"
    weights = results.table[["model", "checkpoint", "weights_sha256"]].drop_duplicates()
    for model, checkpoint, sha in weights.itertuples(index=False):
        yield f"- {escape(model)}, checkpoint {checkpoint}: SHA-256 `{sha}`"


def escape(text: str) -> str:
    """Escape text for a table cell or a heading."""
    for letter in "\\`*_|<>[]":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())


def _code(text: str) -> str:
    """Return a code span for a table cell."""
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")
