"""`fides audit run`: plan, judge on one machine or on Ray, and join the parts into one output."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fides_plugins.batch.job import Job, OnRows, judge_here, prepare, write_tables
from fides_plugins.batch.output import Summary
from fides_plugins.batch.records import PART_ROWS
from fides_plugins.errors import InputError, SettingsError
from fides_plugins.settings import Settings


def assemble(job: Job, target: str | Path) -> dict[str, Any]:
    """Join the parts into the output in one step, remove what was partial, and summarise.

    Returns
    -------
    dict
        The summary: `rows`, `statuses`, `judged` and `unjudged` rows, `attacked_share` (of those judged; None
        without any) with its 95 % Wilson interval, `disagreements` (rows whose service label is not the
        verified one), `corrected`, `refused`, and `reasons`.
    """
    summary = Summary()

    def verdicts() -> Iterator[pa.Table]:
        for part in job.recording.parts:
            with pq.ParquetFile(job.part_path(part)) as file:
                for batch in file.iter_batches(job.recording.batch_rows, use_threads=False):
                    table = pa.Table.from_batches([batch])
                    summary.add(table)
                    yield table

    write_tables(Path(target).resolve(), verdicts())
    shutil.rmtree(job.folder)
    return summary.result(job.settings.false_alarm_rate)


def audit_run(
    bundle: str | Path,
    source: str | Path,
    target: str | Path,
    settings: Settings | None = None,
    *,
    engine: str = "local",
    workers: int = 2,
    address: str = "",
    probabilities: bool = True,
    part_rows: int = PART_ROWS,
    on_start: Callable[[int, int], None] = lambda total, done: None,
    on_rows: OnRows = lambda n: None,
) -> dict[str, Any]:
    """Judge a recording and write the verdicts.

    Parameters
    ----------
    engine:
        "local" or "ray".
    workers, address:
        For Ray: number of workers, and the cluster's address (empty: a local one is started).
    on_start, on_rows:
        Told the rows in total and those done by an earlier run; then the rows of each batch.

    Returns
    -------
    dict
        What `assemble` gives, with `seconds`, `resumed_rows` and `rows_per_second` of this run.

    Raises
    ------
    FidesError
        If anything about the recording, the bundle, the settings or the engine cannot be used.
    """
    if engine not in ("local", "ray"):
        raise SettingsError(f"There is no engine {engine!r}.", "Use local or ray.")
    start = time.perf_counter()
    job = prepare(bundle, source, target, settings, probabilities, part_rows)
    with _alone(Path(job.folder)):
        todo = sum(p.rows for p in job.missing())
        total = job.recording.n_rows
        on_start(total, total - todo)
        if engine == "ray":
            from fides_plugins.batch.ray_engine import judge_on_ray

            judge_on_ray(job, workers, address, on_rows)
        else:
            judge_here(job, on_rows)
        judged = time.perf_counter() - start
        summary = assemble(job, target)
    seconds = time.perf_counter() - start
    rate = todo / judged if judged > 0 else 0.0
    return {**summary, "seconds": seconds, "resumed_rows": total - todo, "rows_per_second": rate}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one run at a time may work on an output."""
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("Another run works on this output.", "Wait for it, or choose another output.") from None
        for left in folder.glob("*.tmp"):
            left.unlink()
        yield
