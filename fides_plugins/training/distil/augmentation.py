"""Changed copies of rows, by kind of input, that stay what such rows can be.

The teacher answers whatever it is shown, so a few rows go a long way. Images are shifted, rotated, scaled, get noise,
and are mixed; sequences lose parts to padding, are shifted, and take parts of one another; a table's numbers move
within their columns; sound is shifted, made louder or softer, and gets noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fides_plugins.training.data import image_layout
from fides_plugins.training.kinds import Kind, input_kind, padding
from fides_plugins.types import IntArray

Array = NDArray[Any]
#: (rows, generator) -> changed rows, and which row each is a blend with (-1: none, so that its label still holds).
Change = Callable[[Array, np.random.Generator], tuple[Array, IntArray]]


@dataclass(frozen=True)
class Augmentation:
    """How far a shown row may differ from a real one.

    Attributes
    ----------
    degrees, scale, shift:
        Of images: largest rotation, relative change of size, and shift (as a share of the image's size).
    noise:
        Largest standard deviation of added noise, in standard deviations of the data.
    mix:
        Share of copies that are blends of two rows.
    flip:
        Mirror half of the images left to right; wrong for anything with writing in it.
    changes:
        Names of the changes that are made, of those that `changes` gives for the kind; None: all.
    """

    degrees: float = 15.0
    scale: float = 0.12
    shift: float = 0.12
    noise: float = 0.2
    mix: float = 0.25
    flip: bool = False
    changes: tuple[str, ...] | None = None

    def only(self, names: Sequence[str]) -> Augmentation:
        """The same with these changes alone."""
        return replace(self, changes=tuple(names))


def augment(
    rows: Array,
    labels: IntArray | None,
    copies: int,
    seed: int,
    settings: Augmentation | None = None,
    kind: Kind | None = None,
) -> tuple[Array, IntArray, IntArray]:
    """The rows themselves, then `copies` changed versions of each, in the same dtype and range of values.

    Parameters
    ----------
    rows:
        (N, ...).
    labels:
        (N,) or None. A blend of two rows has no label (-1).
    kind:
        Of the rows; found from them by default.

    Returns
    -------
    Rows (M, ...) with M = N * (1 + copies), their labels (M,), and where they come from, (M, 2): a row, and the one
    that it is blended with, or itself again.
    """
    known = np.full(len(rows), -1, np.int64) if labels is None else labels
    table = changes(kind or input_kind(rows), rows, settings or Augmentation())
    rng = np.random.default_rng(seed)
    own = np.arange(len(rows))
    parts, answers, origins = [rows], [known], [np.stack([own, own], axis=1)]
    for _ in range(copies if table else 0):
        which = rng.integers(len(table), size=len(rows))
        changed, partner = np.empty_like(rows), own.copy()
        for index, change in enumerate(table.values()):
            chosen = np.flatnonzero(which == index)
            if len(chosen):
                changed[chosen], other = change(rows[chosen], rng)
                partner[chosen] = np.where(other >= 0, chosen[other], chosen)
        parts.append(changed)
        answers.append(np.where(partner != own, -1, known))
        origins.append(np.stack([own, partner], axis=1))
    return np.concatenate(parts), np.concatenate(answers), np.concatenate(origins)


def changes(kind: Kind, rows: Array, settings: Augmentation) -> dict[str, Change]:
    """The changes of a kind by name; rows (N, ...) tell the ranges of values."""
    table: dict[str, Change]
    if kind == "image":
        table = {"move and mix": _Pictures(rows, settings)}
    elif kind in ("tokens", "bytes"):
        fill = padding(rows)
        table = {
            "drop": lambda r, g: (_drop(r, g, fill), _none(r)),
            "shift": lambda r, g: (_shift(r, g, fill, 0.1), _none(r)),
            "crop": lambda r, g: (_crop(r, g, fill), _none(r)),
            "splice": _splice,
        }
    elif kind == "audio":
        spread = float(rows.std())
        table = {
            "gain": lambda r, g: ((r * 10 ** g.uniform(-0.3, 0.3, (len(r), 1))).astype(r.dtype), _none(r)),
            "shift": lambda r, g: (_shift(r, g, 0, 0.1), _none(r)),
            "noise": lambda r, g: (_hiss(r, g, spread * settings.noise / 4), _none(r)),
        }
    else:
        table = {"jitter": _Columns(rows, settings)}
    if settings.changes is None:
        return table
    return {name: change for name, change in table.items() if name in settings.changes}


def _none(rows: Array) -> IntArray:
    return np.full(len(rows), -1, np.int64)


def _spans(rows: Array, rng: np.random.Generator, least: float, most: float) -> NDArray[np.bool_]:
    """(n, L): one stretch of each row, its length a share between `least` and `most`."""
    n, length = len(rows), rows.shape[1]
    size = np.maximum(1, rng.uniform(least, most, n) * length)
    start = rng.uniform(0, 1, n) * np.maximum(length - size, 0)
    place = np.arange(length)
    return np.asarray((place >= start[:, None]) & (place < (start + size)[:, None]))


def _drop(rows: Array, rng: np.random.Generator, fill: int) -> Array:
    """A tenth of the places at most, here and there, becomes padding."""
    share = rng.uniform(0.0, 0.1, (len(rows), 1))
    return np.where(rng.random(rows.shape) < share, np.asarray(fill, rows.dtype), rows)


def _crop(rows: Array, rng: np.random.Generator, fill: int) -> Array:
    """A stretch of up to a quarter becomes padding."""
    return np.where(_spans(rows, rng, 0.02, 0.25), np.asarray(fill, rows.dtype), rows)


def _shift(rows: Array, rng: np.random.Generator, fill: float, most: float) -> Array:
    """Everything moves by up to `most` of the length; what is left behind is filled."""
    length = rows.shape[1]
    by = np.rint(rng.uniform(-most, most, (len(rows), 1)) * length).astype(np.int64)
    source = np.arange(length) - by
    moved = np.take_along_axis(rows, np.clip(source, 0, length - 1), axis=1)
    return np.where((source >= 0) & (source < length), moved, np.asarray(fill, rows.dtype))


def _splice(rows: Array, rng: np.random.Generator) -> tuple[Array, IntArray]:
    """A stretch of up to 40% comes from another row."""
    other = rng.permutation(len(rows))
    return np.where(_spans(rows, rng, 0.05, 0.4), rows[other], rows), other


def _hiss(rows: Array, rng: np.random.Generator, strength: float) -> Array:
    noise = rng.standard_normal(rows.shape, dtype=np.float32) * rng.uniform(0, strength, (len(rows), 1))
    return (rows + noise).astype(rows.dtype)


class _Columns:
    """Numbers of a table: those of many values get noise and are blended, those of few take another row's value."""

    def __init__(self, rows: Array, settings: Augmentation) -> None:
        flat = rows.reshape(len(rows), -1).astype(np.float64)
        self.settings = settings
        self.spread = np.nanstd(flat, axis=0)
        self.low, self.high = np.nanmin(flat, axis=0), np.nanmax(flat, axis=0)
        # A column of codes has few values, or whole ones only.
        sample = flat[:2048]
        few = np.array([len(np.unique(column)) <= 16 for column in sample.T])
        whole = rows.dtype.kind == "f" and (np.isnan(sample) | (sample == np.rint(sample))).all(axis=0)
        self.codes = few | whole

    def __call__(self, rows: Array, rng: np.random.Generator) -> tuple[Array, IntArray]:
        s, n = self.settings, len(rows)
        flat = rows.reshape(n, -1).astype(np.float64)
        other = rng.permutation(n)
        blend = rng.random(n) < s.mix
        weight = np.where(blend, rng.random(n), 1.0)[:, None]
        moved = weight * flat + (1 - weight) * flat[other]
        moved += rng.uniform(0, s.noise, (n, 1)) * self.spread * rng.standard_normal(flat.shape)
        moved = np.clip(moved, self.low, self.high)
        taken = np.where(rng.random(flat.shape) < np.where(blend[:, None], 1 - weight, 0.05), flat[other], flat)
        changed = np.where(self.codes, taken, moved).reshape(rows.shape)
        if rows.dtype.kind in "iu":
            changed = np.rint(changed)
        return changed.astype(rows.dtype), np.where(blend, other, -1)


class _Pictures:
    """Images: rotated, scaled, shifted, blended, with noise; beyond the border, pixels are repeated."""

    def __init__(self, rows: Array, settings: Augmentation) -> None:
        self.settings = settings
        self.low, self.high = float(rows.min()), float(rows.max())
        self.spread = float(rows.astype(np.float32).std())
        layout = image_layout((None, *rows.shape[1:]))
        self.channels_last = layout is not None and layout.channels_last

    def __call__(self, rows: Array, rng: np.random.Generator) -> tuple[Array, IntArray]:
        s, n = self.settings, len(rows)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        x = torch.from_numpy(np.ascontiguousarray(rows)).float()
        x = x.unsqueeze(1) if rows.ndim == 3 else x
        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        y = _move(x, generator, s)
        blend = torch.rand(n, generator=generator) < s.mix
        other = torch.randperm(n, generator=generator)
        weight = torch.where(blend, torch.rand(n, generator=generator), torch.ones(n)).reshape(-1, 1, 1, 1)
        y = weight * y + (1 - weight) * y[other]
        strength = torch.rand(weight.shape, generator=generator) * s.noise
        y = (y + strength * self.spread * torch.randn(y.shape, generator=generator)).clamp(self.low, self.high)
        y = y.permute(0, 2, 3, 1) if self.channels_last else y
        out = (y.squeeze(1) if rows.ndim == 3 else y).numpy()
        changed = (np.rint(out) if rows.dtype.kind in "iu" else out).astype(rows.dtype)
        return changed, np.where(blend.numpy(), other.numpy(), -1)


def _move(x: torch.Tensor, generator: torch.Generator, settings: Augmentation) -> torch.Tensor:
    """Rotate, scale and shift each image (N, C, H, W) at random; beyond the border, its pixels are repeated."""
    n = len(x)

    def draw(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    angle = draw(n) * math.radians(settings.degrees)
    size = 1 + draw(n) * settings.scale
    shift = 2 * draw(n, 2) * settings.shift
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0) if settings.flip else torch.ones(n)
    cos, sin = size * angle.cos(), size * angle.sin()
    rows = [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
