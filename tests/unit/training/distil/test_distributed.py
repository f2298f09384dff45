"""Checkpoints of a single worker: an interrupted distillation goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fides_plugins.errors import TrainingError  # noqa: E402
from fides_plugins.training.distil.distillation import DistillationSettings, TransferSet, distil  # noqa: E402
from fides_plugins.training.distil.workers import Worker  # noqa: E402

SETTINGS = DistillationSettings(epochs=5, batch_size=32)


class Interrupted(Exception):
    """Raised in the middle of a training."""


def transfer(seed: int = 0) -> TransferSet:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(200, 6)).astype(np.float32)
    logits = (rows @ rng.normal(size=(6, 3)) * 2).astype(np.float32)
    return TransferSet(rows, logits, logits.argmax(axis=1).astype(np.int64))


def student(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    parts = torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(0.2)
    return torch.nn.Sequential(*parts, torch.nn.Linear(16, 3))


def train(who: Any, stop_after: int = 0, seed: int = 0, data: TransferSet | None = None) -> tuple[Any, int]:
    """The trained student, and the number of epochs that were run."""
    module, rows, epochs = student(), data or transfer(), [0]

    def on_epoch(share: float) -> None:
        epochs[0] += 1
        if stop_after and epochs[0] == stop_after:
            raise Interrupted

    distil(module, torch.from_numpy(rows.images), rows, SETTINGS, 1e-2, SETTINGS.epochs, seed, on_epoch, who)
    return module, epochs[0]


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_resumed_training_gives_the_same_weights(tmp_path: Path) -> None:
    whole, _ = train(Worker())
    with pytest.raises(Interrupted):
        train(Worker(tmp_path), stop_after=3)
    resumed, epochs = train(Worker(tmp_path))
    assert epochs == 2
    assert equal(whole, resumed)
    finished, epochs = train(Worker(tmp_path))
    assert epochs == 0
    assert equal(whole, finished)


def test_a_checkpoint_of_another_training_is_not_taken_up(tmp_path: Path) -> None:
    train(Worker(tmp_path))
    for other in ({"seed": 1}, {"data": transfer(seed=1)}):
        expected, _ = train(Worker(), **other)
        found, epochs = train(Worker(tmp_path), **other)
        assert epochs == SETTINGS.epochs
        assert equal(expected, found)


def test_a_broken_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    train(Worker(tmp_path))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    _, epochs = train(Worker(tmp_path))
    assert epochs == SETTINGS.epochs


def test_shares_of_a_batch_are_equal_and_disjoint() -> None:
    rows = torch.arange(33)
    shares = []
    for rank in range(4):
        who = Worker()
        who.rank, who.world = rank, 4
        shares.append(who.share(rows).tolist())
    assert {len(s) for s in shares} == {8}
    assert sorted(row for share in shares for row in share) == list(range(32))
    with pytest.raises(TrainingError, match="too small"):
        who.share(torch.arange(7))
