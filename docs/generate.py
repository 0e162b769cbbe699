"""Write the parts of the documentation that the code determines: run ``python docs/generate.py``.

A generated part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. Edit the code, not the part.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from public_api import public_api
from scorer_pages import packaged, result_tables

import ood_scores.data.kinds  # noqa: F401  registers every kind
from ood_scores.data.catalog import CATALOG
from ood_scores.data.kinds.base import DATASET_KINDS
from ood_scores.detector.graph import exportable
from ood_scores.extraction.probes import PROBES, LayerProbe, Probe
from ood_scores.scorers import Scorer, list_scorers
from ood_scores.scorers.base import IN_A_GRAPH
from ood_scores.scorers.families import family_of
from ood_scores.scorers.registry import scorer_class

ROOT = Path(__file__).parents[1]


IN_THE_README = (
    *("msp", "max_logit", "energy", "gen", "gradnorm", "feature_norm", "react", "ash_s", "scale", "vim"),
    *("knn", "mahalanobis", "mahalanobis_pp", "fdbd", "cadref"),
)
"""Scorers in the table of the README: the usual baselines, and some that are often good."""

TABLES_IN_THE_README = (("CIFAR-10", "ResNet-20"), ("CIFAR-10", "DenseNet-100"), ("CIFAR-100", "DenseNet-100"))


def readme_table() -> str:
    """Overall AUROC and FPR95, and the place among all scorers, of some scorers on three checkpoints."""
    cells: dict[str, list[str]] = {name: [] for name in IN_THE_README}
    heads = ["score"]
    for dataset, model, _, rows in result_tables():
        if (dataset, model) in TABLES_IN_THE_README:
            heads.append(f"{dataset}, {model}")
            for place, row in enumerate(rows, 1):
                name, overall = name_in(row), row.split("|")[2].strip()
                if name in cells:
                    cells[name].append(f"{overall.replace('*', '').replace('†', '')} ({place})")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(lines + [f"| `{name}` | {' | '.join(found)} |" for name, found in cells.items()])


def choosing_table() -> str:
    """All scorers by their mean AUROC over three checkpoints, with that of near and far OoD and the lowest of three."""
    found: dict[str, list[list[float]]] = {}
    for dataset, model, _, rows in result_tables():
        if (dataset, model) in TABLES_IN_THE_README:
            for row in rows:
                overall, far, near = row.split("|")[2:5]
                aurocs = [float(re.findall(r"[0-9.]+", cell)[0]) for cell in (overall, near, far)]
                found.setdefault(name_in(row), []).append(aurocs)
    columns = {name: [sum(values) / len(values) for values in zip(*each, strict=True)] for name, each in found.items()}
    lines = ["| Scorer | Needs beyond logits | Mean | Near | Far | Lowest of three |", "|---|---|---|---|---|---|"]
    for name, means in sorted(columns.items(), key=lambda item: -item[1][0]):
        lowest = min(each[0] for each in found[name])
        shown = " | ".join(f"{value:.1f}" for value in [*means, lowest])
        lines.append(f"| [`{name}`](scorers/{name}.md) | {beyond_logits(name)} | {shown} |")
    return "\n".join(lines)


def name_in(row: str) -> str:
    """The name of the scorer in the row of a table of results, which may be marked as experimental."""
    return row.split("`")[1]


def beyond_logits(name: str) -> str:
    """What a scorer needs beyond logits: columns, extras, and a fit set."""
    scorer = scorer_class(name)()
    reads = [each for each in dict.fromkeys(scorer.needs) if each != "logits"]
    fit = ["labeled fit set" if "labels" in scorer.fit_needs else "fit set"] if scorer.fit_needs else []
    return ", ".join([*reads, *fit])


def scorer_tables() -> str:
    """A section for each family with a table of its scorers."""
    sections = []
    for title, group in packaged().items():
        description = family_of(group[0])[1]
        rows = "\n".join(scorer_row(cls) for cls in group)
        heads = "| Scorer | Computes | Fit | Reads more than the last layer |\n|---|---|---|---|"
        sections.append(f"### {title}\n\n{description[:1].upper()}{description[1:]}.\n\n{heads}\n{rows}")
    return "\n\n".join(sections)


def scorer_row(cls: type[Scorer]) -> str:
    """A row of the table of a family."""
    scorer = cls()
    marked = f"[`{cls.name}`](scorers/{cls.name}.md){' (experimental)' if cls.tags.experimental else ''}"
    extras = ", ".join(f"`{name}`" for name in dict.fromkeys(scorer.needs) if name not in IN_A_GRAPH)
    return f"| {marked} | {summary(cls)} | {'ID data' if scorer.fit_needs else ''} | {extras} |"


def other_names() -> str:
    """The names of scorers in other packages."""
    known = {alias: cls.name for group in packaged().values() for cls in group for alias in cls.tags.aliases}
    rows = ["| Elsewhere | Here |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{alias}` | `{known[alias]}` |" for alias in sorted(known))])


def exportable_names() -> str:
    """The scorers that can be exported."""
    return wrapped(f"{', '.join(f'`{name}`' for name in exportable())}.")


def not_exportable() -> str:
    """Why the others cannot be exported, unless they read what the forward pass does not produce."""
    rows = ["| Scorer | Reason |", "|---|---|"]
    classes = [scorer_class(name) for name in list_scorers()]
    known = [cls for cls in classes if cls.tags.no_graph and cls.__module__.startswith("ood_scores.")]
    return "\n".join([*rows, *(f"| `{cls.name}` | {cls.tags.no_graph} |" for cls in known)])


def dataset_kinds() -> str:
    """The kinds of datasets, from the first lines of the functions that open them."""
    rows = ["| Kind | Options | Contents |", "|---|---|---|"]
    for name in sorted(DATASET_KINDS):
        kind = DATASET_KINDS[name]
        summary = (inspect.getdoc(kind.open) or "").partition("\n")[0]
        example, _, contents = summary.removeprefix("Open ").partition(": ")
        options = ", ".join(f"`{option}`" for option in kind.options)
        rows.append(f"| {example} | {options} | {contents.rstrip('.')} |".replace("``", "`"))
    return "\n".join(rows)


def kind_reference() -> str:
    """The docstrings of the functions that open each kind of dataset."""
    kinds = [DATASET_KINDS[name].open for name in sorted(DATASET_KINDS)]
    functions = "\n".join(f".. autofunction:: {open.__module__}.{open.__qualname__}" for open in kinds)
    return f"```{{eval-rst}}\n{functions}\n```"


def known_datasets() -> str:
    """The datasets of the catalog."""
    rows = ["| Dataset | Description | Images | License | Download | MD5 | Opens with |", "|---" * 7 + "|"]
    for known in CATALOG:
        images = f"{known.images:,}" if known.images else ""
        description = f"{known.what} ([page]({known.page}))"
        facts = (f"`{known.name}`", description, images, known.license, known.size, known.checksums, f"`{known.spec}`")
        rows.append(f"| {' | '.join(facts)} |")
    return "\n".join(rows)


def probe_table() -> str:
    """What each probe stores, and the passes through the model that it needs."""
    rows = ["| Probe | Extras | Additional passes |", "|---|---|---|"]
    for cls in packaged_probes():
        in_the_pass = cls.watch is not Probe.watch and not issubclass(cls, LayerProbe)
        read_off = in_the_pass or cls.columns is LayerProbe.columns
        passes = "none" if read_off else "forward and backward" if cls.gradients else "forward"
        rows.append(f"| `{cls.name}` | {summary(cls)} | {passes} |")
    return "\n".join(rows)


def probe_reference() -> str:
    """The docstrings of all probes."""
    classes = "\n".join(f".. autoclass:: {cls.__module__}.{cls.__qualname__}" for cls in packaged_probes())
    return f"```{{eval-rst}}\n{classes}\n```"


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": readme_table},
    "docs/choosing.md": {"ranking": choosing_table},
    "docs/scorers.md": {"aliases": other_names, "scorers": scorer_tables},
    "docs/datasets.md": {"kinds": dataset_kinds, "catalog": known_datasets, "reference": kind_reference},
    "docs/probes.md": {"probes": probe_table, "probe-reference": probe_reference},
    "docs/deploy.md": {"exportable": exportable_names, "not-exportable": not_exportable},
}


def packaged_probes() -> list[type[Probe]]:
    """The probes of the package itself by name, without those that are registered elsewhere."""
    return [cls for _, cls in sorted(PROBES.items()) if cls.__module__.startswith("ood_scores.extraction.probes.")]


def summary(cls: type) -> str:
    """The first paragraph of a docstring on one line, with code between single backticks."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].replace("``", "`").split())


def wrapped(text: str, width: int = 120) -> str:
    """The text on lines of at most ``width`` characters."""
    lines = [""]
    for word in text.split():
        lines = [*lines, word] if len(lines[-1]) + len(word) >= width else [*lines[:-1], f"{lines[-1]} {word}".strip()]
    return "\n".join(lines)


def generated(page: str) -> str:
    """The text of a page with its generated parts as they should be."""
    text = (ROOT / page).read_text()
    for name, write in PARTS[page].items():
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        if not closing:
            raise ValueError(
                f"{page} has no part {name!r}: put <!-- {name} --> and <!-- /{name} --> on lines of their own"
            )
        text = f"{before}{opening}{write()}\n{closing}{after}"
    return text


if __name__ == "__main__":
    for page in PARTS:
        (ROOT / page).write_text(generated(page))
    (ROOT / "docs" / "public_api.txt").write_text(public_api())
