"""The parts of the documentation that are generated from the classes."""

from __future__ import annotations

import doctest
import importlib
import runpy
import sys
from pathlib import Path

import pytest

from ood_scores.scorers import list_scorers
from ood_scores.scorers.registry import scorer_class

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
SCRIPT = runpy.run_path(str(ROOT / "docs" / "generate.py"))
scorer_pages = importlib.import_module("scorer_pages")
NAMES = [name for name in list_scorers() if scorer_class(name).__module__.startswith("ood_scores.scorers.")]
ZERO_SHOT = ("csp", "gl_mcm", "neglabel")
"""Scorers of vision-language models, whose weights an example would have to download."""


@pytest.mark.parametrize("page", SCRIPT["PARTS"])
def test_pages_are_up_to_date(page: str) -> None:
    assert (ROOT / page).read_text() == SCRIPT["generated"](page), "run python docs/generate.py"


@pytest.mark.filterwarnings("ignore")  # the network of the examples is not trained
@pytest.mark.parametrize("name", NAMES)
def test_page_of_a_scorer_is_complete_and_its_example_runs(name: str) -> None:
    cls = scorer_class(name)
    text = scorer_pages.page(cls)
    assert f"](scorers/{name}.md)" in (ROOT / "docs" / "scorers.md").read_text()
    assert cls.tags.formula is not None, f"give the tags of {cls.__name__} the formula in LaTeX"
    assert cls.tags.formula.startswith("s(x) = ")
    assert cls.tags.formula.count("{") == cls.tags.formula.count("}")
    assert cls.tags.paper is not None
    assert all(part in text for part in (f"$$\n{cls.tags.formula}\n$$", "| Scoring reads |", cls.tags.paper.bibtex()))
    assert f".. autoclass:: {cls.__module__}.{cls.__qualname__}\n" in text
    example = text.partition("```pycon\n")[2].partition("```")[0]
    if name not in ZERO_SHOT:
        test = doctest.DocTestParser().get_doctest(example, {}, name, None, 0)
        assert doctest.DocTestRunner().run(test) == doctest.TestResults(0, len(test.examples))
        assert len(test.examples) >= 6


def test_pages_have_the_rows_of_the_tables_of_real_images() -> None:
    tables = {(dataset, model): rows for dataset, model, _, rows in scorer_pages.result_tables()}
    rows = [row for each in tables.values() for row in each]
    (energy,) = (row for row in tables["CIFAR-10", "ResNet-20"] if row.startswith("| `energy` |"))
    assert "91.0\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}45.2" in energy
    text = scorer_pages.page(scorer_class("energy"))
    assert text.count("place ") == sum(row.startswith("| `energy` |") for row in rows)
    assert f"{energy}\n" in text


def test_a_page_without_the_markers_of_a_part_is_named() -> None:
    SCRIPT["PARTS"]["README.md"]["nowhere"] = str
    try:
        with pytest.raises(ValueError, match=r"README\.md has no part 'nowhere'"):
            SCRIPT["generated"]("README.md")
    finally:
        del SCRIPT["PARTS"]["README.md"]["nowhere"]
