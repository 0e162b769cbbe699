"""Serve a detector over HTTP: POST the bytes of an image file, or a form with several files, and receive JSON.

DETECTOR=detector/ uvicorn --factory --app-dir examples serve_fastapi:app
curl --data-binary @cat.jpg http://localhost:8000/predict
curl --form image=@cat.jpg --form image=@dog.png http://localhost:8000/predict    # pip install python-multipart

http://localhost:8000/docs describes the body. Requests that are too large are refused before they are in memory.
"""

import os
import threading

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image

from ood_scores import Detector
from ood_scores.errors import BadInput

MOST_BYTES = 32 * 2**20
MOST_PIXELS = 50_000_000
MOST_IMAGES = 16
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses images with more than twice as many
BINARY = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "description": f"At most {MOST_BYTES >> 20} MiB, and images of {MOST_PIXELS:,} pixels; in a form, named image.",
    "content": {
        "application/octet-stream": {"schema": BINARY},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "array", "maxItems": MOST_IMAGES, "items": BINARY}},
            }
        },
    },
}


class SizeLimit:
    """ASGI middleware that stops to read a body, announced or not, at ``MOST_BYTES``."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        read = 0

        async def limited():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise HTTPException(
                    413, f"the body has more than {MOST_BYTES >> 20} MiB: send fewer or smaller images."
                )
            return message

        await self.app(scope, limited, send)


def is_form(request):
    return request.headers.get("content-type", "").startswith("multipart/form-data")


async def images_of(request):
    """Return the encoded images in a body, those of a form with the names that messages use."""
    if not is_form(request):
        return [await request.body()]
    async with request.form(max_files=MOST_IMAGES, max_fields=MOST_IMAGES) as form:
        files = [file for file in form.getlist("image") if not isinstance(file, str)]
        if not files:
            raise HTTPException(422, "the form has no file named image: send at least one.")
        names = [f"{number} of {len(files)}, {file.filename!r}" for number, file in enumerate(files, 1)]
        return [{"bytes": await file.read(), "path": name} for name, file in zip(names, files, strict=True)]


def make_app(detector):
    app, monitor, one_at_a_time = FastAPI(), detector.monitor(), threading.Lock()
    app.add_middleware(SizeLimit)

    def decide(images):
        with one_at_a_time:  # so that the decoded images of one request are in memory
            found = detector.predict(images, on_error="raise")
            monitor.update(found.score)
        return [{name: values[row].item() for name, values in found.columns().items()} for row in range(len(found))]

    @app.post("/predict", openapi_extra={"requestBody": BODY})
    async def predict(request: Request):
        images = await images_of(request)
        try:
            answers = await run_in_threadpool(decide, images)
        except BadInput as error:
            raise HTTPException(422, str(error)) from error
        return answers if is_form(request) else answers[0]

    @app.get("/health")
    def health():
        with one_at_a_time:
            rate = monitor.rejection_rate if monitor.seen else None
            return {"rejection_rate": rate, "drifted": monitor.drifted()}

    return app


def app():
    return make_app(Detector.load(os.environ["DETECTOR"]))
