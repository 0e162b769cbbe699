"""Look at the pictures with the lowest scores in FiftyOne: write the JSON that it imports, without FiftyOne.

python examples/export_to_fiftyone.py

The format is FiftyOneImageClassificationDataset: data.json has the file of every picture, and labels.json its predicted
class with the softmax probability and the scores. In FiftyOne, sort by them:

    import fiftyone

    kind = fiftyone.types.FiftyOneImageClassificationDataset
    dataset = fiftyone.Dataset.from_dir(dataset_dir="to_fiftyone", dataset_type=kind)
    session = fiftyone.launch_app(dataset.sort_by("ground_truth.score"))
"""

import json
from pathlib import Path

from digit_classifier import fit, model, new_digits, photographs
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import ood_scores
from ood_scores.data.sources import open_dataset
from ood_scores.evaluation.score_table import score_table


def export(feats: ood_scores.FeatureSet, scores: Tensor, pictures: Path, out: Path) -> None:
    """Write ``data.json`` and ``labels.json`` for rows that are named by files in the folder ``pictures``."""
    table = score_table(feats, scores)
    table["probability"] = ood_scores.score("msp", feats).numpy()
    files, labels = {}, {}
    for row in table.to_dict("records"):
        name = str(Path(row["id"]).with_suffix(""))  # FiftyOne's names have no suffix
        if name in files:
            raise SystemExit(f"two pictures are named {name}: rename one of them.")
        files[name] = str((pictures / row["id"]).resolve())
        labels[name] = {
            "label": str(row["prediction"]),
            "confidence": row["probability"],
            "attributes": {"score": row["score"], "row": row["row"]},
        }
    out.mkdir(exist_ok=True)
    (out / "data.json").write_text(json.dumps(files, indent=1))
    (out / "labels.json").write_text(json.dumps({"labels": labels}, indent=1))


folder = Path("pictures")
for kind, images in {"digit": new_digits[:20], "photograph": photographs[:20]}.items():
    (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / kind / f"{number:02}.png")

loader = DataLoader(open_dataset(f"folder:{folder}", fit.dataset.transform), batch_size=20)
feats = ood_scores.extract(model, loader, "pictures.h5", progress=False)
scores = ood_scores.score("vim", feats, ood_scores.extract(model, fit, progress=False))
export(feats, scores, folder, Path("to_fiftyone"))

labels = json.loads(Path("to_fiftyone/labels.json").read_text())["labels"]
lowest = sorted(labels, key=lambda name: labels[name]["attributes"]["score"])[:5]
print(f"{len(labels)} pictures are in to_fiftyone/labels.json; the lowest scores are those of {', '.join(lowest)}")
