"""Candidate verification models, and what surrounds them: pre-processing inside the graph, fresh heads.

A student is a network from pre-processed rows to K logits. `VerificationModel` puts the pre-processing in
front of it, so that the exported graph takes the very tensor that the service takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fides_plugins.errors import TrainingError
from fides_plugins.training.costs import Cost, torch_cost
from fides_plugins.training.data import image_layout
from fides_plugins.training.distil.networks import (
    ColumnEncoding,
    SequenceNetwork,
    WaveformNetwork,
    small_cnn,
    small_mlp,
)
from fides_plugins.training.kinds import Kind, input_kind

#: Images wider than this are down-sampled before the built-in students see them.
LARGEST_SIZE = 64
#: Channels of the first layer (CNN) or units of a layer (MLP) in the built-in family.
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)
#: Vectors of more columns are no table; a column of a table is cut into pieces at its quantiles.
MOST_COLUMNS = 40
PIECES = 8
#: Entries of an embedding; larger ids share the last.
MOST_SYMBOLS = 8192
#: Shares of the parameters that may be spent, one built-in student for each.
SHARES = (0.25, 0.5, 1.0)


class Preprocess(nn.Module):
    """Turns the service's tensor into what a student takes: cast, channels first, resize, normalise.

    Parameters
    ----------
    row_shape:
        Shape of one row of the service's tensor.
    size:
        (height, width) for the student, None to keep the size. Not used for vectors.
    channels:
        Channels that the student takes; one channel is repeated, several are averaged to one. None to keep.
    mean, std:
        One number per channel (images) or per feature (vectors), applied after everything else.
    """

    def __init__(
        self,
        row_shape: tuple[int, ...],
        mean: NDArray[np.float32],
        std: NDArray[np.float32],
        size: tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        layout = image_layout((None, *row_shape))
        self.layout = layout
        self.size = None if layout is None or size == (layout.height, layout.width) else size
        self.channels = channels
        shape = (1, -1, 1, 1) if layout is not None else (1, -1)
        self.register_buffer("mean", torch.from_numpy(mean.astype(np.float32)).reshape(shape))
        self.register_buffer("std", torch.from_numpy(std.astype(np.float32)).reshape(shape))

    def resize(self, x: torch.Tensor) -> torch.Tensor:
        """Everything but the normalisation: (N, ...) of any dtype to (N, C, h, w) or (N, F) float32."""
        x = x.to(torch.float32)
        if self.layout is None:
            return x.flatten(1)
        if x.dim() == 3:
            x = x.unsqueeze(1)
        if self.layout.channels_last:
            x = x.permute(0, 3, 1, 2)
        if self.channels == 1 and x.shape[1] > 1:
            x = x.mean(1, keepdim=True)
        if self.size is not None:
            (h, w), (sh, sw) = self.size, x.shape[2:]
            if sh % h == 0 and sw % w == 0:
                # Averaging whole blocks: no aliasing, and the cheapest node in a graph.
                x = nn.functional.avg_pool2d(x, (sh // h, sw // w))
            else:
                x = nn.functional.interpolate(x, self.size, mode="bilinear", align_corners=False)
        if self.channels is not None and self.channels > x.shape[1]:
            x = x.repeat(1, self.channels, 1, 1)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) in the service's dtype to normalised float32."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (self.resize(x) - mean) / std


class AsTheyCame(nn.Module):
    """The service's tensor (N, ...) as rows (N, L) of one dtype, for networks that make their own of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (N, L)."""
        return x.to(self.dtype).flatten(1)


class VerificationModel(nn.Module):
    """Pre-processing and student in one: the service's tensor to logits (N, K)."""

    def __init__(self, preprocess: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) float32 for the service's tensor (N, ...)."""
        logits: torch.Tensor = self.network(self.preprocess(x))
        return logits


