"""Decoders for BYTES inputs: from encoded images to the tensor that the verification model takes.

A decoder is declared as text in the parameter `fides_step.decode`, because a service that decodes inside
its own model does not say how: `image:size=32x32,mode=RGB,layout=NCHW,scale=255,mean=0.5/0.5/0.5,std=...`.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError, SettingsError
from fides_plugins.types import Float32Array

#: Pixels of one image; a small file can claim to be enormous.
MAX_PIXELS = 64_000_000
_MODES = {"RGB": 3, "L": 1}
_LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True)
class ImageDecoder:
    """Encoded images, one per row, to a float tensor.

    Attributes
    ----------
    height, width, mode, layout:
        What every image is made into.
    scale, mean, std:
        `(pixel / scale - mean) / std`; mean and std are one number or one per channel.
    """

    height: int
    width: int
    mode: str
    layout: str
    scale: float
    mean: Float32Array
    std: Float32Array

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one decoded row."""
        channels = _MODES[self.mode]
        if self.layout == "NCHW":
            return (channels, self.height, self.width)
        return (self.height, self.width, channels)

    def __call__(self, elements: NDArray[Any]) -> Float32Array:
        """Decode one image per row."""
        flat = elements.reshape(len(elements), -1)
        if flat.shape[1] != 1:
            raise InputError(f"A row holds {flat.shape[1]} images; one is expected.")
        return self.tensor([io.BytesIO(bytes(element)) for element in flat[:, 0]], formats=("JPEG", "PNG"))

    def tensor(self, files: Sequence[IO[bytes] | Path], formats: tuple[str, ...] | None = None) -> Float32Array:
        """N image files as (N, C, H, W) or (N, H, W, C) float32; `formats` are those of Pillow, by default all."""
        images = [_image(file, self.mode, (self.width, self.height), formats) for file in files]
        whole = (-1, self.height, self.width, _MODES[self.mode])
        stacked = np.stack(images).reshape(whole) if images else np.empty((0, *whole[1:]), dtype=np.uint8)
        scaled = (stacked.astype(np.float32) / np.float32(self.scale) - self.mean) / self.std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2) if self.layout == "NCHW" else scaled, dtype=np.float32)


def make_decoder(text: str) -> ImageDecoder | None:
    """The decoder that `text` declares; None for an empty text.

    Raises
    ------
    SettingsError
        If the declaration is not understood, or Pillow is not installed.
    """
    if not text:
        return None
    kind, _, rest = text.partition(":")
    options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    if kind != "image":
        raise SettingsError(f"There is no decoder {kind!r}.", "Write image:size=HEIGHTxWIDTH,...")
    known = {"size", "mode", "layout", "scale", "mean", "std"}
    if set(options) - known:
        raise SettingsError(f"Unknown decoder option {sorted(set(options) - known)[0]!r}; known: {sorted(known)}.")
    try:
        height, width = (int(v) for v in options["size"].split("x"))
        mode, layout = options.get("mode", "RGB"), options.get("layout", "NCHW")
        scale = float(options.get("scale", 255))
        mean = np.array([float(v) for v in options.get("mean", "0").split("/")], dtype=np.float32)
        std = np.array([float(v) for v in options.get("std", "1").split("/")], dtype=np.float32)
    except (KeyError, ValueError):
        raise SettingsError(f"The decoder {text!r} is not complete.", "Write image:size=HEIGHTxWIDTH,...") from None
    if mode not in _MODES or layout not in _LAYOUTS or not scale or not std.all() or height < 1 or width < 1:
        raise SettingsError(f"The decoder {text!r} has a wrong mode, layout, size, scale or std.")
    if {mean.size, std.size} - {1, _MODES[mode]}:
        raise SettingsError(
            f"The decoder {text!r} has {mean.size} mean(s) and {std.size} std(s) for {_MODES[mode]} channel(s).",
            "Give one number, or one for each channel.",
        )
    if importlib.util.find_spec("PIL") is None:
        raise SettingsError("Decoding images needs Pillow.", "Install it with: pip install 'fides-plugins[triton]'.")

    return ImageDecoder(height, width, mode, layout, scale, mean, std)


def _image(
    file: IO[bytes] | Path, mode: str, size: tuple[int, int], formats: tuple[str, ...] | None
) -> NDArray[np.uint8]:
    # Imported here: only services with encoded inputs need Pillow.
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError("An image has too many pixels.")
            converted = image.convert(mode)
            resized = converted if converted.size == size else converted.resize(size, Image.Resampling.BILINEAR)
            return np.asarray(resized, dtype=np.uint8)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        raise InputError("An input is not a JPEG or PNG image.") from None
