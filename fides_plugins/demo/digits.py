"""Scanned handwritten digits that scikit-learn ships, and a small CNN service trained on them.

Source of the data: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository (1998): 1,797 images of 8x8 pixels with 17 grey levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fides_plugins.types import Float32Array, IntArray

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
CLASS_NAMES = tuple(str(i) for i in range(10))

#: Rows for training the service and for fitting the bundle; the rest is held out for the figures.
SERVICE_ROWS = 400
FIT_ROWS = 950


@dataclass(frozen=True)
class Rows:
    """Images (N, 1, 8, 8) float32 in [0, 1] and labels (N,) int64."""

    images: Float32Array
    labels: IntArray


@dataclass(frozen=True)
class DigitsSplit:
    """Three disjoint parts: for the service's training, for `fides fit`, and held out."""

    service: Rows
    fit: Rows
    test: Rows


def load_digits_split(seed: int = 0) -> DigitsSplit:
    """All 1,797 digits, shuffled by `seed` and cut into three disjoint parts with equal shares of each digit."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images[:, None] / 16.0).astype(np.float32)
    labels = data.target.astype(np.int64)
    rest, test = train_test_split(
        np.arange(len(images)),
        train_size=SERVICE_ROWS + FIT_ROWS,
        stratify=labels,
        random_state=seed,
    )
    service, fit = train_test_split(rest, train_size=SERVICE_ROWS, stratify=labels[rest], random_state=seed)
    return DigitsSplit(*(Rows(images[part], labels[part]) for part in (service, fit, test)))


def train_service(
    rows: Rows, seed: int = 0, epochs: int = 60, on_epoch: Callable[[int, int], None] | None = None
) -> bytes:
    """Train the service model and export it.

    Parameters
    ----------
    rows:
        Labelled digits; shifted by up to one pixel and made noisy while training.
    on_epoch:
        Called with (epochs done, epochs in all), for a progress bar.

    Returns
    -------
    An ONNX graph `image` (N, 1, 8, 8) float32 -> `logits` (N, 10) float32.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    from fides_plugins.training.export import export_onnx

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    images, labels = torch.from_numpy(rows.images), torch.from_numpy(rows.labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
    steps = max(1, len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for part in order.chunk(steps):
            dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
            batch = torch.roll(images[part], (dx, dy), (2, 3))
            batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
            loss = functional.cross_entropy(net(batch), labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if on_epoch is not None:
            on_epoch(epoch + 1, epochs)
    return export_onnx(net, rows.images[:8], INPUT_NAME, OUTPUT_NAME)
