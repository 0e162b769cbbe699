"""Every example runs unchanged and prints what it promises."""

import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ood_scores

FOLDER = Path(__file__).parents[1] / "examples"

DETECTORS = {"reject_option": None, "datasets_map": "datasets", "ray_batches": "ray"}
"""Examples that use a detector, with the optional package that each requires."""

FILES = {"export_to_fiftyone"}
"""Examples that write files."""

MODULES = {"digit_classifier", "serve_fastapi"}
"""Examples that other programs import."""

TRANSFORMERS = {"audio_classifier", "text_classifier"}
"""Examples of models of transformers, each with a table and a detector."""

ANSWERS = {"has_the_data_changed", "label_sets", "why_rejected"}
"""Examples that answer questions about the digits classifier."""

TABLES = sorted(
    {path.stem for path in FOLDER.glob("*.py")} - DETECTORS.keys() - FILES - MODULES - TRANSFORMERS - ANSWERS
)
"""All other examples: each prints a table of metrics."""


def run(name: str, folder: Path) -> str:
    return finished(name, folder).stdout


def finished(name: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_the_classifier_of_other_examples_prints_nothing(tmp_path):
    done = finished("digit_classifier", tmp_path)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("name", TABLES)
def test_example_prints_a_table(name, tmp_path):
    assert "fpr95_id" in run(name, tmp_path)


def test_export_to_fiftyone_names_every_picture(tmp_path):
    assert "40 pictures are in to_fiftyone/labels.json" in run("export_to_fiftyone", tmp_path)
    files, labels = (json.loads((tmp_path / "to_fiftyone" / f"{name}.json").read_text()) for name in ("data", "labels"))
    feats = ood_scores.load(tmp_path / "pictures.h5")
    expected = [f"{kind}/{row:02}" for kind in ("digit", "photograph") for row in range(20)]
    assert list(files) == list(labels["labels"]) == expected
    for name, logits in zip(expected, feats.logits, strict=True):
        assert Path(files[name]) == tmp_path / "pictures" / f"{name}.png"
        label = labels["labels"][name]
        assert label["label"] == str(int(logits.argmax()))
        assert label["confidence"] == pytest.approx(float(logits.double().softmax(0).max()))
    order = sorted(expected, key=lambda name: labels["labels"][name]["attributes"]["score"])
    assert [name.split("/")[0] for name in order[:10]].count("photograph") >= 8


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_example_rejects_photographs_and_keeps_digits(name, tmp_path):
    needed = DETECTORS[name]
    if needed and not find_spec(needed):
        pytest.skip(f"pip install {needed}")
    found = re.findall(r"(\d+) of (\d+) (digits|photographs) rejected", run(name, tmp_path))
    shares = {kind: int(rejected) / int(rows) for rejected, rows, kind in found}
    assert shares["digits"] < 0.12
    assert shares["photographs"] > 0.9


def test_label_sets_have_the_label_of_most_digits(tmp_path):
    printed = run("label_sets", tmp_path)
    inside, rows, size = re.search(
        r"(\d+) of (\d+) digits have their label in the set, which has ([\d.]+)", printed
    ).groups()
    assert int(inside) / int(rows) > 0.92
    assert 1 <= float(size) < 4
    assert printed.count("don't know") >= 8


def test_stream_of_photographs_is_found_and_its_rows_are_named(tmp_path):
    printed = run("has_the_data_changed", tmp_path)
    assert re.findall("shifted: (True|False)", printed) == ["False", "True"]
    assert re.search("rows that moved most: (.*)", printed)[1].count("photograph") >= 8
    assert (tmp_path / "shift.png").stat().st_size > 5000


def test_rejected_images_are_explained_on_a_page(tmp_path):
    printed = run("why_rejected", tmp_path)
    rejected, rows = map(int, re.search(r"(\d+) of (\d+) images rejected", printed).groups())
    assert 18 <= rejected <= 23
    assert rows == 40
    page = (tmp_path / "why" / "index.html").read_text()
    assert page.count('class="row"') == 10
    assert page.count("<img") == 10 * (2 + 5)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_example_of_transformers_keeps_what_it_knows_and_rejects_others(name, tmp_path):
    pytest.importorskip("transformers")
    printed = run(name, tmp_path)
    assert "fpr95_id" in printed
    known, others = (int(count) for count in re.findall(r"(\d+) of 100 .* rejected", printed))
    assert known < 20
    assert others > 95


PHOTO = np.full((8, 8, 3), 200, np.uint8)


def test_the_image_of_the_server_copies_files_that_exist():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    allowed = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(allowed)
    assert all((FOLDER.parent / name).exists() for name in copied)
    (command,) = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    assert command[:3] == ["uvicorn", "--factory", "serve_fastapi:app"]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A client of the server example, and the module."""
    pytest.importorskip("fastapi", reason="pip install fastapi httpx")
    pytest.importorskip("httpx", reason="pip install fastapi httpx")
    from fastapi.testclient import TestClient

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.syspath_prepend(FOLDER)
    import serve_fastapi
    import torch

    import ood_scores

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    preprocessing = {
        "input_size": (3, 8, 8),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
    }
    detector = ood_scores.calibrate("energy", model, id=[torch.rand(40, 3, 8, 8)], preprocessing=preprocessing)
    return TestClient(serve_fastapi.make_app(detector)), serve_fastapi


def test_server_example_limits_what_it_reads(server, monkeypatch):
    client, module = server
    monkeypatch.setattr(module, "MOST_BYTES", 2**20)
    assert client.post("/predict", content=bytes(2**20)).status_code == 422
    for body in (bytes(2**20 + 1), (bytes(2**18) for _ in range(5))):
        answer = client.post("/predict", content=body)
        assert answer.status_code == 413
        assert answer.json()["detail"] == "the body has more than 1 MiB: send fewer or smaller images."
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    answer = client.post("/predict", content=png(np.zeros((400, 400), np.uint8)))
    assert answer.status_code == 422
    assert "exceeds limit of 100000" in answer.json()["detail"]
    assert client.post("/predict", content=png(PHOTO)).status_code == 200
    noise = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for content in (b"", b"no image", noise[:5000]):
        answer = client.post("/predict", content=content)
        assert answer.status_code == 422
        assert len(answer.json()["detail"].splitlines()) == 1


def test_server_example_describes_its_body(server):
    content = server[0].get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert content["application/octet-stream"]["schema"] == {"type": "string", "format": "binary"}
    assert content["multipart/form-data"]["schema"]["properties"]["image"]["maxItems"] == 16


def test_server_example_reads_forms(server, monkeypatch):
    pytest.importorskip("python_multipart", reason="pip install python-multipart")
    client, module = server
    files = [("image", ("a.png", png(PHOTO), "image/png")), ("image", ("b.png", png(PHOTO // 2), "image/png"))]
    answer = client.post("/predict", files=files)
    assert answer.status_code == 200
    alone = [client.post("/predict", content=png(image)).json() for image in (PHOTO, PHOTO // 2)]
    assert [each["score"] for each in answer.json()] == pytest.approx([each["score"] for each in alone], rel=1e-5)
    assert client.post("/predict", files=files[:1] * 17).status_code == 400
    assert client.post("/predict", files=[("photo", files[0][1])]).status_code == 422
    refused = client.post("/predict", files=[*files, ("image", ("c.png", b"no image"))])
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("cannot read the image 3 of 3, 'c.png' (its format is none of ")
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    assert client.post("/predict", files=files * 8).status_code == 413


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
