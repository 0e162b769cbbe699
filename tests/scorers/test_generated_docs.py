"""The parts of the documentation that are generated from the classes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from ood_scores.scorers import list_scorers
from ood_scores.scorers.registry import scorer_class

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "generate.py"))


@pytest.mark.parametrize("page", SCRIPT["PARTS"])
def test_pages_are_up_to_date(page: str) -> None:
    assert (ROOT / page).read_text() == SCRIPT["generated"](page), "run python docs/generate.py"


def test_every_scorer_of_the_package_is_on_the_pages() -> None:
    readme, reference = ((ROOT / page).read_text() for page in ("README.md", "docs/scorers.md"))
    for cls in (scorer_class(name) for name in list_scorers()):
        if cls.__module__.startswith("ood_scores.scorers."):
            assert f"`{cls.name}`" in readme
            assert f".. autoclass:: {cls.__module__}.{cls.__qualname__}\n" in reference


def test_a_page_without_the_markers_of_a_part_is_named() -> None:
    SCRIPT["PARTS"]["README.md"]["nowhere"] = str
    try:
        with pytest.raises(ValueError, match=r"README\.md has no part 'nowhere'"):
            SCRIPT["generated"]("README.md")
    finally:
        del SCRIPT["PARTS"]["README.md"]["nowhere"]
