"""Labels of a benchmark's datasets in the order of the model's classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_benchmark import CLASSES, part, spec

from ood_scores.benchmark import run
from ood_scores.benchmark.spec import ScorerTable

pytestmark = pytest.mark.usefixtures("one_thread")


def test_folders_of_some_classes_have_the_labels_of_the_model(data: Path, tmp_path: Path) -> None:
    for name in ("0", "2"):
        (tmp_path / "some" / name).mkdir(parents=True)
        for row in range(3):
            pixels = np.full((8, 8, 3), 40 * row, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "some" / name / f"{row}.png")
    sets = {**part().sets, "some": f"folder:{tmp_path / 'some'}"}
    chosen = part(sets=sets, id="some", near=(), far=("dark",), scorers=(ScorerTable("msp", "msp"),))
    (scored,) = run(spec(chosen), out=tmp_path / "out", data=data, jobs=1, progress=False).scored
    assert scored.labels["id"].tolist() == [0, 0, 0, 2, 2, 2]


def test_a_list_of_classes_shorter_than_those_of_the_model_is_named_as_the_reason(data: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "some" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "some" / name / "0.png")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    sets = {**part().sets, "some": f"folder:{tmp_path / 'some'}?classes={tmp_path / 'names.txt'}"}
    chosen = part(sets=sets, near=(), far=("some",), scorers=(ScorerTable("msp", "msp"),))
    results = run(spec(chosen), out=tmp_path / "out", data=data, jobs=1, progress=False)
    reasons = [each.reason for each in results.not_run]
    assert any(f"has 2 names, but the model has {CLASSES} classes" in reason for reason in reasons), reasons
