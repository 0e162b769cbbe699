"""Every example runs unchanged and prints what it promises."""

import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples"

DETECTORS = {"reject_option": None, "datasets_map": "datasets", "ray_batches": "ray"}
"""Examples that use a detector, with the optional package that each requires."""

MODULES = {"digit_classifier", "serve_fastapi"}
"""Examples that other programs import."""

TABLES = sorted({path.stem for path in FOLDER.glob("*.py")} - DETECTORS.keys() - MODULES)
"""All other examples: each prints a table of metrics."""


def run(name: str, folder: Path) -> str:
    path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", TABLES)
def test_example_prints_a_table(name, tmp_path):
    assert "fpr95_id" in run(name, tmp_path)


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_example_rejects_photographs_and_keeps_digits(name, tmp_path):
    needed = DETECTORS[name]
    if needed and not find_spec(needed):
        pytest.skip(f"pip install {needed}")
    found = re.findall(r"(\d+) of (\d+) (digits|photographs) rejected", run(name, tmp_path))
    shares = {kind: int(rejected) / int(rows) for rejected, rows, kind in found}
    assert shares["digits"] < 0.12
    assert shares["photographs"] > 0.9


def test_server_example_answers_refuses_and_reports_drift(monkeypatch):
    pytest.importorskip("fastapi", reason="pip install fastapi httpx")
    pytest.importorskip("httpx", reason="pip install fastapi httpx")
    from fastapi.testclient import TestClient

    monkeypatch.syspath_prepend(FOLDER)
    import digit_classifier as digits
    import serve_fastapi

    import ood_scores

    detector = ood_scores.calibrate(
        "vim", digits.model, fit=digits.fit, id=digits.held_out, preprocessing=digits.PREPROCESSING
    )
    client = TestClient(serve_fastapi.make_app(detector))

    def post(image: np.ndarray):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        return client.post("/predict", content=file.getvalue())

    assert client.get("/health").json() == {"rejection_rate": None, "drifted": False}
    expected = detector.predict([digits.new_digits[0], digits.photographs[0]])
    assert not expected.is_ood[0]
    for number, image in enumerate([digits.new_digits[0], digits.photographs[0]]):
        answer = post(image)
        assert answer.status_code == 200
        assert answer.json() == {
            "label": expected.label[number],
            "probability": pytest.approx(expected.probability[number], rel=1e-3),
            "score": pytest.approx(expected.score[number], rel=1e-3),
            "p_value": pytest.approx(expected.p_value[number], abs=0.01),
            "is_ood": expected.is_ood[number],
        }
    assert client.get("/health").json() == {"rejection_rate": 0.5, "drifted": False}
    refused = client.post("/predict", content=b"no image")
    assert refused.status_code == 422
    assert "image" in refused.json()["detail"]
    for image in digits.photographs[1:40]:
        post(image)
    assert client.get("/health").json()["drifted"]
