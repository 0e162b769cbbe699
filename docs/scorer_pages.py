"""Pages of the scorers, one for each class, written from its tags, its docstring, and the tables of real images."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from ood_scores.extraction.probes import Probe
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.families import families, family_of
from ood_scores.scorers.requirements import Requirement, probes_for, requirements

DOCS = Path(__file__).parent
FOLDER = DOCS / "scorers"
RESULTS = {"": DOCS / "results.md", "ImageNet: ": DOCS / "imagenet.md"}
"""The pages of tables of real images, by what the names of their datasets start with."""
PLAIN = ("features", "logits", "head", "labels")
"""What every classifier with labeled data provides."""
FIT_CACHE = "train.h5"
"""The cache of the fit set, in examples of probes that read it."""
FILES = {"mahalanobis_odin": f"fit={FIT_CACHE}", "mixup": "proxy=noise:uniform?n=64&size=8"}
"""Parameters of probes that read a file or a dataset, by the name of the probe."""


def packaged() -> dict[str, list[type[Scorer]]]:
    """The families of the package itself, without scorers that are registered elsewhere."""
    found = {
        title: [cls for cls in group if cls.__module__.startswith("ood_scores.scorers.")]
        for title, group in families().items()
    }
    return {title: group for title, group in found.items() if group}


def write_pages() -> None:
    """Write the page of every scorer and remove those of scorers that no longer exist."""
    FOLDER.mkdir(exist_ok=True)
    pages = {f"{cls.name}.md": page(cls) for group in packaged().values() for cls in group}
    for path in FOLDER.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = FOLDER / name
        if not path.exists() or path.read_text() != text:  # an unchanged page is not built again
            path.write_text(text)


def page(cls: type[Scorer]) -> str:
    """The page of a scorer."""
    paper = cls.tags.paper
    parts = [
        f"# {cls.__name__}: `{cls.name}`",
        f"$$\n{cls.tags.formula}\n$$" if cls.tags.formula else "",
        f"Higher means more in-distribution. Symbols: see [notation](../scorers.md#notation).\n\n{facts(cls)}",
        f"## Example\n\n{example(cls)}",
        f"## On real images\n\n{rows_of(cls.name)}",
        f"## Reference\n\n```{{eval-rst}}\n.. autoclass:: {cls.__module__}.{cls.__qualname__}\n```",
        f"## Citation\n\n```bibtex\n{paper.bibtex()}\n```" if paper else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def facts(cls: type[Scorer]) -> str:
    """A table of what a scorer needs, and of its names and limits."""
    scorer, paper = cls(), cls.tags.paper
    title, _ = family_of(cls)
    found = {
        "Family": f"[{title}](../scorers.md#{re.sub('[^a-z0-9]+', '-', title.lower())})",
        "Scoring reads": names(requirements(scorer, fitting=False)),
        "Fitting reads": names(requirements(scorer, fitting=True)) if scorer.fit_needs else "nothing: it needs no fit",
        "In an exported graph": f"no: {why}" if (why := scorer.why_no_graph()) else "yes",
        "Elsewhere": ", ".join(f"`{alias}`" for alias in cls.tags.aliases),
        "Paper": f"[{paper.title}]({paper.url}) ({paper.venue} {paper.year})" if paper else "",
        "Code of the authors": f"[{paper.code.removeprefix('https://')}]({paper.code})" if paper and paper.code else "",
        "Experimental": cls.tags.experimental or "",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in found.items() if text)])


def names(needed: list[Requirement]) -> str:
    """Names of columns and extras, and how to get the extras."""
    listed = ", ".join(f"`{each.name}`" for each in needed)
    remedies = dict.fromkeys(each.how_to_get("python") for each in needed if each.name not in PLAIN)
    return "; ".join([listed, *remedies])


def example(cls: type[Scorer]) -> str:
    """A doctest that extracts what the scorer reads and computes scores."""
    scorer = cls()
    needed = {*scorer.needs, *scorer.fit_needs}
    if any(name.startswith(("negatives", "local_mcm")) for name in needed):
        return zero_shot_example(cls)
    averaged = any(name.startswith("ensemble") for name in needed)
    for_fit, options = ("" if averaged else extraction_options(names) for names in (scorer.fit_needs, scorer.needs))
    lines = [
        "import ood_scores",
        "from torch import arange, nn, rand",
        "blocks = [nn.Sequential(nn.Conv2d(n, 16, 3, 2, 1), nn.ReLU(), nn.Dropout(0.1)) for n in (3, 16)]",
        "pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())",
        "model = nn.Sequential(*blocks, pool, nn.Linear(16, 4)).eval()  # your classifier",
        "images, labels = rand(160, 3, 8, 8), arange(160) % 4  # your data",
    ]
    if "mixup" in needed:
        lines.append("from torchvision.transforms import ToTensor")
        lines.append("model.transform = ToTensor()  # your preprocessing of images")
    if scorer.fit_needs:
        cache = f', "{FIT_CACHE}"' if FIT_CACHE in options else ""
        lines.append(f"train = ood_scores.extract(model, [(images[20:], labels[20:])]{cache}{for_fit}, progress=False)")
    lines.append(f"test = ood_scores.extract(model, [(images[:20], labels[:20])]{options}, progress=False)")
    if averaged:
        lines.append("again = nn.Sequential(*blocks, pool, nn.Linear(16, 4)).eval()  # another of your classifiers")
        lines.append("other = ood_scores.extract(again, [(images[:20], labels[:20])], progress=False)")
    fit = ", fit=train" if scorer.fit_needs else ""
    lines.append(f'ood_scores.score("{cls.name}", {"[test, other]" if averaged else "test"}{fit}).shape')
    doctest = "\n".join(f">>> {line}" for line in lines)
    return f"```pycon\n{doctest}\ntorch.Size([20])\n```"


def extraction_options(needs: Iterable[str]) -> str:
    """The options of ``extract`` for what a scorer reads; "" for none."""
    found = probes_for(needs)
    texts = ", ".join(probe_text(probe) for probe in found if probe.name != "layers")
    layers = ', layers="stages"' if any(probe.name == "layers" for probe in found) else ""
    return layers + (f", probes=[{texts}]" if texts else "")


def probe_text(probe: Probe) -> str:
    """A probe as ``extract`` takes it: its name, and the parameters that are not the defaults."""
    default = type(probe)()
    changed = {each.name: getattr(probe, each.name) for each in fields(probe) if each.name != "name"}
    options = [f"{name}={str(value).lower()}" for name, value in changed.items() if value != getattr(default, name)]
    options += [FILES[probe.name]] if probe.reads_a_file else []
    return f'"{probe.name}{":" if options else ""}{",".join(options)}"'


def zero_shot_example(cls: type[Scorer]) -> str:
    """Code for a scorer that reads a vision-language model, whose weights are not at hand."""
    return f"`ood_scores.score('{cls.name}', feats)` of features extracted as described in [](../zero_shot.md)."


def rows_of(name: str) -> str:
    """The rows of a scorer in the tables of real images, each under the name of its dataset and model."""
    tables = []
    for dataset, model, header, rows in result_tables():
        places = [number for number, row in enumerate(rows, 1) if row.startswith(f"| `{name}` ")]
        if places:
            title = f"**{dataset}, {model}**: place {places[0]} of {len(rows)} by the overall AUROC"
            tables.append("\n".join([title, "", header, re.sub(r"[^|]+", "---", header), rows[places[0] - 1]]))
    if not tables:
        return "This score is not in the tables of real images, [](../results.md) and [](../imagenet.md)."
    heading = "Cells are AUROC / FPR95 with ID positive, in percent: see [](../results.md) and [](../imagenet.md)."
    return "\n\n".join([heading, *tables])


def result_tables() -> list[tuple[str, str, str, list[str]]]:
    """Dataset, model, header, and rows of each table of scorers, best scorers first."""
    return [table for start, page in RESULTS.items() for table in tables_of(page.read_text(), start)]


def tables_of(page: str, start: str) -> list[tuple[str, str, str, list[str]]]:
    """The tables of one page."""
    found: list[tuple[str, str, str, list[str]]] = []
    dataset = model = ""
    for line in page.splitlines():
        if line.startswith("## "):
            dataset = start + line.removeprefix("## ")
        elif line.startswith("### "):
            model = line.removeprefix("### ")
        elif line.startswith("| scorer | overall"):
            found.append((dataset, model, line, []))
        elif line.startswith("| `") and found and found[-1][:2] == (dataset, model):
            found[-1][3].append(line)
    return found
