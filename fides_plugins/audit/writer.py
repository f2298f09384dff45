"""Append to one lane, from a thread of its own, so that no disk can hold up an answer.

`LaneWriter.put` never blocks: it queues records up to a bound and counts what does not fit. The thread
seals and writes them. When the disk fails, the lines at hand are counted as lost, the lane is opened
again after a pause, and the loss becomes a line of the chain (`gap`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fides_plugins.audit.anchor import AnchorFile
from fides_plugins.audit.chain import (
    HEAD_NAME,
    LOCK_NAME,
    ChainError,
    Head,
    lane_path,
    make_folder,
    read_lines,
    seal,
    segment_path,
    segments,
    unseal,
)
from fides_plugins.errors import SettingsError
from fides_plugins.settings import Settings

logger = logging.getLogger("fides_plugins")

#: The name under which settings have the options of the plug-in.
NAME = "audit"
#: Seconds until a failing disk is tried again.
RETRY_S = 1.0
#: Seconds that closing waits for the queue to drain.
CLOSE_S = 5.0
#: Lines written at once.
BATCH_LINES = 256
MAX_LANES = 1000

#: One queued entry: makes its records when the writer gets to it, and says how many they are.
Entry = tuple[int, Callable[[], Sequence[Mapping[str, Any]]]]


def timestamp(seconds: float | None = None) -> str:
    """UTC with microseconds, ISO 8601."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, tz=timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


