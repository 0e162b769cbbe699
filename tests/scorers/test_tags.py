"""Tags of the scorers of the package: papers, test parameters, and search spaces."""

from __future__ import annotations

import inspect

import pytest

from ood_scores import create_scorer, list_scorers
from ood_scores.scorers.registry import scorer_class
from ood_scores.scorers.tags import Paper

NAMES = [name for name in list_scorers() if scorer_class(name).__module__.startswith("ood_scores.scorers.")]


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_cites_the_paper(name: str) -> None:
    cls = scorer_class(name)
    assert cls.tags.paper is not None
    family = cls.tags.paper.authors.split(",")[0].split()[-1]
    text = inspect.getdoc(cls) or ""
    assert family.replace("é", "e") in text or "Source: as ``" in text
    assert cls.tags.paper.url.startswith("https://")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_tags_create_scorers(name: str) -> None:
    tags = scorer_class(name).tags
    create_scorer(name, **tags.small_parameters)
    for parameter, values in tags.search_space.items():
        for value in values:
            assert getattr(create_scorer(name, **{parameter: value}), parameter) == value


def test_keys_of_different_papers_differ() -> None:
    papers = {paper for name in NAMES if (paper := scorer_class(name).tags.paper)}
    assert len({paper.key for paper in papers}) == len(papers)


def test_bibtex() -> None:
    preprint = Paper("On the Ascent of Scores", "Ann Müller, Bo Li", "arXiv", 2031, "https://example.org/1")
    assert preprint.key == "muller2031ascent"
    assert preprint.bibtex().splitlines() == [
        "@article{muller2031ascent,",
        "  title = {{On the Ascent of Scores}},",
        "  author = {Ann Müller and Bo Li},",
        "  journal = {arXiv},",
        "  year = {2031},",
        "  url = {https://example.org/1},",
        "}",
    ]
