"""Add the columns of a detector to a Hugging Face dataset.

pip install datasets
python examples/datasets_map.py
"""

from datasets import Dataset, Features, Image, Value
from digit_classifier import PREPROCESSING, fit, held_out, model, new_digits, photographs
from PIL import Image as Images

import ood_scores

detector = ood_scores.calibrate("vim", model, fit=fit, id=held_out, preprocessing=PREPROCESSING)
columns = {
    "image": [Images.fromarray(image) for image in [*new_digits, *photographs]],
    "from": ["digits"] * len(new_digits) + ["photographs"] * len(photographs),
}
dataset = Dataset.from_dict(columns, Features({"image": Image(), "from": Value("string")}))
dataset = dataset.map(detector, batched=True, batch_size=64)  # new_fingerprint="..." names the result in its cache
for name, group in dataset.remove_columns("image").to_pandas().groupby("from"):
    print(f"{group['is_ood'].sum()} of {len(group)} {name} rejected")
