"""Images or vectors for training: read from a file or a folder, shaped for the service, split without leaks.

Two sources are understood: an ``.npz`` file with `images` (N, ...) and optionally `labels` (N,) and
`class_names` (K,), and a folder of pictures, one sub-folder for each class (or no sub-folder: no labels).
Labels are never needed to fit a bundle, because the service model answers for every row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.array_files import open_npz
from fides_plugins.bundle import InputSpec
from fides_plugins.errors import InputError, TrainingError
from fides_plugins.types import IntArray

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})

Array = NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """Rows for training.

    Attributes
    ----------
    images:
        (N, ...) in the dtype of the source; N rows.
    labels:
        (N,) int64, or None. Indices into the service's classes.
    class_names:
        K names, or empty where the source has none.
    digest:
        SHA-256 (hex) over shape, dtype and bytes of images and labels.
    """

    images: Array
    labels: IntArray | None = None
    class_names: tuple[str, ...] = ()
    digest: str = ""

    def __post_init__(self) -> None:
        if self.images.ndim < 2 or self.images.size == 0:
            raise TrainingError(
                f"The images have shape {self.images.shape}; expected (rows, ...) with at least one row.",
                "Save them as one array with one image per row.",
            )
        if self.images.dtype.kind not in "fiu":
            raise TrainingError(f"The images have dtype {self.images.dtype}; expected numbers.")
        if self.images.dtype.kind == "f" and not np.isfinite(self.images).all():
            bad = np.flatnonzero(~np.isfinite(self.images.reshape(len(self.images), -1)).all(axis=1))
            raise TrainingError(
                f"{len(bad)} of {len(self.images)} images hold a NaN or an infinity, the first is row {bad[0]}.",
                "Remove these rows.",
            )
        if self.labels is not None:
            if self.labels.shape != (len(self.images),):
                raise TrainingError(f"There are {len(self.images)} images and labels of shape {self.labels.shape}.")
            if self.labels.dtype.kind not in "iu":
                raise TrainingError(f"The labels have dtype {self.labels.dtype}; expected integers.")
            object.__setattr__(self, "labels", self.labels.astype(np.int64))
        if not self.digest:
            object.__setattr__(self, "digest", array_digest(self.images, self.labels))

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return len(self.images)

    def take(self, rows: IntArray) -> Dataset:
        """The same data, these rows only."""
        return Dataset(self.images[rows], None if self.labels is None else self.labels[rows], self.class_names)

    def check_labels(self, n_classes: int) -> None:
        """Refuse labels and names that do not fit a service with `n_classes` classes.

        Raises
        ------
        TrainingError
            If a label lies outside [0, n_classes), or there are more or fewer names than classes.
        """
        if self.labels is not None:
            bad = np.flatnonzero((self.labels < 0) | (self.labels >= n_classes))
            if len(bad):
                raise TrainingError(
                    f"{len(bad)} labels lie outside 0 to {n_classes - 1}, the first is row {bad[0]} "
                    f"with label {self.labels[bad[0]]}.",
                    "Use the service's own class indices, or leave the labels out: they are not needed.",
                )
        if self.class_names and len(self.class_names) != n_classes:
            raise TrainingError(
                f"The data name {len(self.class_names)} classes, the service has {n_classes}.",
                "Name every class of the service in its order, or give the images without class folders.",
            )


def array_digest(*arrays: Array | None) -> str:
    """SHA-256 (hex) over dtype, shape and bytes of each array; None is skipped."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def load_data(path: str | Path, spec: InputSpec | None = None) -> Dataset:
    """Read an ``.npz`` file or a folder of pictures.

    Parameters
    ----------
    path:
        The file or folder.
    spec:
        What the service takes; a folder's pictures are decoded and resized to it. Not used for ``.npz``.

    Raises
    ------
    TrainingError
        If there is nothing there, the file has no `images`, holds objects (pickles are refused), or a
        picture cannot be decoded.
    """
    source = Path(path)
    if source.is_dir():
        return _load_folder(source, spec)
    if not source.is_file():
        raise TrainingError(f"There is no data at {source}.", "Give an .npz file or a folder of pictures.")
    if source.suffix != ".npz":
        raise TrainingError(f"{source.name} is not an .npz file.", "Save it with numpy.savez(path, images=..., ...).")
    try:
        with open_npz(source) as archive:
            if "images" not in archive.names:
                raise TrainingError(
                    f"{source.name} holds {sorted(archive.names)} and no array `images`.",
                    "Save it with numpy.savez(path, images=..., labels=...).",
                )
            found = archive.read("images", "labels", "class_names")
    except InputError as error:
        raise TrainingError(error.cause_text, error.remedy) from None
    class_names = tuple(str(n) for n in found.get("class_names", np.empty(0)).ravel())
    return Dataset(found["images"], found.get("labels"), class_names)


