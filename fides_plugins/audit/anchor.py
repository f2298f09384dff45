"""Anchors: where a lane's chain ended, kept in another place than the log.

Whoever can write the log's folder can put back an older state of all of it, `HEAD` too, and the log then goes on
from there. An anchor says that a line was there: as JSON lines that the writer appends to a file on another mount,
or as what `fides audit verify --json` printed.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fides_plugins.audit.chain import Head
from fides_plugins.errors import InputError

logger = logging.getLogger("fides_plugins")

#: Lines that must be there, by lane.
Anchors = Mapping[str, Sequence[Head]]


class AnchorFile:
    """A file to which the ends of chains are appended, by any number of processes."""

    def __init__(self, path: str | Path, interval_s: float) -> None:
        self._path, self._interval_s = path, interval_s
        self._last = Head()
        self._due_at = 0.0

    def wait_s(self, head: Head) -> float | None:
        """Seconds until `head` is due; None where it was written."""
        return None if head == self._last else max(0.0, self._due_at - time.monotonic())

    def write(self, lane: str, head: Head, moment: str) -> None:
        """Append one anchor; one that cannot be written is said and tried again after the interval."""
        self._due_at = time.monotonic() + self._interval_s
        line = json.dumps({"lane": lane, "seq": head.seq, "hash": head.hash, "time": moment}) + "\n"
        try:
            fd = self.open()
            try:
                # One write: lines of several processes do not mix.
                os.write(fd, line.encode())
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            logger.error("the audit log's anchor cannot be written: %s", error.strerror)
        else:
            self._last = head

    def open(self) -> int:
        """A descriptor for appending; raises `OSError` where the file cannot be written."""
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def read_anchors(path: str | Path) -> dict[str, list[Head]]:
    """Heads from the file that `anchor_file` names, or from what `fides audit verify --json` printed.

    Raises
    ------
    InputError
        If the file is neither, or holds no anchor.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"The anchor file cannot be read: {error.strerror}.") from None
    except ValueError:
        text = ""
    found: dict[str, list[Head]] = {}
    try:
        for lane, entry in _entries(text):
            found.setdefault(lane, []).append(Head(int(entry["seq"]), str(entry["hash"])))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = {}
    if not found:
        raise InputError(
            "The anchor file holds no anchors.",
            "Pass the file of the option `anchor_file`, or the output of `fides audit verify --json`.",
        )
    return found


def _entries(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Lane and head of each anchor; a last line without an end was cut off by a power failure."""
    try:
        return list(json.loads(text)["heads"].items())
    except (ValueError, KeyError):
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        return [(line["lane"], line) for line in lines]