@dataclass(frozen=True)
class Student:
    """One candidate.

    Attributes
    ----------
    name:
        For tables.
    build:
        Makes the network: pre-processed rows to K logits. Its random numbers come from torch's generator.
    size, channels:
        What the network takes, see `Preprocess`.
    mean, std:
        The normalisation that a pre-trained network was trained with, one number per channel; None to
        measure it on the data.
    dtype:
        Give the network the rows as they came, flat and in this dtype; None: normalised, see `Preprocess`.
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: torch.dtype | None = None

    def model(self, images: NDArray[Any], seed: int) -> VerificationModel:
        """The whole verification model, untrained but for pre-trained layers.

        Parameters
        ----------
        images:
            (N, ...) rows to measure the normalisation on, where the student brings none.
        seed:
            For the initial weights.
        """
        row_shape = images.shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build()
        if self.dtype is not None:
            return VerificationModel(AsTheyCame(self.dtype), network)
        one = np.ones(1, np.float32)
        blank = Preprocess(row_shape, 0 * one, one, self.size, self.channels)
        if self.mean is not None and self.std is not None:
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        else:
            with torch.no_grad():
                x = blank.resize(torch.from_numpy(np.ascontiguousarray(images[:4096]))).double()
            axes = (0, 2, 3) if x.dim() == 4 else (0,)
            mean, std = x.mean(axes).numpy(), x.std(axes).numpy()
            # A feature that never moved carries nothing; dividing by its spread would blow up the first that does.
            std = np.where(std > 1e-6 * max(1.0, float(np.abs(mean).max())), std, 1.0)
        return VerificationModel(Preprocess(row_shape, mean, std, self.size, self.channels), network)

    def cost(self, images: NDArray[Any]) -> Cost:
        """Parameters and multiply-adds for one row of these images."""
        return torch_cost(self.model(images[:2], 0), images)


def built_in_students(
    rows: NDArray[Any],
    n_classes: int,
    max_parameters: int | None = None,
    max_macs: int | None = None,
    kind: Kind | None = None,
) -> tuple[Student, ...]:
    """Small students for a kind of input within a budget, cheapest first.

    Parameters
    ----------
    rows:
        (N, ...) rows of the service's tensor.
    max_parameters, max_macs:
        The most that a student may cost; None for no limit. Of the students that may have 25%, 50% and 100% of
        `max_parameters`, the largest of each is taken; without that limit, those of the widths 8, 16 and 32.
    kind:
        Of the rows; found from them by default.

    Raises
    ------
    TrainingError
        If even the smallest student costs more.
    """
    costs: dict[Student, Cost] = {}
    chosen: list[Student] = []
    for family in _FAMILIES[kind or input_kind(rows)]:
        priced = {student: student.cost(rows) for student in family(rows, n_classes)}
        fitting = {s: cost for s, cost in priced.items() if cost.within(max_parameters, max_macs)}
        costs |= priced
        if max_parameters is None:
            chosen += [s for s in fitting if s.name.endswith(("-8", "-16", "-32"))] or list(fitting)[:1]
        else:
            under = [[s for s in fitting if costs[s].parameters <= share * max_parameters] for share in SHARES]
            chosen += [max(some, key=lambda s: (costs[s].parameters, costs[s].macs)) for some in under if some]
    if not chosen:
        smallest = min(costs.values(), key=lambda cost: cost.parameters)
        raise TrainingError(
            f"The smallest built-in student has {smallest.parameters} parameters and {smallest.macs} multiply-adds, "
            f"more than the {max_parameters} and {max_macs} allowed.",
            "Allow a larger share of the service's cost, or give a student of your own.",
        )
    return tuple(sorted(dict.fromkeys(chosen), key=lambda s: (costs[s].macs, costs[s].parameters)))


def _for_images(rows: NDArray[Any], n_classes: int) -> Iterator[Student]:
    layout = image_layout((None, *rows.shape[1:]))
    assert layout is not None  # what makes them images
    h, w = int(layout.height or 0), int(layout.width or 0)
    while max(h, w) > LARGEST_SIZE:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    for size in {(h, w), (h // 2, w // 2) if min(h, w) >= 16 else (h, w)}:
        for width in (width for width in WIDTHS if width <= 128):
            build = partial(small_cnn, layout.channels, size, width, n_classes)
            yield Student(f"cnn-{size[0]}x{size[1]}-{width}", build, size)


def _for_vectors(rows: NDArray[Any], n_classes: int) -> Iterator[Student]:
    for width in WIDTHS:
        yield Student(f"mlp-{width}", partial(small_mlp, rows[0].size, width, n_classes))


def _for_tables(rows: NDArray[Any], n_classes: int) -> Iterator[Student]:
    flat = rows.reshape(len(rows), -1)
    if flat.shape[1] > MOST_COLUMNS:
        return
    edges = torch.from_numpy(_edges(flat, PIECES))
    # Narrower ones spend all they may on the encoding.
    for width in (width for width in WIDTHS if width >= 8):
        build = partial(_encoded_mlp, edges, width, n_classes)
        yield Student(f"mlp-quantiles-{width}", build, dtype=torch.float32)


def _for_sequences(rows: NDArray[Any], n_classes: int) -> Iterator[Student]:
    # Ids that never came count as the last one that did.
    symbols = min(int(rows.max()) + 1, MOST_SYMBOLS)
    for width in WIDTHS:
        build = partial(SequenceNetwork, symbols, rows[0].size, width, n_classes)
        yield Student(f"conv1d-{width}", build, dtype=torch.int64)


def _for_audio(rows: NDArray[Any], n_classes: int) -> Iterator[Student]:
    for width in WIDTHS:
        build = partial(WaveformNetwork, rows[0].size, width, n_classes)
        yield Student(f"waveform-{width}", build, dtype=torch.float32)


#: Of each kind; students of all of them are tried.
_FAMILIES: dict[Kind, tuple[Callable[[NDArray[Any], int], Iterator[Student]], ...]] = {
    "image": (_for_images,),
    "vector": (_for_tables, _for_vectors),
    "tokens": (_for_sequences,),
    "bytes": (_for_sequences,),
    "audio": (_for_audio,),
}


def _encoded_mlp(edges: torch.Tensor, width: int, n_classes: int) -> nn.Module:
    encoding = ColumnEncoding(edges)
    features = edges.shape[0] * edges.shape[1]
    return nn.Sequential(encoding, small_mlp(features, width, n_classes))


def _edges(rows: NDArray[Any], pieces: int) -> NDArray[np.float32]:
    """(F, pieces + 1) quantiles of each column, strictly rising: where its values are fewer, the rest lies above."""
    columns = []
    for column in rows[:20_000].astype(np.float64).T:
        known = column[np.isfinite(column)]
        found = np.unique(np.quantile(known, np.linspace(0, 1, pieces + 1))) if len(known) else np.zeros(1)
        step = max(1.0, abs(float(found[-1])))
        beyond = found[-1] + step * np.arange(1, pieces + 2 - len(found))
        columns.append(np.concatenate([found, beyond]))
    return np.array(columns, np.float32)