class AuditOptions(BaseModel):
    """Options under `plugins.options.audit`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, description="Folder of the log; made if absent.")
    rotate_bytes: int = Field(64 * 1024 * 1024, ge=4096, description="Size at which a new segment begins, bytes.")
    fsync: Literal["never", "interval", "always"] = Field("interval", description="When the disk is asked to keep it.")
    fsync_interval_s: float = Field(1.0, gt=0, description="Seconds between two requests to the disk.")
    queue_rows: int = Field(10_000, ge=1, description="Rows that may wait; more are dropped and counted.")
    sample: float = Field(1.0, ge=0, le=1, description="Share of trusted rows that are logged; others always are.")
    digest_inputs: bool = Field(True, description="Whether to hash the inputs of logged rows.")
    key_file: str = Field("", description="File with a key: the chain is then an HMAC that only its holder can make.")
    anchor_file: str = Field("", description="File on another mount that gets the end of the chain at an interval.")
    anchor_interval_s: float = Field(60.0, gt=0, description="Seconds between two anchors.")

    @classmethod
    def from_settings(cls, settings: Settings) -> AuditOptions:
        """The plug-in's options.

        Raises
        ------
        SettingsError
            Naming the option at fault.
        """
        try:
            return cls.model_validate(settings.plugins.options.get(NAME, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(("plugins.options", NAME, *(str(p) for p in first["loc"])))
            raise SettingsError(f"Setting {key!r}: {first['msg']}.", "See docs/reference/audit-log.md.") from None


class Lane:
    """The first free lane of a log, opened for appending at its last whole line.

    Raises
    ------
    OSError
        Whatever the file system says.
    """

    def __init__(self, folder: Path, key: bytes | None, rotate_bytes: int) -> None:
        self._key = key
        self._rotate_bytes = rotate_bytes
        self._lock_fd, self._head_fd, self._fd = -1, -1, -1
        try:
            self._take(folder)
            # A chain without HEAD would look like one whose end was cut off; so HEAD comes before any line.
            self._write_head()
            self._fd, self._size = self._open(self.segment)
        except BaseException:
            self.close()
            raise

    def _take(self, folder: Path) -> None:
        """The first lane that nobody holds and that can be continued."""
        for number in range(MAX_LANES):
            self.path = lane_path(folder, number)
            self._lock_fd = _lock(self.path)
            if self._lock_fd < 0:
                continue
            found = segments(self.path)
            self.segment = found[-1][0] if found else 0
            self._head_fd = os.open(self.path / HEAD_NAME, os.O_RDWR | os.O_CREAT, 0o640)
            try:
                self.head = self._recover()
                return
            except ChainError as error:
                logger.error("audit log: %s %s; it is left as it is, see `fides audit verify`", self.path.name, error)
                self.close()
        raise OSError(errno.EMFILE, f"more than {MAX_LANES} processes write this log")

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Seal and append; the records are in the log, not necessarily on the disk, when this returns."""
        head, lines = self.head, []
        for record in records:
            line, head = seal(record, head, self._key)
            lines.append(line)
        data = b"".join(lines)
        written = 0
        while written < len(data):
            written += os.write(self._fd, data[written:])
        self._size += len(data)
        self.head = head
        # After the lines: a kill between the two leaves a chain that is longer than HEAD says, never shorter.
        self._write_head()

    def is_full(self) -> bool:
        """Whether the segment has reached its size."""
        return self._size >= self._rotate_bytes

    def rotate(self) -> None:
        """Begin the next segment."""
        self.sync()
        fd, size = self._open(self.segment + 1)
        os.close(self._fd)
        self._fd, self._size = fd, size
        self.segment += 1

    def sync(self) -> None:
        """Ask the disk to keep what was written."""
        os.fsync(self._fd)
        os.fsync(self._head_fd)

    def close(self) -> None:
        """Give the lane back."""
        for fd in (self._fd, self._head_fd, self._lock_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._fd = self._head_fd = self._lock_fd = -1

    def _write_head(self) -> None:
        os.pwrite(self._head_fd, self.head.to_bytes(self.path.name, self._key), 0)

    def _open(self, number: int) -> tuple[int, int]:
        path = segment_path(self.path, number)
        fresh = not path.exists()
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        if fresh:
            # The new name must outlive a power cut as well as the lines do.
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return fd, os.fstat(fd).st_size

    def _recover(self) -> Head:
        """Where the chain ends: cut off a torn last line, and continue after the last whole one.

        Raises
        ------
        ChainError
            If the end is not the one that HEAD vouches for. The lane is then left as it is: to go on
            would overwrite the evidence.
        """
        found = segments(self.path)
        stored_bytes = os.pread(self._head_fd, 4096, 0)
        if not found and not stored_bytes:
            return Head()
        stored = Head.from_bytes(stored_bytes, self.path.name, self._key)
        suffix = f'"hash":"{stored.hash}"}}'.encode()
        vouched = stored == Head()
        head: Head | None = None
        # HEAD lags by one write at most, so what it names is in one of the last two segments.
        for number, path in reversed(found[-2:]):
            good, last = 0, None
            for data, whole in read_lines(path):
                if whole:
                    good, last = good + len(data) + 1, data
                    vouched = vouched or data.endswith(suffix)
            if number == self.segment and path.stat().st_size > good:
                os.truncate(path, good)
            if last is not None and head is None:
                _, head = unseal(last, self._key)
        if not vouched:
            raise ChainError("does not hold the line that HEAD names")
        return head or Head()


class LaneWriter:
    """A bounded queue and the thread that empties it into a lane.

    Parameters
    ----------
    options:
        Where the log is and how it is written.
    context:
        Fields of the line that begins every segment and every run.
    key:
        Key of a keyed chain.
    """

    def __init__(self, options: AuditOptions, context: Mapping[str, Any], key: bytes | None = None) -> None:
        self._options, self._context, self._key = options, dict(context), key
        self._queue: deque[Entry] = deque()
        self._waiting = 0
        self._wake = threading.Condition()
        self._closing = False
        self._counts: Counter[str] = Counter({"written": 0, "dropped": 0, "failed": 0})
        self._unreported: Counter[str] = Counter()
        self._lane: Lane | None = None
        self._anchors = AnchorFile(options.anchor_file, options.anchor_interval_s) if options.anchor_file else None
        self._context_seq = 0
        self._retry_at = 0.0
        self._synced_at = 0.0
        self._dirty = False
        self._thread = threading.Thread(target=self._run, name="fides-audit", daemon=True)
        self._thread.start()

    @property
    def line_counts(self) -> Mapping[str, int]:
        """Lines written, dropped (queue full) and failed (disk) since start."""
        with self._wake:
            return dict(self._counts)

    def put(self, n_rows: int, make: Callable[[], Sequence[Mapping[str, Any]]]) -> bool:
        """Queue `n_rows` records that `make` will give; False, and counted, when the queue is full."""
        with self._wake:
            if self._closing or self._waiting + n_rows > self._options.queue_rows:
                self._lose("dropped", n_rows)
                return False
            self._queue.append((n_rows, make))
            self._waiting += n_rows
            self._wake.notify()
            return True

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, within `timeout_s` seconds, and give the lane back."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the audit log did not close in %.0f s: %d rows are lost", timeout_s, self._waiting)

    def _lose(self, outcome: str, n_rows: int) -> None:
        if not self._counts[outcome]:
            logger.error("audit log: lines are lost (%s)", {"dropped": "queue full", "failed": "disk"}[outcome])
        self._counts[outcome] += n_rows
        self._unreported[outcome] += n_rows

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    if not self._wake.wait(self._pause_s()):
                        break
                batch = self._take()
                done = self._closing and not batch
            if batch:
                self._write(batch)
            if self._dirty and (done or time.monotonic() - self._synced_at >= self._options.fsync_interval_s):
                self._sync()
            if self._lane is not None and self._anchors is not None:
                wait_s = self._anchors.wait_s(self._lane.head)
                if wait_s == 0 or (done and wait_s is not None):
                    self._anchors.write(self._lane.path.name, self._lane.head, timestamp())
            if done:
                if self._lane is not None:
                    self._lane.close()
                return

    def _pause_s(self) -> float | None:
        """How long to wait for rows: until the disk or an anchor is due."""
        anchor = self._anchors.wait_s(self._lane.head) if self._lane is not None and self._anchors is not None else None
        due = [self._options.fsync_interval_s] if self._dirty else []
        return min([*due, *([] if anchor is None else [anchor])], default=None)

    def _take(self) -> list[Entry]:
        batch: list[Entry] = []
        rows = 0
        while self._queue and rows < BATCH_LINES:
            entry = self._queue.popleft()
            rows += entry[0]
            batch.append(entry)
        return batch

    def _write(self, batch: Sequence[Entry]) -> None:
        rows = sum(n for n, _ in batch)
        written = 0
        try:
            if time.monotonic() < self._retry_at:
                return
            lane = self._open_lane()
            for count, make in batch:
                if lane.is_full():
                    lane.rotate()
                    self._write_context(lane)
                try:
                    lane.write([{**r, "context": self._context_seq} for r in make()])
                except (TypeError, ValueError) as error:
                    # Foreign data that is no JSON: nothing of it was written, and the others go on.
                    logger.error("the audit log cannot take a record: %s", type(error).__name__)
                    continue
                self._dirty = True
                written += count
            if self._options.fsync == "always":
                self._sync()
        except OSError as error:
            self._fail(f"cannot be written: {error.strerror}")
        finally:
            with self._wake:
                self._waiting -= rows
                self._counts["written"] += written
                if rows > written:
                    self._lose("failed", rows - written)

    def _fail(self, text: str) -> None:
        logger.warning("the audit log %s; next try in %.0f s", text, RETRY_S)
        self._retry_at = time.monotonic() + RETRY_S
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def _open_lane(self) -> Lane:
        if self._lane is None:
            lane = Lane(Path(self._options.path), self._key, self._options.rotate_bytes)
            try:
                if lane.is_full():
                    lane.rotate()
                self._write_context(lane)
            except BaseException:
                lane.close()
                raise
            self._lane = lane
        with self._wake:
            lost, self._unreported = self._unreported, Counter()
        if lost:
            try:
                self._lane.write([{"kind": "gap", "time": timestamp(), **dict(sorted(lost.items()))}])
            except BaseException:
                with self._wake:
                    self._unreported.update(lost)
                raise
        return self._lane

    def _write_context(self, lane: Lane) -> None:
        lane.write([{"kind": "context", "time": timestamp(), "segment": lane.segment, **self._context}])
        self._context_seq = lane.head.seq

    def _sync(self) -> None:
        self._dirty = False
        self._synced_at = time.monotonic()
        if self._options.fsync == "never" or self._lane is None:
            return
        try:
            self._lane.sync()
        except OSError as error:
            self._fail(f"cannot be synced: {error.strerror}")


def _lock(lane: Path) -> int:
    """Lock a lane until this process ends, however it ends; -1 where another one holds it."""
    make_folder(lane.parent)
    make_folder(lane)
    fd = os.open(lane / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return -1
        raise
    return fd
