"""Detectors on the Hugging Face hub, which a small server stands in for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from detecting import PIXELS, Plain, extracted, network, same
from PIL import Image
from typer.testing import CliRunner

from ood_scores import Detector, calibrate
from ood_scores.cli import app
from ood_scores.errors import BadInput, ForeignFile, UnknownName

REPOSITORY = "somebody/detector"
FILES = [
    ".gitattributes",
    "README.md",
    "calibration.safetensors",
    "detector.json",
    "model.safetensors",
    "scorer.safetensors",
]


class Hub(ThreadingHTTPServer):
    """A hub that keeps the files of one repository by revision; only "somebody" may write."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.revisions: list[dict[str, bytes]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Request(BaseHTTPRequestHandler):
    """The few requests of ``upload_folder`` and ``snapshot_download``."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: bytes | Any, code: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "somebody" not in self.path + body.decode(errors="replace"):
            self.answer({"error": "no"}, 403)
        elif self.path.startswith("/api/repos/create"):
            self.server.revisions = self.server.revisions or [{".gitattributes": b""}]
            self.answer({"url": f"{self.server.address}/{REPOSITORY}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
            )
        else:
            self.commit([json.loads(line) for line in body.splitlines()])

    def commit(self, lines: list[dict[str, Any]]) -> None:
        files = dict(self.server.revisions[-1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.revisions.append(files)
        sha = revision_name(len(self.server.revisions) - 1)
        self.answer(
            {"success": True, "commitOid": sha, "commitUrl": f"{self.server.address}/{REPOSITORY}/commit/{sha}"}
        )

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if REPOSITORY not in path or not self.server.revisions:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        number = next((n for n in range(len(self.server.revisions)) if revision_name(n) in path), -1)
        files = self.server.revisions[number]
        sha = revision_name(number % len(self.server.revisions))
        if "/resolve/" in path:
            content = files[path.rpartition("/")[2]]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=sha)
        elif "/tree/" in path:
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        else:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            self.answer({"id": REPOSITORY, "modelId": REPOSITORY, "sha": sha, "siblings": siblings, "tags": []})

    do_HEAD = do_GET


def revision_name(number: int) -> str:
    return f"{number:040x}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def detector() -> Detector:
    model = network()
    return calibrate("mahalanobis", model, fit=extracted(model, 200, 1), id=extracted(model, 200, 2))


def test_a_detector_from_the_hub_decides_as_the_one_that_was_pushed(hub: Hub, detector: Detector) -> None:
    address = detector.push_to_hub(REPOSITORY)
    assert address == f"{hub.address}/{REPOSITORY}/commit/{revision_name(1)}"
    assert sorted(hub.revisions[1]) == FILES
    again = Detector.from_pretrained(REPOSITORY, device="cpu")
    assert same(again.predict(PIXELS), detector.predict(PIXELS))


def test_predict_opens_a_detector_of_the_hub(hub: Hub, detector: Detector, tmp_path: Path) -> None:
    detector.push_to_hub(REPOSITORY)
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(len(PIXELS))]
    words = ["predict", *files, "--device", "cpu", "--json"]
    shown = CliRunner().invoke(app, [*words, "--detector", f"hf-hub:{REPOSITORY}@{revision_name(1)}"])
    assert shown.exit_code == 0, shown.output
    expected = detector.predict(files)
    assert [row["score"] for row in json.loads(shown.stdout)["rows"]] == pytest.approx(
        expected.score.tolist(), rel=1e-6
    )
    absent = CliRunner().invoke(app, [*words, "--detector", "hf-hub:somebody/absent"])
    assert absent.exit_code == 1
    assert "the Hugging Face hub has no model 'somebody/absent'" in absent.stderr


def test_a_second_push_replaces_the_first_which_its_revision_keeps(hub: Hub, detector: Detector) -> None:
    detector.push_to_hub(REPOSITORY)
    hub.revisions[1]["notes.txt"] = b"mine"
    calibrate("energy", network(), id=extracted(network(), 100, 3)).push_to_hub(REPOSITORY)
    assert sorted(hub.revisions[2]) == sorted([*FILES, "notes.txt"])
    assert Detector.from_pretrained(REPOSITORY, device="cpu").scorer.name == "energy"
    first = Detector.from_pretrained(f"{REPOSITORY}@{revision_name(1)}", device="cpu")
    assert first.scorer.name == "mahalanobis"


def test_a_repository_with_other_files_is_left_alone(hub: Hub, detector: Detector) -> None:
    hub.revisions = [{"config.json": b"{}", "model.safetensors": b""}]
    with pytest.raises(ForeignFile, match=r"has other files, but no detector\.json: choose another"):
        detector.push_to_hub(REPOSITORY)
    assert len(hub.revisions) == 1


def test_the_card_states_what_the_detector_guarantees_and_runs(hub: Hub, detector: Detector) -> None:
    detector.push_to_hub(REPOSITORY)
    text = hub.revisions[1]["README.md"].decode()
    assert text.startswith("---\nlibrary_name: ood_scores\npipeline_tag: image-classification\n")
    assert "# mahalanobis on " in text
    assert 'found = detector.predict(["photo.jpg"])\n' in text
    assert f"| guarantee | {detector.calibration.guarantee} |" in text
    assert f'Detector.from_pretrained("{REPOSITORY}")' in text


def test_the_card_of_a_detector_without_its_model_passes_the_model(hub: Hub) -> None:
    model = Plain()
    detector = calibrate("energy", model, id=extracted(model, 100, 3))
    detector.push_to_hub(REPOSITORY)
    assert f'from_pretrained("{REPOSITORY}", model' in hub.revisions[1]["README.md"].decode()
    again = Detector.from_pretrained(REPOSITORY, model, device="cpu")
    np.testing.assert_array_equal(again.calibration.scores, detector.calibration.scores)


def test_errors_of_the_hub_say_what_to_do(hub: Hub, detector: Detector) -> None:
    with pytest.raises(UnknownName, match="the Hugging Face hub has no model 'somebody/absent'"):
        Detector.from_pretrained("somebody/absent")
    with pytest.raises(BadInput, match=r"stranger/x of the Hugging Face hub cannot be written to \(.*hf auth login"):
        detector.push_to_hub("stranger/x")
    with pytest.raises(BadInput, match=r"a b/c d of the Hugging Face hub cannot be written to"):
        detector.push_to_hub("a b/c d")
