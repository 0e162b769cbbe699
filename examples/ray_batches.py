"""Score many images with Ray Data: each worker holds a detector and receives a stream of batches.

pip install "ray[data]"
python examples/ray_batches.py
"""

from pathlib import Path

import ray
from digit_classifier import PREPROCESSING, fit, held_out, model, new_digits, photographs

import ood_scores


class Detect:
    """A callable that each worker creates once; it opens the detector from its folder."""

    def __init__(self, folder):
        self.detector = ood_scores.Detector.load(folder)

    def __call__(self, batch):
        found = self.detector(batch)
        return {name: found[name] for name in ("number", "predicted_label", "score", "is_ood")}


detector = ood_scores.calibrate("vim", model, fit=fit, id=held_out, preprocessing=PREPROCESSING)
detector.save("digit_detector", arguments={"img_size": 16})

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
images = [
    *new_digits,
    *photographs,
]  # for a million images: ray.data.read_images("s3://bucket/images/", include_paths=True)
rows = ray.data.from_items([{"number": number, "image": image[:, :, None]} for number, image in enumerate(images)])
folder = str(Path("digit_detector").resolve())
found = rows.map_batches(Detect, fn_constructor_args=[folder], batch_size=64, concurrency=1)  # num_gpus=1 for GPUs
rejected = (
    found.to_pandas().sort_values("number")["is_ood"].to_numpy()
)  # for a million images: found.write_parquet(...)
print(f"{rejected[: len(new_digits)].sum()} of {len(new_digits)} digits rejected")
print(f"{rejected[len(new_digits) :].sum()} of {len(photographs)} photographs rejected")
