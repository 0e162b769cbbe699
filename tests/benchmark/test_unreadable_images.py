"""Images that cannot be read: a dataset of a benchmark is not run, or is used without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_benchmark import ROWS, part, spec

from ood_scores.benchmark import Results, load_results, run
from ood_scores.benchmark.spec import Extraction, ScorerTable

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*left out:UserWarning")]

BAD = (0, 23)
KEPT = [row for row in range(ROWS["dark"]) if row not in BAD]


@pytest.fixture
def files(data: Path, tmp_path: Path) -> str:
    """The images of a set as files, two of which are damaged."""
    with np.load(data / "dark.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    folder = tmp_path / "dark"
    folder.mkdir()
    for row, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{row:02}.png")
    for row in BAD:
        (folder / f"{row:02}.png").write_bytes(b"damaged")
    (folder / "list.txt").write_text("\n".join(f"{row:02}.png {label}" for row, label in enumerate(labels)))
    return f"imglist:{folder}/list.txt"


def ran(files: str, on_error: str, data: Path, out: Path) -> Results:
    chosen = part(
        sets={**part().sets, "files": files},
        far=("dark", "files"),
        scorers=(ScorerTable("msp", "msp"),),
        extraction=Extraction(batch_size=8, workers=0, on_error=on_error),
    )
    return run(spec(chosen), out=out, data=data, jobs=1, progress=False)


def test_a_dataset_with_unreadable_images(files: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = ran(files, "raise", data, out)
    (entry,) = stopped.not_run
    assert entry.what == "files"
    assert "00.png" in entry.reason
    assert set(stopped.table["ood"]) == {"cousins", "dark"}
    skipped = ran(files, "skip", data, out)
    assert skipped.not_run == ()
    (scored,) = skipped.scored
    assert scored.rows["files"].tolist() == KEPT
    assert scored.labels["files"].tolist() == scored.labels["dark"][KEPT].tolist()
    np.testing.assert_allclose(scored.scores["msp"]["files"], scored.scores["msp"]["dark"][KEPT], rtol=1e-4)
    text = next(text for text in skipped.warnings["warning"] if "cannot be read" in text)
    assert text.startswith("2 of 25 rows of files cannot be read and are left out (row 0: cannot read the image")
    assert "2 of 25 rows of files cannot be read" in (out / "report.md").read_text()
    assert load_results(out).warnings["warning"].tolist() == skipped.warnings["warning"].tolist()
    again = ran(files, "raise", data, out)
    assert [entry.what for entry in again.not_run] == ["files"]
    assert ran(files, "skip", data, out).table.equals(skipped.table)  # its cache is still there
