"""Watch a stream of features: test windows of it, read the verdict at any time, and name the rows that moved most.

python examples/has_the_data_changed.py
"""

import numpy as np
from digit_classifier import held_out, loader, model, new_digits, photographs

import ood_scores
from ood_scores.detector import FeatureMonitor

reference = ood_scores.extract(model, held_out, progress=False)
monitor = FeatureMonitor.of(reference, "energy", window=50)

digits = {f"digit {row}": image for row, image in enumerate(new_digits)}
mixed = digits | {f"photograph {row}": image for row, image in enumerate(photographs)}
for title, stream in {"digits": digits, "digits and photographs": mixed}.items():
    names = np.random.default_rng(0).permutation(list(stream))
    images = np.stack([stream[name] for name in names])
    monitor.update(ood_scores.extract(model, loader(images, names=names), progress=False))
    print(f"after {title}: p-value {monitor.p_value:.2g}, shifted: {monitor.drifted(alpha=0.01)}")

print("rows that moved most:", ", ".join(monitor.most_moved))
monitor.plot(alpha=0.01).savefig("shift.png", dpi=150)

monitor = FeatureMonitor.from_json(monitor.to_json())  # one line, from which a later process continues
print(f"{monitor.seen} rows in {monitor.windows} windows")
