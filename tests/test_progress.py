"""The progress bar."""

from __future__ import annotations

import pytest

from ood_scores.progress import ProgressBar


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_bar_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("digits[rows=0:9] → features", 9, "rows", done=2, keep=True) as bar:
        bar.advance(3)
        bar.describe("digits[rows=0:9] → again", "loss 0.5")
        bar.update(8)
        bar.advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "digits[rows=0:9] → again" in shown.err
    assert "9/9 rows" in shown.err
    assert "loss 0.5" in shown.err


def test_invisible_bar_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", None, "steps", visible=False, keep=True) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")
