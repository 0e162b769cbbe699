"""Rate a classifier and its reject option together: metrics that count misclassified and out-of-distribution rows.

python examples/whole_system.py
"""

from sklearn.linear_model import LogisticRegression

import ood_scores
from ood_scores.data.kinds.digits import digits
from ood_scores.evaluation.calibration_error import classifier_calibration

images, labels = digits(range(7))
features = images.reshape(len(images), -1) / 255
classifier = LogisticRegression(C=0.01, max_iter=1000).fit(features[::2], labels[::2])


def feature_set(features, labels=None):
    head = ood_scores.Head(classifier.coef_, classifier.intercept_)
    return ood_scores.FeatureSet(features, classifier.decision_function(features), labels, head)


known = feature_set(features[1::2], labels[1::2])
unseen, _ = digits(range(7, 10))
table = ood_scores.evaluate(
    ["msp", "energy", "gradnorm", "knn"],
    id=known,
    ood={"digits 7-9": feature_set(unseen.reshape(len(unseen), -1) / 255)},
    fit=feature_set(features[::2], labels[::2]),
    metrics=["augrc", "augrc_scod", "oscr", "ccr_fpr2", "ece"],
)
print(f"accuracy {table.attrs['id_accuracy']:.3f}; {classifier_calibration(known)}")
print(table.drop(columns=["aupr_in", "aupr_out", "n_id", "n_ood"]).round(3).to_string(index=False))