def _load_folder(folder: Path, spec: InputSpec | None) -> Dataset:
    from PIL import Image, UnidentifiedImageError

    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files: list[tuple[Path, int]] = []
    for index, name in enumerate(classes or [""]):
        inside = sorted((folder / name).iterdir())
        files += [(p, index) for p in inside if p.suffix.lower() in PICTURE_SUFFIXES]
    if not files:
        raise TrainingError(f"There are no pictures in {folder}.", "Use one sub-folder per class, or none at all.")
    layout = image_layout(spec.shape) if spec else None
    pictures = []
    for path, _ in files:
        try:
            with Image.open(path) as picture:
                decoded = picture.convert("L" if layout is not None and layout.channels == 1 else "RGB")
                if layout is not None and layout.height and layout.width:
                    decoded = decoded.resize((layout.width, layout.height), Image.Resampling.BILINEAR)
                pixels = np.asarray(decoded, dtype=np.uint8)
        except (UnidentifiedImageError, OSError) as error:
            raise TrainingError(f"{path.name} is not a picture that can be decoded.", "Remove it.") from error
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pictures.append(pixels if layout is not None and layout.channels_last else pixels.transpose(2, 0, 1))
    if len({p.shape for p in pictures}) > 1:
        raise TrainingError("The pictures differ in size.", "Resize them to what the service takes.")
    labels = np.array([index for _, index in files], dtype=np.int64) if classes else None
    return Dataset(np.stack(pictures), labels, tuple(classes))


@dataclass(frozen=True)
class Layout:
    """Where an image tensor has its channels, and its size; height and width are None where free."""

    channels: int
    height: int | None
    width: int | None
    channels_last: bool


def image_layout(shape: tuple[int | None, ...]) -> Layout | None:
    """The layout of a tensor (N, C, H, W), (N, H, W, C) or (N, H, W); None for anything else.

    The axis with 1, 3 or 4 entries is taken for the channels; where both ends qualify, the first one is.
    """
    if len(shape) == 3 and shape[1] != 1:
        return Layout(1, shape[1], shape[2], channels_last=False)
    if len(shape) != 4:
        return None
    if shape[1] in (1, 3, 4):
        return Layout(shape[1], shape[2], shape[3], channels_last=False)
    if shape[3] in (1, 3, 4):
        return Layout(shape[3], shape[1], shape[2], channels_last=True)
    return None


def match_input(data: Dataset, spec: InputSpec, scale: float | None = None) -> tuple[Dataset, float]:
    """Bring images into exactly the dtype and shape that the service takes.

    Axes of length one are added or dropped; integers become floats multiplied by `scale`.

    Parameters
    ----------
    scale:
        Factor for the pixel values. None: 1/255 where uint8 images meet a service that takes floats, else 1.

    Returns
    -------
    The data in the service's dtype and shape, and the factor that was used.

    Raises
    ------
    TrainingError
        If the shape does not fit, or floats would have to be rounded to integers.
    """
    images = data.images
    given, wanted = images.shape[1:], spec.shape[1:]
    if len(given) != len(wanted) or any(w not in (None, s) for s, w in zip(given, wanted, strict=True)):
        if not wanted or tuple(s for s in given if s != 1) != tuple(s for s in wanted if s != 1):
            raise TrainingError(
                f"One image has shape {given}; the service's input {spec.name!r} takes "
                f"{tuple('any' if s is None else s for s in wanted)}.",
                "Save the images in the shape that the service takes.",
            )
        images = images.reshape(len(images), *(int(s) for s in wanted if s is not None))
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu" and images.dtype.kind == "f":
        raise TrainingError(
            f"The service's input {spec.name!r} takes {dtype}, the images are {images.dtype}.",
            f"Save them as {dtype}.",
        )
    if scale is None:
        scale = 1.0 / 255.0 if images.dtype == np.uint8 and dtype.kind == "f" else 1.0
    if scale != 1.0:
        if dtype.kind != "f":
            raise TrainingError("A pixel scale needs a service that takes floats.", "Leave the scale out.")
        images = (images.astype(np.float32) * np.float32(scale)).astype(dtype)
    images = np.ascontiguousarray(images, dtype=dtype)
    return replace(data, images=images), float(scale)


def split_rows(images: Array, shares: Mapping[str, float], seed: int) -> dict[str, IntArray]:
    """Disjoint random row indices for each name, sorted; identical images never fall into two parts.

    Parameters
    ----------
    images:
        (N, ...).
    shares:
        Name to share of the rows; the shares sum to one.
    seed:
        Same seed, same split.

    Raises
    ------
    TrainingError
        If there are too few distinct rows to give every part one.
    """
    if abs(sum(shares.values()) - 1.0) > 1e-9 or min(shares.values()) <= 0:
        raise TrainingError(f"The shares {dict(shares)} must be positive and sum to one.")
    keys = np.array([hashlib.sha256(row.tobytes()).hexdigest() for row in images])
    _, group = np.unique(keys, return_inverse=True)
    n_groups = int(group.max()) + 1
    if n_groups < len(shares):
        raise TrainingError(f"{n_groups} distinct rows cannot be split into {len(shares)} parts.", "Give more data.")
    # Groups are numbered by content, so the split does not depend on the order of equal rows.
    place = np.random.default_rng(seed).permutation(n_groups)
    edges = np.round(np.cumsum([0.0, *shares.values()]) * n_groups).astype(np.int64)
    parts: dict[str, IntArray] = {}
    for name, low, high in zip(shares, edges[:-1], edges[1:], strict=True):
        inside = (place >= low) & (place < high)
        parts[name] = np.flatnonzero(inside[group]).astype(np.int64)
    if any(len(rows) == 0 for rows in parts.values()):
        raise TrainingError(f"{len(images)} rows are too few for the parts {sorted(shares)}.", "Give more data.")
    return parts
