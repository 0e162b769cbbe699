"""The report's tables in LaTeX: a booktabs table for each model of each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from ood_scores.benchmark.report.tables import Cell, ScoreTable, compact_metrics, titles
from ood_scores.benchmark.results import Results

HEAD = r"""% \usepackage[T1]{fontenc}
% \usepackage{booktabs,graphicx}
% Bold: best of the column. Dagger: AUROC not significantly below the best (DeLong's paired tests, Holm, 5%)."""

CAPTION = (
    r"{in_cells}, in percent, on {n_id} ID images; on the right: {on_the_right}. "
    r"ID accuracy {accuracy}\,\%.{seeds} Bold: best. $\dagger$: AUROC not significantly below the best (DeLong's "
    r"paired tests with Holm's correction, 5\,\%).{experimental}"
)

EXPERIMENTAL = r" $^*$: experimental, the scores may not be those of the paper."

ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    '"': r"\textquotedbl{}",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "–": "--",
    "ε": r"$\varepsilon$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "λ": r"$\lambda$",
    "τ": r"$\tau$",
    "∞": r"$\infty$",
}


def tables(results: Results, parts: Mapping[str, Sequence[ScoreTable]]) -> str:
    """Render all tables as one file."""
    made = ["\n".join(_lines(results, table)) for of in parts.values() for table in of]
    return "\n\n".join([HEAD, *made]) + "\n"


def _lines(results: Results, table: ScoreTable) -> Iterator[str]:
    seeds = rf" Mean $\pm$ standard deviation of {table.checkpoints} checkpoints." if table.checkpoints > 1 else ""
    in_cells, on_the_right = compact_metrics(results)
    caption = CAPTION.format(
        in_cells=titles(in_cells, r"\,/\,"),
        on_the_right=titles(on_the_right, ", "),
        n_id=f"{table.n_id:,}",
        accuracy=_number(table.accuracy),
        seeds=seeds,
        experimental=EXPERIMENTAL if any(row.experimental for row in table.rows) else "",
    )
    yield r"\begin{table}"
    yield r"\centering"
    yield rf"\caption{{{escape(table.part)}: {escape(table.model)}. {caption}}}"
    yield r"\resizebox{\linewidth}{!}{%"
    yield rf"\begin{{tabular}}{{l{'c' * (len(table.columns) + len(on_the_right))}}}"
    yield r"\toprule"
    yield from _groups(table, len(on_the_right))
    names = [escape(column.name) for column in table.columns]
    heads = ["Scorer", *names, *(f"{names[0]}, {escape(metric.title)}" for metric in on_the_right)]
    yield f"{' & '.join(heads)} \\\\"
    yield r"\midrule"
    for row in table.rows:
        of_columns = [r"\,/\,".join(_marked(row.cells[m.name][i]) for m in in_cells) for i in range(len(names))]
        scorer = escape(row.scorer) + (r"$^*$" if row.experimental else "")
        cells = [scorer, *of_columns, *(_marked(row.cells[metric.name][0]) for metric in on_the_right)]
        yield f"{' & '.join(cells)} \\\\"
    yield r"\bottomrule"
    yield r"\end{tabular}}"
    yield r"\end{table}"


def _groups(table: ScoreTable, on_the_right: int) -> Iterator[str]:
    """Yield the line above the names that marks near and far sets."""
    heads, rules, first = [], [], 2
    for group, run in groupby(column.group for column in table.columns):
        count = len(list(run))
        heads.append(rf"\multicolumn{{{count}}}{{c}}{{{group}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
        first += count
    yield f" & {' & '.join(heads)} {'& ' * on_the_right}\\\\"
    yield " ".join(rules)


def _marked(cell: Cell) -> str:
    dagger = r"$^\dagger$" if cell.tied and not cell.best else ""
    return (rf"\textbf{{{_number(cell)}}}" if cell.best else _number(cell)) + dagger


def _number(cell: Cell) -> str:
    return escape(str(cell))


def escape(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)
