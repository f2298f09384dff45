"""The built-in family of students: small networks for each kind of input."""

from __future__ import annotations

import math

import torch
from torch import nn


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


class SequenceNetwork(nn.Module):
    """For sequences of ids (N, L): an embedding, two convolutions, and what stood out where.

    The first convolution moves in strides, so that long sequences stay cheap. Each channel's maximum over `parts` equal
    parts of the sequence keeps roughly where something stood, its mean how often.

    Parameters
    ----------
    symbols:
        Ids are 0 to `symbols` - 1; larger ones count as the last.
    length:
        L.
    """

    def __init__(self, symbols: int, length: int, width: int, n_classes: int, parts: int = 2) -> None:
        super().__init__()
        stride = max(1, min(8, length // 64))
        kernel = max(3, min(2 * stride, length))
        self.symbols = symbols
        self.embedding = nn.Embedding(symbols, max(6, width // 4))
        self.first = nn.Conv1d(self.embedding.embedding_dim, width, kernel, stride, bias=False)
        self.first_norm = nn.BatchNorm1d(width)
        left = (length - kernel) // stride + 1
        kernel, stride = min(5, left), 2 if left >= 32 else 1
        self.second = nn.Conv1d(width, width, kernel, stride, bias=False)
        self.second_norm = nn.BatchNorm1d(width)
        left = (left - kernel) // stride + 1
        self.parts = parts if left >= 2 * parts else 1
        self.size = left // self.parts
        self.drop = nn.Dropout(0.1)
        self.classify = nn.Linear(width * (self.parts + 1), n_classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) of ids (N, L), int64."""
        x = self.embedding(ids.clamp(0, self.symbols - 1)).transpose(1, 2)
        x = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(self.second_norm(self.second(x)))
        most = x[:, :, : self.size * self.parts].reshape(-1, x.shape[1], self.parts, self.size).amax(3)
        logits: torch.Tensor = self.classify(self.drop(torch.cat([most.flatten(1), x.mean(2)], dim=1)))
        return logits


class WaveformNetwork(nn.Module):
    """For sound (N, L): three strided convolutions over the samples, the loudest and the mean of each channel."""

    def __init__(self, length: int, width: int, n_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for kernel, stride, outputs in ((64, 16, width), (8, 4, 2 * width), (8, 2, 2 * width)):
            size = min(kernel, length)
            layers += [nn.Conv1d(channels, outputs, size, min(stride, size), bias=False)]
            layers += [nn.BatchNorm1d(outputs), nn.ReLU()]
            length, channels = (length - size) // min(stride, size) + 1, outputs
        self.layers = nn.Sequential(*layers)
        self.classify = nn.Linear(2 * channels, n_classes)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) of samples (N, L)."""
        x = self.layers(samples.unsqueeze(1))
        logits: torch.Tensor = self.classify(torch.cat([x.amax(2), x.mean(2)], dim=1))
        return logits


class ColumnEncoding(nn.Module):
    """Numbers (N, F) by where they lie among the quantiles of their column: (N, F * pieces), each within 0 and 1.

    A column's place is written piece by piece (piecewise linear encoding; Gorishniy et al., "On Embeddings for
    Numerical Features in Tabular Deep Learning", NeurIPS 2022), so heavy tails and codes do no harm. A missing value is
    all zeros and a one in a column of its own.

    Parameters
    ----------
    edges:
        (F, pieces + 1), rising in each row.
    """

    def __init__(self, edges: torch.Tensor) -> None:
        super().__init__()
        # Parameters, because they are numbers that the graph holds; nothing trains them.
        self.low = nn.Parameter(edges[:, :-1].contiguous(), requires_grad=False)
        self.size = nn.Parameter((edges[:, 1:] - edges[:, :-1]).contiguous(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F) to (N, F * (pieces + 1))."""
        missing = torch.isnan(x)
        known = torch.where(missing, torch.zeros_like(x), x)[:, :, None]
        placed = ((known - self.low) / self.size).clamp(0.0, 1.0) * (~missing)[:, :, None]
        return torch.cat([placed, missing[:, :, None].to(x.dtype)], dim=2).flatten(1)
