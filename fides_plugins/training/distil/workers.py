"""One of the processes that train a student, and the checkpoints they keep."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fides_plugins.errors import TrainingError
from fides_plugins.training.data import array_digest

#: A worker may wait for the first one while it asks the service, which can take hours.
TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Session:
    """One call of `distil`: the state that a checkpoint holds, and the options and rows that identify the call."""

    module: nn.Module
    optimizer: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.OneCycleLR
    options: str
    rows: tuple[torch.Tensor, ...]


class Worker:
    """Who trains: a process alone, or one of several; it keeps checkpoints where it is given a folder.

    Parameters
    ----------
    checkpoints:
        Folder on a file system that all workers see; None keeps none. Each finished epoch is saved.
    store:
        Where workers meet between steps, for as long as it takes; without one they meet in the process group,
        within its time-out.

    Attributes
    ----------
    rank, world:
        This worker's number, and how many there are; taken from the process group where one is open.
    first:
        Whether this process is the one that asks the service and writes the bundle.
    """

    def __init__(self, checkpoints: Path | None = None, store: Any = None) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1
        self.first = self.rank == 0
        self._folder = checkpoints
        self._store = store
        self._calls = 0
        self._meetings = 0

    @classmethod
    def alone(cls) -> Worker:
        """This process by itself, whether or not it is one of several."""
        worker = cls()
        worker.rank, worker.world, worker.first = 0, 1, True
        return worker

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first worker runs the block before the others do."""
        if not self.first:
            self._barrier()
        yield
        if self.first:
            self._barrier()

    def agree(self, value: Any) -> Any:
        """The first worker's value, in every worker."""
        if self.world == 1:
            return value
        self._barrier()
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def begin(self, session: Session) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
        """The function to call for a forward pass, and the epoch to begin with: later than 0 after a checkpoint.

        Raises
        ------
        TrainingError
            If a worker cannot read the checkpoint that the first one reads.
        """
        self._calls += 1
        path, epoch = self._path(), 0
        if path is not None:
            # The initial weights belong to the identity: with other weights, it is another call.
            tensors = (*session.rows, *session.module.state_dict().values())
            self._identity = f"{session.options} {array_digest(*(t.detach().cpu().numpy() for t in tensors))}"
            # One worker looks, so that all begin at the same epoch.
            about = _about(path)
            epoch = self.agree(int(about["epoch"]) if about.get("identity") == self._identity else 0)
            if epoch:
                _load(path, session)
        if self.world == 1:
            return session.module, epoch
        wrapped = DistributedDataParallel(session.module, find_unused_parameters=True)
        return wrapped, epoch

    def seed(self, seed: int, epoch: int) -> int:
        """Of one epoch's dropout, which differs between workers; the first one's is that of a worker alone."""
        return seed + epoch + 1_000_003 * self.rank

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """Every `world`-th row of the batch; all workers have the rows in the same order.

        Raises
        ------
        TrainingError
            If the batch is too small to be shared.
        """
        if self.world > 1 and len(rows) < 2 * self.world:
            raise TrainingError(
                f"A batch of {len(rows)} rows is too small for {self.world} workers.", "Use fewer workers."
            )
        # Equal shares: the mean over workers of their means is then the mean over the rows.
        return rows[: len(rows) // self.world * self.world][self.rank :: self.world]

    def after_epoch(self, session: Session, done: int) -> None:
        """Write weights, optimiser and schedule as they are after `done` epochs, in one step."""
        path = self._path()
        if path is None:
            return
        if self.first:
            tensors = {f"module.{k}": v.detach().clone() for k, v in session.module.state_dict().items()}
            for index, values in session.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone() for k, v in values.items()}
            about = {"identity": self._identity, "epoch": str(done), "steps": str(session.schedule.last_epoch)}
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = path.with_suffix(".tmp")
            save_file(tensors, staging, metadata=about)
            os.replace(staging, path)
        self._barrier()

    def end(self, session: Session) -> None:
        """The first worker's weights and batch-norm statistics, everywhere."""
        if self.world > 1:
            for tensor in session.module.state_dict().values():
                distributed.broadcast(tensor, src=0)

    def _path(self) -> Path | None:
        return None if self._folder is None else self._folder / f"distillation-{self._calls:03d}.safetensors"

    def _barrier(self) -> None:
        if self.world == 1:
            return
        if self._store is None:
            distributed.barrier()
            return
        self._meetings += 1
        meet(self._store, str(self._meetings), self.world)


def meet(store: Any, name: str, world: int) -> None:
    """Wait in the store until all workers are here."""
    if store.add(name, 1) == world:
        store.set(f"{name}/all", "here")
    store.wait([f"{name}/all"], TIMEOUT)


def _about(path: Path) -> dict[str, str]:
    """What `Worker.after_epoch` wrote about a checkpoint; nothing where there is none, or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _load(path: Path, session: Session) -> None:
    """Put a checkpoint back.

    Raises
    ------
    TrainingError
        If this worker does not see the file that the first one sees.
    """
    about = _about(path)
    if not about:
        raise TrainingError(
            f"The checkpoint {path.name} cannot be read by every worker.", "Put checkpoints on a shared file system."
        )
    module: dict[str, torch.Tensor] = {}
    state: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            kind, _, rest = key.partition(".")
            if kind == "module":
                module[rest] = file.get_tensor(key)
            else:
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
    session.module.load_state_dict(module)
    session.optimizer.load_state_dict({**session.optimizer.state_dict(), "state": state})
    # The schedule follows from its place alone: the step to where it was sets the optimiser's rate and momentum.
    steps = int(about["steps"])
    session.schedule.load_state_dict({"last_epoch": steps - 1, "_step_count": steps})
    session.schedule.step()
