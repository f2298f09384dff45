"""Digits: the 1,797 scanned digits of 8x8 pixels that scikit-learn ships. `python -m examples.digits`."""

from __future__ import annotations

from torch import nn

from examples.study import Example, Split, convolution, main
from fides_plugins.demo.digits import CLASS_NAMES, Rows, load_digits_split
from fides_plugins.training.data import Dataset
from fides_plugins.training.distil.augmentation import Augmentation
from fides_plugins.training.fit import FitOptions


def load(seed: int) -> Split:
    """The demonstration's split: images (N, 1, 8, 8) float32 in [0, 1]."""

    def dataset(rows: Rows) -> Dataset:
        return Dataset(rows.images, rows.labels, CLASS_NAMES)

    split = load_digits_split(seed)
    return Split(dataset(split.service), dataset(split.fit), dataset(split.test))


def build() -> nn.Module:
    """A CNN with 0.1 million parameters."""
    return nn.Sequential(
        *convolution(1, 32),
        *convolution(32, 64),
        nn.MaxPool2d(2),
        *convolution(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


EXAMPLE = Example(
    name="digits",
    load=load,
    build=build,
    epochs=60,
    options=FitOptions(),
    augmentation=Augmentation(degrees=15, scale=0.12, shift=0.1, noise=0.1, mix=0.0),
)

if __name__ == "__main__":
    main(EXAMPLE)
