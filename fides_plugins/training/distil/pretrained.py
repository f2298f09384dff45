"""Students that were trained for something else: their backbone is kept, and a fresh head goes on top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fides_plugins.errors import TrainingError
from fides_plugins.training.data import image_layout
from fides_plugins.training.distil.students import Student
from fides_plugins.training.service.torch_modules import load_factory, load_torchscript, load_weights


class GlobalPool(nn.Module):
    """Maps (N, F, h, w) to their means (N, F); features (N, F) stay as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F, ...) to (N, F)."""
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class PretrainedNetwork(nn.Module):
    """A pre-trained backbone under a fresh head: global pool, batch norm, dropout 0.2, linear.

    Parameters
    ----------
    backbone:
        Gives features (N, F) or maps (N, F, h, w).
    n_features:
        F.
    """

    def __init__(self, backbone: nn.Module, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = GlobalPool()
        self.head = nn.Sequential(nn.BatchNorm1d(n_features), nn.Dropout(0.2), nn.Linear(n_features, n_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        logits: torch.Tensor = self.head(self.pool(self.backbone(x)))
        return logits


def pretrained_student(
    spec: str,
    images: NDArray[Any],
    n_classes: int,
    *,
    weights: str | Path | None = None,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    from_scratch: bool = False,
) -> Student:
    """A student from a network that somebody brings: a pre-trained one under a fresh head, or one to train as a whole.

    Parameters
    ----------
    spec:
        `package.module:factory` of a torch module (its last linear layer is cut off), or a TorchScript file
        (kept whole: the head goes on top of its output).
    images:
        (N, ...) rows of the service's tensor.
    weights:
        A ``.safetensors`` state dict for the factory's module.
    size, channels, mean, std:
        What the network was trained with, see `Student`.
    from_scratch:
        The network gives K logits itself, and all of it is trained. Whole numbers that are not pictures reach it as
        they come.

    Raises
    ------
    TrainingError
        If the network cannot be loaded, or does not run on the images.
    """
    path = Path(spec)

    def load() -> nn.Module:
        if path.suffix in (".pt", ".pth", ".ts", ".torchscript"):
            return load_torchscript(path)
        module = load_factory(spec)
        if weights is not None:
            load_weights(module, Path(weights))
        return module if from_scratch else without_last_linear(module)

    ids = images.dtype.kind in "iu" and image_layout((None, *images.shape[1:])) is None
    dtype = torch.int64 if ids else None
    student = Student(path.stem.partition(":")[2] or path.stem, load, size, channels, mean, std, dtype)
    probe = student.model(images[:2], 0)
    probe.eval()
    try:
        with torch.no_grad():
            y = probe(torch.from_numpy(np.ascontiguousarray(images[:2])))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"The student {spec} does not run on the service's input: {str(error).splitlines()[0]}",
            "State the size and the channels that it takes.",
        ) from error
    n_features = int(y.shape[1])
    if from_scratch:
        if n_features != n_classes:
            raise TrainingError(f"The student {spec} gives {n_features} classes, the service {n_classes}.")
        return student
    return replace(student, build=lambda: PretrainedNetwork(load(), n_features, n_classes))


def without_last_linear(module: nn.Module) -> nn.Module:
    """The module with its last `nn.Linear` replaced by the identity, so that it gives features; in place."""
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    if isinstance(module, nn.Linear) or not names:
        return module
    parent_name, _, child = names[-1].rpartition(".")
    setattr(module.get_submodule(parent_name), child, nn.Identity())
    return module
