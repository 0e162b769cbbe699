"""Answer with a label, a set of labels, or "don't know": sets contain the true label of at least 97% of known images.

python examples/label_sets.py
"""

from digit_classifier import PREPROCESSING, fit, held_out, model, new_digits, photographs, split

import ood_scores

detector = ood_scores.calibrate(
    "vim", model, fit=fit, id=held_out, keep=0.95, sets="lac", alpha=0.03, preprocessing=PREPROCESSING
)
print(detector)

found = detector.predict(list(new_digits)).to_pandas()
labels = split.test_labels[300:]
inside = sum(int(label) in labels_in for label, labels_in in zip(labels, found["label_set"], strict=True))
sizes = [len(labels_in) for labels_in in found["label_set"]]
print(f"{inside} of {len(labels)} digits have their label in the set, which has {sum(sizes) / len(sizes):.2f} labels")


def answer(is_ood, labels_in):
    return "don't know" if is_ood or not labels_in else " or ".join(map(str, labels_in))


for name, images in {"digits": new_digits, "photographs": photographs}.items():
    found = detector.predict(list(images[:8])).to_pandas()
    print(f"answers for {name}:", [answer(*each) for each in zip(found["is_ood"], found["label_set"], strict=True)])
