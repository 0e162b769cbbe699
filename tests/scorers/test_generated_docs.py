"""The parts of the documentation that are generated from the classes."""

from __future__ import annotations

import difflib
import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

import ood_scores
from ood_scores.scorers import list_scorers
from ood_scores.scorers.registry import scorer_class

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
SCRIPT = runpy.run_path(str(ROOT / "docs" / "generate.py"))
scorer_pages = importlib.import_module("scorer_pages")
NAMES = [name for name in list_scorers() if scorer_class(name).__module__.startswith("ood_scores.scorers.")]


@pytest.mark.parametrize("page", SCRIPT["PARTS"])
def test_pages_are_up_to_date(page: str) -> None:
    assert (ROOT / page).read_text() == SCRIPT["generated"](page), "run python docs/generate.py"


def test_each_page_is_in_one_place_of_the_navigation() -> None:
    trees = re.findall(r"```{toctree}\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    pages = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert [page for page in set(pages) if pages.count(page) > 1] == []
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= set(pages)


@pytest.mark.parametrize("name", NAMES)
def test_page_of_a_scorer_has_its_formula_needs_citation_and_reference(name: str) -> None:
    cls = scorer_class(name)
    text = scorer_pages.page(cls)
    assert f"](scorers/{name}.md)" in (ROOT / "docs" / "scorers.md").read_text()
    assert cls.tags.formula is not None, f"give the tags of {cls.__name__} the formula in LaTeX: formula='s(x) = …'"
    assert cls.tags.formula.startswith("s(x) = ")
    assert cls.tags.formula.count("{") == cls.tags.formula.count("}")
    assert cls.tags.paper is not None
    assert all(part in text for part in (f"$$\n{cls.tags.formula}\n$$", "| Scoring reads |", cls.tags.paper.bibtex()))
    assert f".. autoclass:: {cls.__module__}.{cls.__qualname__}\n" in text


def test_pages_have_the_rows_of_the_tables_of_real_images() -> None:
    tables = {(dataset, model): rows for dataset, model, _, rows in scorer_pages.result_tables()}
    rows = [row for each in tables.values() for row in each]
    (energy,) = (row for row in tables["CIFAR-10", "ResNet-20"] if row.startswith("| `energy` |"))
    assert "91.0\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}45.2" in energy
    text = scorer_pages.page(scorer_class("energy"))
    assert text.count("place ") == sum(row.startswith("| `energy` |") for row in rows)
    assert f"{energy}\n" in text
    text = scorer_pages.page(scorer_class("gradient_classifier"))
    assert "**ImageNet: Scores that run the model again, EfficientNet-Lite0**: place " in text
    assert "| `gradient_classifier` (experimental) |" in text


def test_public_names_and_signatures_are_those_of_the_committed_list() -> None:
    frozen, now = (ROOT / "docs" / "public_api.txt").read_text(), SCRIPT["public_api"]()
    changes = difflib.unified_diff(frozen.splitlines(), now.splitlines(), "before", "now", lineterm="", n=0)
    text = "\n".join(changes)
    assert not text, f"the public API has changed; if that is meant, run python docs/generate.py:\n{text}"


def test_list_of_the_public_api_notices_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(scorer: str, *, again: bool = False) -> None:
        """Stand for a changed function."""

    monkeypatch.setattr(ood_scores, "score", score)
    lines = SCRIPT["public_api"]().splitlines()
    assert "ood_scores.score(scorer: 'str', *, again: 'bool' = False) -> 'None'" in lines
    assert any(line.startswith("ood_scores.FeatureSet.save(") for line in lines)
    assert any(line.startswith("ood_scores.Detector.predict(") for line in lines)


def test_a_page_without_the_markers_of_a_part_is_named() -> None:
    SCRIPT["PARTS"]["README.md"]["nowhere"] = str
    try:
        with pytest.raises(ValueError, match=r"README\.md has no part 'nowhere'"):
            SCRIPT["generated"]("README.md")
    finally:
        del SCRIPT["PARTS"]["README.md"]["nowhere"]
