"""Put a reject option behind a timm classifier: images that it does not know go to a person.

python examples/reject_option.py
"""

from digit_classifier import PREPROCESSING, fit, held_out, model, new_digits, photographs

import ood_scores

detector = ood_scores.calibrate("vim", model, fit=fit, id=held_out, keep=0.95, preprocessing=PREPROCESSING)


def classify(images):
    found = detector.predict(images)
    return ["ask a person" if is_ood else int(label) for label, is_ood in zip(found.label, found.is_ood, strict=True)]


for name, images in {"digits": new_digits, "photographs": photographs}.items():
    answers = classify(list(images))
    print(f"{answers.count('ask a person')} of {len(answers)} {name} rejected; the first answers are {answers[:5]}")
