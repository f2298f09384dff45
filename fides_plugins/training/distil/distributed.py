"""`fides fit` on several workers: data-parallel distillation, checkpoints, and going on after a kill.

Every worker runs the same `fit_service` with a `Worker`: the first one asks the service and later writes
the bundle, and in between all train one student together with torch's DistributedDataParallel, each on its
share of every batch. The batches are the same as with one worker, and so is the result, up to rounding and
to batch norms, whose statistics each worker takes from its own share.

Workers come from torchrun (`torchrun --nproc-per-node 2 -m fides_plugins.cli fit ...`, or `fides fit
--engine torchrun`, which calls it) or from Ray Train (`fides fit --engine ray`). Both start all workers
again when one dies; each finished epoch is then read from the checkpoint.
"""

from __future__ import annotations

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
from torch import distributed
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from fides_plugins.errors import SettingsError, TrainingError
from fides_plugins.training.distil.workers import TIMEOUT, Worker, meet

logger = logging.getLogger("fides_plugins")

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


@contextmanager
def member(checkpoints: Path | None = None) -> Iterator[Worker]:
    """This process as one of torchrun's workers, or as the only one where torchrun did not start it."""
    together = is_member() and not distributed.is_initialized()
    store = _connect() if together else None
    try:
        yield Worker(checkpoints, store)
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
        meet(place, "begin", world)
        try:
            distributed.init_process_group("gloo", store=place, rank=rank, world_size=world, timeout=CONNECT_TIMEOUT)
            place.add("connected", 1)
        except RuntimeError as error:
            logger.warning("worker %d: try %d to connect failed: %s", rank, attempt, str(error).splitlines()[0])
        meet(place, "end", world)
        connected = place.add("connected", 0)
        if connected == world:
            distributed.distributed_c10d._set_pg_timeout(STEP_TIMEOUT)
            return PrefixStore("fides/meetings", store)
        if connected:
            break  # torch names groups by their number in a process, which now differs: only a restart helps
    raise TrainingError("The workers cannot reach each other.", "Check the network between them.")


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
    fit: Callable[[Worker], Mapping[str, Any]], workers: int, checkpoints: Path, address: str = ""
) -> dict[str, Any]:
    """Call `fit` on Ray Train workers.

    Parameters
    ----------
    fit:
        Called in every worker with its `Worker`; what the first one gives (JSON values) is the result.
    checkpoints:
        As for `Worker`; Ray's own files go into a folder `ray` inside.
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
        who = Worker(checkpoints)
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
