"""`fides fit` on several workers: data-parallel distillation, checkpoints, and going on after a kill.

Every worker runs the same `fit_service` with a `Member`: the first one asks the service and later writes
the bundle, and in between all train one student together with torch's DistributedDataParallel, each on its
share of every batch. The batches are the same as with one worker, and so is the result, up to rounding and
to batch norms, whose statistics each worker takes from its own share.

Workers come from torchrun (`torchrun --nproc-per-node 2 -m fides_plugins.cli fit ...`, or `fides fit
--engine torchrun`, which calls it) or from Ray Train (`fides fit --engine ray`). Both start all workers
again when one dies; each finished epoch is then read from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fides_plugins.errors import SettingsError, TrainingError
from fides_plugins.training.distil.distillation import Alone, Session

logger = logging.getLogger("fides_plugins")

#: A worker may wait for the first one while it asks the service, which can take hours.
TIMEOUT = timedelta(hours=24)
#: Within a step all workers do the same work, so that they do not wait long for each other.
STEP_TIMEOUT = timedelta(minutes=10)
#: gloo's first connection can be refused or lost on a machine under load; the other side then waits this long.
CONNECT_TIMEOUT = timedelta(seconds=10)
CONNECT_TRIES = 8
#: Times that all workers are started again after one of them died.
MAX_RESTARTS = 5
#: Set by torchrun for its workers.
MEMBER_VARIABLE = "TORCHELASTIC_RUN_ID"
#: Tells torchrun to give its workers a new store after a restart, without the addresses of the dead.
FRESH_STORE_VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class Member(Alone):
    """One of several workers, or a single one that keeps checkpoints.

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

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The other workers wait until the first one has left the block."""
        if not self.first:
            self._barrier()
        yield
        if self.first:
            self._barrier()

    def agree(self, value: Any) -> Any:
        """The first worker's value."""
        if self.world == 1:
            return value
        self._barrier()
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def begin(self, session: Session) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
        """Resume from this call's checkpoint, if there is one, and wrap the module.

        Raises
        ------
        TrainingError
            If the batches are too small to be shared.
        """
        self._calls += 1
        # The initial weights belong to the identity: with other weights, it is another call.
        self._identity = _digest(*session.identity, *session.module.state_dict().values())
        # One worker looks, so that all begin at the same epoch.
        path = self._path()
        about = _about(path) if path is not None else {}
        epoch = self.agree(int(about["epoch"]) if about.get("identity") == self._identity else 0)
        if epoch and path is not None:
            _load(path, session)
        if self.world == 1:
            return session.module, epoch
        wrapped = DistributedDataParallel(session.module, find_unused_parameters=True)
        return wrapped, epoch

    def seed(self, seed: int, epoch: int) -> int:
        """Dropout differs between workers; the first one's is that of a worker alone."""
        return super().seed(seed, epoch) + 1_000_003 * self.rank

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """Every `world`-th row of the batch; all workers have the rows in the same order."""
        if len(rows) < 2 * self.world:
            raise TrainingError(
                f"A batch of {len(rows)} rows is too small for {self.world} workers.", "Use fewer workers."
            )
        # Equal shares: the mean over workers of their means is then the mean over the rows.
        return rows[: len(rows) // self.world * self.world][self.rank :: self.world]

    def after_epoch(self, session: Session, done: int) -> None:
        """Write a checkpoint."""
        path = self._path()
        if path is None:
            return
        if self.first:
            _save(path, session, self._identity, done)
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
        _meet(self._store, str(self._meetings), self.world)


@contextmanager
def member(checkpoints: Path | None = None) -> Iterator[Member]:
    """This process as one of torchrun's workers, or as the only one where torchrun did not start it."""
    together = is_member() and not distributed.is_initialized()
    store = _connect() if together else None
    try:
        yield Member(checkpoints, store)
    finally:
        if together:
            distributed.destroy_process_group()


def _connect() -> Any:
    """Open the process group of torchrun's workers; the store they meet in.

    Raises
    ------
    TrainingError
        If the workers cannot reach each other.
    """
    store, rank, world = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun's workers share a store that outlives a restart, and gloo would connect to the addresses of the
        # dead. (Over several machines the number differs between them; `run_torchrun` and the docs do it otherwise.)
        store = PrefixStore(f"fides/round-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    for attempt in range(CONNECT_TRIES):
        # A prefix of its own: addresses of a failed try must not be taken for those of this one.
        place = PrefixStore(f"fides/try-{attempt}", store)
        _meet(place, "begin", world)
        try:
            distributed.init_process_group("gloo", store=place, rank=rank, world_size=world, timeout=CONNECT_TIMEOUT)
            place.add("connected", 1)
        except RuntimeError as error:
            logger.warning("worker %d: try %d to connect failed: %s", rank, attempt, str(error).splitlines()[0])
        _meet(place, "end", world)
        connected = place.add("connected", 0)
        if connected == world:
            distributed.distributed_c10d._set_pg_timeout(STEP_TIMEOUT)
            return PrefixStore("fides/meetings", store)
        if connected:
            break  # torch names groups by their number in a process, which now differs: only a restart helps
    raise TrainingError("The workers cannot reach each other.", "Check the network between them.")


def _meet(store: Any, name: str, world: int) -> None:
    """Wait in the store until all workers are here."""
    if store.add(name, 1) == world:
        store.set(f"{name}/all", "here")
    store.wait([f"{name}/all"], TIMEOUT)


def is_member() -> bool:
    """Whether torchrun started this process."""
    return MEMBER_VARIABLE in os.environ


def run_torchrun(arguments: Sequence[str], workers: int) -> int:
    """Run the command `fides` with these arguments on `workers` processes of this machine; its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += [f"--max-restarts={MAX_RESTARTS}", "-m", "fides_plugins.cli", *arguments]
    # One thread each, or workers on one machine take the cores from each other.
    return subprocess.run(
        command, env={"OMP_NUM_THREADS": "1", FRESH_STORE_VARIABLE: "1", **os.environ}, check=False
    ).returncode


def run_ray(
    fit: Callable[[Member], Mapping[str, Any]], workers: int, checkpoints: Path, address: str = ""
) -> dict[str, Any]:
    """Call `fit` on Ray Train workers.

    Parameters
    ----------
    fit:
        Called in every worker with its `Member`; what the first one gives (JSON values) is the result.
    checkpoints:
        As for `Member`; Ray's own files go into a folder `ray` inside.
    address:
        Of a running cluster; empty starts one on this machine.

    Raises
    ------
    SettingsError
        If Ray is not installed.
    TrainingError
        If the workers failed more often than they are started again.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise SettingsError("Ray is not installed.", "Install it with: pip install 'fides-plugins[ray]'") from None
    result = checkpoints / "report.json"

    def loop() -> None:
        torch.set_num_threads(1)
        who = Member(checkpoints)
        report = fit(who)
        if who.first:
            result.write_text(json.dumps(report), encoding="utf-8")

    checkpoints.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    own = not ray.is_initialized()
    if own:
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    try:
        TorchTrainer(
            loop,
            torch_config=TorchConfig(backend="gloo", timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="ray",
                storage_path=str(checkpoints.resolve()),
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            ),
        ).fit()
    # RuntimeError: TrainingFailedError and ControllerError, whose modules differ by release.
    except (ray.exceptions.RayError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainingError(f"The Ray workers failed: {lines[-1] if lines else type(error).__name__}") from None
    finally:
        if own:
            ray.shutdown()
    if not result.is_file():
        raise TrainingError("The first worker's report is not there.", "Put the checkpoints on a shared file system.")
    return dict(json.loads(result.read_text(encoding="utf-8")))


def _digest(*parts: torch.Tensor | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, session: Session, identity: str, epoch: int) -> None:
    """Weights, optimiser and schedule after `epoch` epochs, in one step."""
    tensors = {f"module.{k}": v.detach().clone() for k, v in session.module.state_dict().items()}
    for index, values in session.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone() for k, v in values.items()}
    about = {"identity": identity, "epoch": str(epoch), "steps": str(session.schedule.last_epoch)}
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".tmp")
    save_file(tensors, staging, metadata=about)
    os.replace(staging, path)


def _about(path: Path) -> dict[str, str]:
    """What `_save` wrote about a checkpoint; nothing where there is none, or a damaged one."""
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
