"""What the help of the commands says, and how it looks in a narrow terminal."""

from __future__ import annotations

import inspect
import re

import pytest

from ood_scores.cli import COMMANDS
from ood_scores.data.subsets import VIEWS
from ood_scores.extraction.probes import PROBES

NARROW = 78
"""Characters of a line of help in a terminal of 80."""


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_fit_a_narrow_terminal(name: str) -> None:
    _, *verbatim = (inspect.getdoc(COMMANDS[name]) or "").split("\b\n")
    lines = [line for text in verbatim for line in text.partition("\n\n")[0].splitlines()]
    assert not [line for line in lines if len(re.sub(r"\[/?(bold)?\]", "", line)) > NARROW]


def test_the_help_of_extract_names_all_probes() -> None:
    _, _, text = (inspect.getdoc(COMMANDS["extract"]) or "").partition("[bold]Probes[/]")
    own = {name for name, probe in PROBES.items() if probe.__module__.startswith("ood_scores.")}
    assert own <= set(re.findall(r"\w+", text))


def test_the_help_of_extract_names_all_options_of_datasets() -> None:
    text = (inspect.getdoc(COMMANDS["extract"]) or "").partition("options of all:")[2].partition("[bold]Probes[/]")[0]
    assert set(re.findall(r"(\w+)=", text)) == set(VIEWS)
