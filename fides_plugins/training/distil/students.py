"""Candidate verification models, and what surrounds them: pre-processing inside the graph, fresh heads.

A student is a network from pre-processed rows to K logits. `VerificationModel` puts the pre-processing in
front of it, so that the exported graph takes the very tensor that the service takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fides_plugins.errors import TrainingError
from fides_plugins.training.costs import Cost, torch_cost
from fides_plugins.training.data import image_layout

#: Images wider than this are down-sampled before the built-in students see them.
LARGEST_SIZE = 64
#: Channels of the first layer (CNN) or units of a layer (MLP) in the built-in family.
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)
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


class VerificationModel(nn.Module):
    """Pre-processing and student in one: the service's tensor to logits (N, K)."""

    def __init__(self, preprocess: Preprocess, network: nn.Module) -> None:
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
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

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


def _conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def small_cnn(channels: int, size: tuple[int, int], width: int, n_classes: int) -> nn.Module:
    """A small convolutional network for images (N, channels, *size).

    Plain 3x3 convolutions, halving the map and doubling the width (up to four times `width`) until the map
    is at most 7 wide, then one weight per place of the map instead of an average, which keeps what little
    spatial information a tiny image has (a global depth-wise convolution, Chen et al. 2018, MobileFaceNets).
    """
    stride = 2 if min(size) > 32 else 1
    layers = _conv(channels, width, stride)
    h, w = (math.ceil(s / stride) for s in size)
    now = width
    first = True
    while first or max(h, w) > 7:
        wider = min(2 * now, 4 * width)
        down = 2 if max(h, w) > 4 else 1
        layers += _conv(now, wider, down) + _conv(wider, wider, 1)
        h, w, now, first = math.ceil(h / down), math.ceil(w / down), wider, False
    layers += [nn.Conv2d(now, now, (h, w), groups=now, bias=False), nn.BatchNorm2d(now), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(now, n_classes))


def small_mlp(features: int, width: int, n_classes: int) -> nn.Module:
    """Two hidden layers of `width` units, for vectors (N, features)."""
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_classes)
    )


def built_in_students(
    images: NDArray[Any], n_classes: int, max_parameters: int | None = None, max_macs: int | None = None
) -> tuple[Student, ...]:
    """Small students within a budget, cheapest first: CNNs for images, MLPs for anything else.

    Parameters
    ----------
    images:
        (N, ...) rows of the service's tensor.
    max_parameters, max_macs:
        The most that a student may cost; None for no limit. Of the students that may have 25%, 50% and 100% of
        `max_parameters`, the largest of each is taken; without that limit, those of the widths 8, 16 and 32.

    Raises
    ------
    TrainingError
        If even the smallest student costs more.
    """
    costs = {student: student.cost(images) for student in _family(images.shape[1:], n_classes)}
    fitting = [student for student, cost in costs.items() if cost.within(max_parameters, max_macs)]
    if not fitting:
        smallest = min(costs.values(), key=lambda cost: cost.parameters)
        raise TrainingError(
            f"The smallest built-in student has {smallest.parameters} parameters and {smallest.macs} multiply-adds, "
            f"more than the {max_parameters} and {max_macs} allowed.",
            "Allow a larger share of the service's cost, or give a student of your own.",
        )
    if max_parameters is None:
        chosen = [student for student in fitting if student.name.endswith(("-8", "-16", "-32"))]
    else:
        under = [[s for s in fitting if costs[s].parameters <= share * max_parameters] for share in SHARES]
        largest = [max(some, key=lambda s: (costs[s].parameters, costs[s].macs)) for some in under if some]
        chosen = list(dict.fromkeys(largest))
    return tuple(sorted(chosen or fitting[:1], key=lambda s: (costs[s].macs, costs[s].parameters)))


def _family(row_shape: tuple[int, ...], n_classes: int) -> Iterator[Student]:
    layout = image_layout((None, *row_shape))
    if layout is None:
        features = math.prod(row_shape)
        for width in WIDTHS:
            yield Student(f"mlp-{width}", lambda w=width: small_mlp(features, w, n_classes))  # type: ignore[misc]
        return
    h, w = int(layout.height or 0), int(layout.width or 0)
    while max(h, w) > LARGEST_SIZE:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    channels = layout.channels
    for size in {(h, w), (h // 2, w // 2) if min(h, w) >= 16 else (h, w)}:
        for width in (width for width in WIDTHS if width <= 128):
            name = f"cnn-{size[0]}x{size[1]}-{width}"
            yield Student(name, lambda s=size, v=width: small_cnn(channels, s, v, n_classes), size)  # type: ignore[misc]
