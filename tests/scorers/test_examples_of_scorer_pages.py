"""The example on the page of each scorer runs."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path

import pytest

from ood_scores.scorers import list_scorers
from ood_scores.scorers.registry import scorer_class

sys.path.append(str(Path(__file__).parents[2] / "docs"))
scorer_pages = importlib.import_module("scorer_pages")
ZERO_SHOT = ("csp", "gl_mcm", "neglabel")
"""Scorers of vision-language models, whose weights an example would have to download."""
NAMES = [name for name in list_scorers() if scorer_class(name).__module__.startswith("ood_scores.scorers.")]


@pytest.mark.filterwarnings("ignore")  # the network of the examples is not trained
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ZERO_SHOT])
def test_example_on_the_page_of_a_scorer_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = scorer_pages.page(scorer_class(name)).partition("```pycon\n")[2].partition("```")[0]
    test = doctest.DocTestParser().get_doctest(example, {}, name, None, 0)
    assert len(test.examples) >= 7
    assert doctest.DocTestRunner().run(test) == doctest.TestResults(0, len(test.examples))
