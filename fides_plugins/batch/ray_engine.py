"""`fides audit run --engine ray`: the same parts, judged by Ray Data workers.

Only the places of parts travel through Ray; every worker reads its rows and writes its verdicts itself.
So input, output and bundle must lie where all workers reach them (a shared file system), and the output
is the one that a single machine writes, resumption included.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fides_plugins.batch.job import Job, OnRows, judge_parts, neighbours
from fides_plugins.errors import InputError, SettingsError

#: Tasks per worker: enough that a slow one does not hold up the rest, few enough that reading ahead pays.
TASKS_PER_WORKER = 4


class RayAuditor:
    """Judges the parts that a batch of a Ray dataset names."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Judge parts `first` to `last` of every item; gives back their rows."""
        rows = []
        for first, last in zip(batch["first"], batch["last"], strict=True):
            parts = self._job.recording.parts[int(first) : int(last) + 1]
            judge_parts(self._job, parts)
            rows.append(sum(p.rows for p in parts))
        return {"rows": np.asarray(rows)}


def judge_on_ray(job: Job, workers: int, address: str = "", on_rows: OnRows = lambda n: None) -> None:
    """Judge all missing parts on `workers` Ray workers.

    Raises
    ------
    SettingsError
        If Ray is not installed or its cluster cannot be reached.
    InputError
        If a worker could not judge its parts.
    """
    missing = job.missing()
    if not missing:
        return
    if workers < 1:
        raise SettingsError(f"{workers} workers cannot do anything.", "Use at least one.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError:
        raise SettingsError("Ray is not installed.", "Install it with: pip install 'fides-plugins[ray]'") from None
    own = not ray.is_initialized()
    if own:
        _connect(ray, workers, address)
    try:
        # Rows are reported through `on_rows`; Ray's own bars and banners would mix with a progress display.
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        size = max(1, math.ceil(len(missing) / (workers * TASKS_PER_WORKER)))
        tasks = [{"first": g[0].index, "last": g[-1].index} for g in neighbours(missing, size)]
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            RayAuditor, fn_constructor_args=(job,), batch_size=1, compute=ActorPoolStrategy(size=workers)
        )
        for row in dataset.iter_rows():
            on_rows(int(row["rows"]))
    except ray.exceptions.RayError as error:
        raise InputError(
            f"A Ray worker failed: {_last_line(error)}", "Run it again to go on with what is missing."
        ) from None
    finally:
        if own:
            ray.shutdown()
    left = job.missing()
    if left:
        raise InputError(
            f"{len(left)} of {len(missing)} parts were not written where this machine sees them.",
            "Put the output on a file system that all workers share.",
        )


def _connect(ray: Any, workers: int, address: str) -> None:
    options: Mapping[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(logging_level="ERROR", log_to_driver=False, **options)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"Ray cannot be started or reached: {type(error).__name__}.", "Check the address, or leave it out."
        ) from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
