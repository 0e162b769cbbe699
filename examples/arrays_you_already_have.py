"""Score arrays without extraction: the features are pixels, and the head is a scikit-learn classifier.

python examples/arrays_you_already_have.py
"""

from sklearn.linear_model import LogisticRegression

import ood_scores
from ood_scores.data.kinds.digits import digits

images, labels = digits(range(7))
features = images.reshape(len(images), -1) / 255
classifier = LogisticRegression(max_iter=1000).fit(features[::2], labels[::2])
head = ood_scores.Head(classifier.coef_, classifier.intercept_)


def feature_set(features, labels=None):
    return ood_scores.FeatureSet(features, classifier.decision_function(features), labels, head)


unseen, _ = digits(range(7, 10))
table = ood_scores.evaluate(
    ["msp", "energy", "gradnorm", "mahalanobis", "knn"],
    id=feature_set(features[1::2], labels[1::2]),
    ood={"digits 7-9": feature_set(unseen.reshape(len(unseen), -1) / 255)},
    fit=feature_set(features[::2], labels[::2]),
)
print(f"accuracy on digits 0-6: {table.attrs['id_accuracy']:.3f}")
print(table.round(3).to_string(index=False))
