"""Explain why images are rejected: what they nearly were, similar training images, and where the score comes from.

python examples/why_rejected.py
"""

from digit_classifier import PREPROCESSING, fit, held_out, model, new_digits, photographs

import ood_scores

train = ood_scores.extract(model, fit, progress=False)
validation = ood_scores.extract(model, held_out, progress=False)
detector = ood_scores.calibrate("mahalanobis", model, fit=train, id=validation, preprocessing=PREPROCESSING)

images = [*new_digits[:20], *photographs[:20]]
found = detector.explain(images, fit=train, id=validation, scorers=["energy", "knn"], pictures=fit.dataset, most=10)
print(f"{found.rejected} of {found.images} images rejected")
for each in found.rows[:3]:
    name, probability = each.classes[0]
    p_values = ", ".join(f"{scorer} {p:.3f}" for scorer, p in each.p_values.items())
    similar = [f"{near.id} (a {near.label})" for near in each.neighbors]
    print(f"image {each.image}: nearly a {name} ({probability:.0%}); p-values {p_values}; similar to {similar}")
print(f"the page is {found.save('why')}")
