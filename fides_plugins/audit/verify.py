"""`fides audit verify`: find any line of a log that was removed, moved or altered.

One pass in bounded memory. What a chain cannot show by itself is that an older state of it was put back, `HEAD`
included, or that somebody with write access made it again from the start: against the first, keep anchors
elsewhere (`anchor.py`); against the second, use a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fides_plugins.audit.anchor import Anchors
from fides_plugins.audit.chain import (
    GENESIS,
    HEAD_NAME,
    ChainError,
    Head,
    read_lines,
    require_log,
    segments,
    unseal,
)

#: Findings kept per lane; after that one more says how many there were.
MAX_FINDINGS = 100


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    lane: str
    segment: str
    line: int
    text: str

    def __str__(self) -> str:
        where = f"{self.segment}:{self.line}" if self.line else self.segment
        return f"{self.lane}/{where}: {self.text}"


@dataclass
class LaneReport:
    """What became of one lane."""

    lane: str
    lines: int = 0
    rows: int = 0
    first_seq: int = 0
    seq: int = -1
    hash: str = GENESIS
    statuses: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    first_time: str = ""
    last_time: str = ""
    torn_tail: bool = False
    n_findings: int = 0
    findings: list[Finding] = field(default_factory=list)


@dataclass
class LogReport:
    """The outcome for a log.

    Attributes
    ----------
    lanes:
        Report of each lane.
    missing:
        Findings about lanes that anchors name and that are not there.
    """

    lanes: list[LaneReport]
    missing: list[Finding] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """Everything that is wrong."""
        return [*self.missing, *(f for lane in self.lanes for f in lane.findings)]

    @property
    def ok(self) -> bool:
        """Whether nothing was removed, moved or altered."""
        return not self.findings

    def heads(self) -> dict[str, dict[str, Any]]:
        """Number and hash of each lane's last line: keep them elsewhere, and pass them as anchors later."""
        return {lane.lane: {"seq": lane.seq, "hash": lane.hash} for lane in self.lanes}

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines; `heads` is what `read_anchors` takes."""
        return {
            "ok": self.ok,
            "heads": self.heads(),
            "findings": [str(f) for f in self.findings],
            "lanes": [{k: v for k, v in asdict(lane).items() if k != "findings"} for lane in self.lanes],
        }


def verify_log(
    folder: str | Path,
    key: bytes | None = None,
    anchors: Anchors | None = None,
    archived: bool = False,
    on_segment: Callable[[str], None] | None = None,
) -> LogReport:
    """Check every line of every lane.

    Parameters
    ----------
    folder:
        The log.
    key:
        Key of a keyed chain.
    anchors:
        Lines that must be there, by lane.
    archived:
        Accept that a lane's oldest segments were moved away; the chain is then checked from the first
        segment that is left.
    on_segment:
        Called before each segment with its name, for a progress display.

    Raises
    ------
    InputError
        If there is no log.
    """
    root = Path(folder)
    wanted = dict(anchors or {})
    reports = []
    for lane in require_log(root):
        reports.append(_LaneCheck(lane, key, wanted.pop(lane.name, ()), archived, on_segment).run())
    gone = [name for name, heads in wanted.items() if any(head.seq >= 0 for head in heads)]
    missing = [Finding(name, "", 0, "the whole lane is gone") for name in gone]
    return LogReport(reports, missing)


class _LaneCheck:
    def __init__(
        self,
        lane: Path,
        key: bytes | None,
        anchors: Sequence[Head],
        archived: bool,
        on_segment: Callable[[str], None] | None,
    ) -> None:
        self._lane, self._key, self._anchors, self._archived = lane, key, anchors, archived
        self._on_segment = on_segment or (lambda name: None)
        self._report = LaneReport(lane.name)
        #: What must still be met on the way: number of a line and the hash it must have.
        self._expected: dict[int, str] = {}
        self._resync = False

    def run(self) -> LaneReport:
        report = self._report
        stored = self._read_head()
        for head in (stored, *self._anchors):
            if head is not None and head.seq >= 0 and self._expected.setdefault(head.seq, head.hash) != head.hash:
                self._find("HEAD", 0, f"line {head.seq} is not the one of the anchor")
        found = segments(self._lane)
        self._check_numbers([number for number, _ in found])
        if self._archived and found and found[0][0] > 0:
            self._resync = True
        for index, (_, path) in enumerate(found):
            self._on_segment(f"{self._lane.name}/{path.name}")
            self._segment(path, last=index == len(found) - 1)
        for seq, digest in self._expected.items():
            if seq > report.seq:
                text = f"the chain ends at line {report.seq}, but line {seq} was written: the end was removed"
                self._find("HEAD", 0, text)
            elif seq >= report.first_seq:
                self._find("HEAD", 0, f"line {seq} does not have the hash {digest[:16]}... that was recorded for it")
        report.statuses, report.lost = dict(sorted(report.statuses.items())), dict(sorted(report.lost.items()))
        return report

    def _read_head(self) -> Head | None:
        path = self._lane / HEAD_NAME
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self._find(HEAD_NAME, 0, "the file is gone")
            return None
        if not data and not any(p.stat().st_size for _, p in segments(self._lane)):
            # Killed between making the file and its first write: nothing was logged yet.
            return None
        try:
            return Head.from_bytes(data, self._lane.name, self._key)
        except ChainError as error:
            self._find(HEAD_NAME, 0, str(error))
            return None

    def _check_numbers(self, numbers: list[int]) -> None:
        if numbers and numbers[0] > 0 and not self._archived:
            text = f"segments 0 to {numbers[0] - 1} are gone (if they were archived, say so with --archived)"
            self._find(f"{numbers[0]:08d}.jsonl", 0, text)
        for before, after in pairwise(numbers):
            if after != before + 1:
                self._find(f"{after:08d}.jsonl", 0, f"segments {before + 1} to {after - 1} are gone")

    def _segment(self, path: Path, last: bool) -> None:
        for number, (data, whole) in enumerate(read_lines(path), start=1):
            if not whole:
                # Only a kill in the middle of the newest line leaves a part; the writer cuts it off later.
                if last:
                    self._report.torn_tail = True
                else:
                    self._find(path.name, number, "a line has no end")
                return
            try:
                self._line(*unseal(data, self._key), path.name, number)
            except ChainError as error:
                self._find(path.name, number, f"the line {error}")
                # What follows is compared among itself; this break is reported once.
                self._resync = True

    def _line(self, record: Mapping[str, Any], line: Head, segment: str, number: int) -> None:
        report = self._report
        first = report.lines == 0
        if self._resync:
            if first:
                report.first_seq = line.seq
            elif line.seq != report.seq + 2:
                self._find(segment, number, f"line {line.seq} follows where {report.seq + 2} should be")
        elif line.seq != report.seq + 1:
            what = "removed or moved" if line.seq > report.seq else "repeated or moved"
            self._find(segment, number, f"line {line.seq} follows line {report.seq}: lines were {what}")
        elif record.get("prev") != report.hash:
            self._find(segment, number, f"line {line.seq} does not continue the line before it")
        self._resync = False
        report.lines += 1
        report.seq, report.hash = line.seq, line.hash
        if self._expected.get(line.seq) == line.hash:
            del self._expected[line.seq]
        self._count(record)

    def _count(self, record: Mapping[str, Any]) -> None:
        report = self._report
        moment = str(record.get("time", ""))
        report.first_time = report.first_time or moment
        report.last_time = moment or report.last_time
        if record.get("kind") == "row":
            report.rows += 1
            status = str(record.get("status"))
            report.statuses[status] = report.statuses.get(status, 0) + 1
        elif record.get("kind") == "gap":
            for outcome in ("dropped", "failed"):
                if isinstance(count := record.get(outcome), int):
                    report.lost[outcome] = report.lost.get(outcome, 0) + count

    def _find(self, segment: str, line: int, text: str) -> None:
        report = self._report
        report.n_findings += 1
        if report.n_findings <= MAX_FINDINGS:
            report.findings.append(Finding(report.lane, segment, line, text))
        elif report.n_findings == MAX_FINDINGS + 1:
            report.findings.append(Finding(report.lane, segment, line, "more findings are not listed"))
