"""The public face: its names and signatures change only when that is meant."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path

import pytest

import ood_scores

ROOT = Path(__file__).parents[1]
FROZEN = ROOT / "docs" / "public_api.txt"
FUNCTIONS = runpy.run_path(str(ROOT / "docs" / "public_api.py"))


def test_public_names_and_signatures_are_those_of_the_committed_list() -> None:
    changes = difflib.unified_diff(
        FROZEN.read_text().splitlines(), FUNCTIONS["public_api"]().splitlines(), "before", "now", lineterm="", n=0
    )
    text = "\n".join(changes)
    assert not text, f"the public API has changed; if that is meant, run python docs/generate.py:\n{text}"


def test_list_of_the_public_api_notices_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(scorer: str, *, again: bool = False) -> None:
        """Stand for a changed function."""

    monkeypatch.setattr(ood_scores, "score", score)
    lines = FUNCTIONS["public_api"]().splitlines()
    assert "ood_scores.score(scorer: 'str', *, again: 'bool' = False) -> 'None'" in lines
    assert any(line.startswith("ood_scores.FeatureSet.save(") for line in lines)
    assert any(line.startswith("ood_scores.Detector.predict(") for line in lines)
