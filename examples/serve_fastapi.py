"""Serve a detector over HTTP: POST the bytes of an image file and receive JSON.

DETECTOR=detector/ uvicorn --factory --app-dir examples serve_fastapi:app
curl --data-binary @cat.jpg http://localhost:8000/predict
"""

import os
import threading

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from ood_scores import Detector
from ood_scores.errors import BadInput


def make_app(detector):
    app, monitor, one_at_a_time = FastAPI(), detector.monitor(), threading.Lock()

    def decide(image):
        found = detector.predict(image)
        with one_at_a_time:
            monitor.update(found.score)
        return {name: values[0].item() for name, values in found.columns().items()}

    @app.post("/predict")
    async def predict(request: Request):
        try:
            return await run_in_threadpool(decide, await request.body())
        except BadInput as error:
            raise HTTPException(422, str(error)) from error

    @app.get("/health")
    def health():
        with one_at_a_time:
            rate = monitor.rejection_rate if monitor.seen else None
            return {"rejection_rate": rate, "drifted": monitor.drifted()}

    return app


def app():
    return make_app(Detector.load(os.environ["DETECTOR"]))
