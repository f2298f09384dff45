"""Distillation: a transfer set that the teacher has answered, and the training of a student on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fides_plugins.training.distil.workers import Session, Worker
from fides_plugins.types import Float32Array, IntArray

#: Called as work goes on, with the share done in [0, 1].
Share = Callable[[float], None]


def silent(done: float) -> None:
    """Report no progress."""


#: Temperatures that are tried, the published one first (Kumar et al. 2024), and the mean top probability wanted.
TEMPERATURES = (5.0, 4.0, 3.0, 2.0, 1.5, 1.0)
NAMED = 0.3


@dataclass(frozen=True)
class DistillationSettings:
    """How a student is trained.

    Attributes
    ----------
    temperature, alpha, beta:
        The loss is `alpha * T^2 * CE(softmax(S / T), softmax(V / T)) + beta * CE(label, V)`
        (Hinton et al. 2015; the values are those of Kumar et al. 2024). Rows without a label have no second term.
    epochs, batch_size, learning_rate, weight_decay:
        For AdamW with a one-cycle learning rate.
    most_macs, fewest_epochs:
        Fewer epochs, but no fewer than these, where all would take more forward multiply-adds.
    fine_tune_learning_rate:
        Highest rate for pre-trained layers.
    """

    temperature: float = 5.0
    alpha: float = 0.8
    beta: float = 0.2
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 4e-3
    fine_tune_learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    most_macs: float = 7e11
    fewest_epochs: int = 8

    def epochs_for(self, macs: int, n_rows: int) -> int:
        """Epochs over so many rows for a student of so many multiply-adds a row."""
        affordable = int(self.most_macs / max(1, macs * n_rows))
        return min(self.epochs, max(self.fewest_epochs, affordable))


@dataclass(frozen=True)
class TransferSet:
    """Rows, the teacher's logits for them, and labels where known (-1: none).

    images (N, ...) in the service's dtype; logits (N, K) float32; labels (N,) int64; origins (N, 2) as `augment` gives
    them.
    """

    images: NDArray[Any]
    logits: Float32Array
    labels: IntArray
    origins: IntArray | None = None

    def without(self, rows: IntArray) -> TransferSet:
        """Only what does not come from these rows, not even in a blend."""
        assert self.origins is not None  # a set that is cross-fitted knows them
        kept = ~np.isin(self.origins, rows).any(axis=1)
        return TransferSet(self.images[kept], self.logits[kept], self.labels[kept], self.origins[kept])

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return len(self.images)


def distillation_temperature(logits: Float32Array) -> float:
    """The highest of `TEMPERATURES` at which the answers still name a class: their mean top probability is `NAMED`.

    Of ten classes, a temperature of 5 shows what else an answer holds besides its class. Of hundreds, it leaves next to
    nothing of the class itself, and a student learns the noise of the others instead.
    """
    some = torch.from_numpy(logits[:4096])
    tops = {t: float(functional.softmax(some / t, dim=1).amax(1).mean()) for t in TEMPERATURES}
    return next((t for t, top in tops.items() if top >= NAMED), TEMPERATURES[-1])


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, settings: DistillationSettings
) -> torch.Tensor:
    """The loss of `DistillationSettings` for logits (N, K), (N, K) and labels (N,), -1 where there is none."""
    t = settings.temperature
    soft = functional.softmax(teacher / t, dim=1)
    loss = settings.alpha * t * t * -(soft * functional.log_softmax(student / t, dim=1)).sum(1).mean()
    if settings.beta and bool((labels >= 0).any()):
        # Averaged over all rows of the batch, so that a few labels weigh little.
        hard = functional.cross_entropy(student, labels, ignore_index=-1, reduction="sum") / len(labels)
        loss = loss + settings.beta * hard
    return loss


def distil(
    module: nn.Module,
    inputs: torch.Tensor,
    transfer: TransferSet,
    settings: DistillationSettings,
    learning_rate: float,
    epochs: int,
    seed: int,
    on_epoch: Share = silent,
    who: Worker | None = None,
) -> None:
    """Train the parameters of `module` that require a gradient, in place; ends in evaluation mode.

    Parameters
    ----------
    module:
        From `inputs` (N, ...) to logits (N, K).
    inputs:
        The rows of `transfer` as `module` takes them.
    on_epoch:
        Called after each epoch with the share done.
    who:
        This process as one of several workers; alone by default.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    logits, labels = torch.from_numpy(transfer.logits), torch.from_numpy(transfer.labels)
    n, size = len(inputs), min(settings.batch_size, len(inputs))
    # A last batch of one row would break batch norm; dropping the remainder is harmless over shuffled epochs.
    per_epoch = max(1, n // size)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
    # With fewer steps the schedule would have no rise.
    steps = max(6, per_epoch * epochs + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    options = str((settings, learning_rate, epochs, seed))
    session = Session(module, optimizer, schedule, options, (inputs, logits, labels))
    who = who or Worker()
    forward, begin = who.begin(session)
    training_mode(module)
    with torch.random.fork_rng(devices=[]):
        for epoch in range(epochs):
            order = torch.randperm(n, generator=generator)
            if epoch < begin:
                continue  # a checkpoint holds it; only the order of rows goes on from there
            torch.manual_seed(who.seed(seed, epoch))  # dropout draws from the global generator
            for start in range(0, per_epoch * size, size):
                rows = who.share(order[start : start + size])
                loss = distillation_loss(forward(inputs[rows]), logits[rows], labels[rows], settings)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            who.after_epoch(session, epoch + 1)
            on_epoch((epoch + 1) / epochs)
    who.end(session)
    module.eval()


def is_batch_norm(module: nn.Module) -> bool:
    """True for every kind of batch normalisation, scripted ones included."""
    name = getattr(module, "original_name", type(module).__name__)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in str(name)


def training_mode(module: nn.Module) -> None:
    """Training mode, except for batch norms without a trainable weight: these stay frozen."""
    module.train()
    for part in module.modules():
        if is_batch_norm(part) and not any(p.requires_grad for p in part.parameters(recurse=False)):
            part.eval()


def predict(module: nn.Module, images: NDArray[Any], batch_size: int = 512) -> Float32Array:
    """Logits (N, K) float32 of a module in evaluation mode."""
    module.eval()
    with torch.no_grad():
        parts = [
            module(torch.from_numpy(np.ascontiguousarray(images[i : i + batch_size]))).numpy()
            for i in range(0, len(images), batch_size)
        ]
    logits: Float32Array = np.concatenate(parts).astype(np.float32)
    return logits


def agreement(first: Float32Array, second: Float32Array) -> float:
    """Share of rows with the same top class; both (N, K)."""
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())
