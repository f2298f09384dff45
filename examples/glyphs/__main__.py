"""Glyphs: 100 characters drawn from 16 fonts, turned, blurred and noisy. `python -m examples.glyphs`.

The fonts are those that matplotlib ships: DejaVu (Bitstream Vera licence) and STIX (SIL Open Font Licence).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from examples.study import Example, Split, convolution, main, split_dataset
from fides_plugins.training.data import Dataset
from fides_plugins.training.distil.augmentation import Augmentation
from fides_plugins.training.fit import FitOptions

#: Look-alikes that no one could tell apart without context are left out (O and 0, l and I, c and C, ...).
CHARACTERS = "0123456789ABCDEFGHIJKLMNPQRSTUVWXYZabdefghijkmnpqrtuyΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπστφψωБДЖИЦЧШЫЮЯЭЙ&%@#$?£€"  # noqa: RUF001
FONTS = tuple(
    f"DejaVuSans{style}"
    for style in ("", "-Bold", "-Oblique", "-BoldOblique", "Mono", "Mono-Bold", "Mono-Oblique", "Mono-BoldOblique")
) + tuple(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic"))
FONTS += ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
SIZE = 32
PER_CLASS = 140
SERVICE_ROWS = 7000
FIT_ROWS = 5000


def draw(character: str, font: Path, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One picture (32, 32): size, place, angle, blur, contrast and noise drawn at random."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    canvas = Image.new("L", (2 * SIZE, 2 * SIZE), 0)
    face = ImageFont.truetype(str(font), int(rng.integers(34, 43)))
    left, _, right, _ = face.getbbox(character, anchor="ls")
    x = SIZE - (left + right) / 2 + rng.uniform(-5, 5)
    # The middle of the cap height in the middle of the picture: case and descenders stay visible.
    y = SIZE + 0.36 * face.size + rng.uniform(-5, 5)
    ImageDraw.Draw(canvas).text((x, y), character, fill=255, font=face, anchor="ls")
    canvas = canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.0)))
    small = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    noisy = small * rng.uniform(0.6, 1.0) + rng.normal(0, rng.uniform(4, 28), small.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def load(seed: int) -> Split:
    """Images (N, 1, 32, 32) float32 in [0, 1]; 7,000 for the service, 5,000 to fit, 2,000 held out."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(seed)
    pictures, labels = [], []
    for label, character in enumerate(CHARACTERS):
        for _ in range(PER_CLASS):
            font = folder / f"{FONTS[rng.integers(len(FONTS))]}.ttf"
            pictures.append(draw(character, font, rng))
            labels.append(label)
    images = (np.stack(pictures)[:, None] / 255.0).astype(np.float32)
    data = Dataset(images, np.array(labels, np.int64), tuple(CHARACTERS))
    return split_dataset(data, SERVICE_ROWS, FIT_ROWS, seed)


def build() -> nn.Module:
    """A CNN with 0.9 million parameters."""
    return nn.Sequential(
        *convolution(1, 32),
        *convolution(32, 32, 2),
        *convolution(32, 64),
        *convolution(64, 64, 2),
        *convolution(64, 128),
        *convolution(128, 128, 2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(128 * 16, 256),
        nn.ReLU(),
        nn.Linear(256, len(CHARACTERS)),
    )


EXAMPLE = Example(
    name="glyphs",
    load=load,
    build=build,
    epochs=10,
    options=FitOptions(agreement=0.95, transfer_rows=20_000, epochs=12),
    augmentation=Augmentation(degrees=5, scale=0.08, shift=0.05, noise=0.2, mix=0.0),
)

if __name__ == "__main__":
    main(EXAMPLE)
