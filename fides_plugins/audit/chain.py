"""The format of the audit log: one line, the chain over lines, and the names of its files.

A log is a folder of *lanes*, one per process that writes at the same time. A lane is a chain of JSON
lines over numbered segments, with a file `HEAD` that says how long the chain is::

    LOG/lane-00/00000000.jsonl  00000001.jsonl  HEAD  lock

Every line holds the hash of the line before it (`prev`) and ends with its own (`hash`): SHA-256 of the
line's bytes before `,"hash"`, or HMAC-SHA256 of them where a key is configured; `HEAD` then has an HMAC of its
own, over the lane's name, too. Hashing bytes instead of values means that not even a space can change unseen.
The idea is Schneier and Kelsey, "Secure audit logs to support computer forensics" (1999), without their
forward-secure keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fides_plugins.errors import InputError, SettingsError

FORMAT_VERSION = 1
#: Hash before the first line of a lane.
GENESIS = "0" * 64
HEAD_NAME = "HEAD"
LOCK_NAME = "lock"
#: HEAD is overwritten in place by one small write, which neither a full disk nor a kill can split.
HEAD_BYTES = 128
KEYED_HEAD_BYTES = 256
MIN_KEY_BYTES = 16
#: A line longer than this is not one of ours and is not read into memory.
MAX_LINE_BYTES = 1024 * 1024

_LANE = re.compile(r"lane-(\d{2,})")
_SEGMENT = re.compile(r"(\d{8})\.jsonl")
_SEALED = re.compile(rb'(\{.*),"hash":"([0-9a-f]{64})"\}', re.DOTALL)


class ChainError(Exception):
    """A line is not what its writer wrote. Internal to this package: `verify` turns it into a finding."""


@dataclass(frozen=True)
class Head:
    """The end of a chain: number and hash of its last line; -1 and `GENESIS` for an empty one."""

    seq: int = -1
    hash: str = GENESIS

    def to_bytes(self, lane: str, key: bytes | None = None) -> bytes:
        """JSON, padded with spaces, newline; with a key also an HMAC, so that nobody else can say where a lane ends."""
        fields: dict[str, Any] = {"seq": self.seq, "hash": self.hash}
        if key is None:
            return json.dumps(fields).ljust(HEAD_BYTES - 1).encode() + b"\n"
        # A line of the chain begins with a brace: its hash cannot be taken for this one.
        fields["hmac"] = line_hash(f"HEAD {lane} {self.seq} {self.hash}".encode(), key)
        return json.dumps(fields).ljust(KEYED_HEAD_BYTES - 1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, lane: str, key: bytes | None = None) -> Head:
        """Read what `to_bytes` wrote; `ChainError` for anything else."""
        try:
            value = json.loads(data)
            head = cls(int(value["seq"]), str(value["hash"]))
        except (ValueError, TypeError, KeyError):
            raise ChainError("HEAD is damaged") from None
        if not hmac.compare_digest(head.to_bytes(lane, key), data):
            raise ChainError("HEAD is damaged" if key is None else "HEAD was not written with this key for this lane")
        return head


def line_hash(body: bytes, key: bytes | None) -> str:
    """Hex SHA-256, or HMAC-SHA256 with a key, of a line's bytes before its hash."""
    if key is None:
        return hashlib.sha256(body).hexdigest()
    return hmac.new(key, body, hashlib.sha256).hexdigest()


def seal(record: Mapping[str, Any], head: Head, key: bytes | None = None) -> tuple[bytes, Head]:
    """The line that follows `head`, newline included, and the head after it."""
    text = json.dumps({"seq": head.seq + 1, **record, "prev": head.hash}, separators=(",", ":"), allow_nan=False)
    body = text[:-1].encode("ascii")
    digest = line_hash(body, key)
    return body + b',"hash":"' + digest.encode() + b'"}\n', Head(head.seq + 1, digest)


def unseal(line: bytes, key: bytes | None = None) -> tuple[dict[str, Any], Head]:
    """Check one line (without its newline) by itself: its record, and the head that it makes.

    Raises
    ------
    ChainError
        If it is not a sealed line, or its hash is not that of its bytes.
    """
    match = _SEALED.fullmatch(line)
    if match is None:
        raise ChainError("is not a line of an audit log")
    body, digest = match[1], match[2].decode()
    if not hmac.compare_digest(line_hash(body, key), digest):
        raise ChainError("was altered: its hash is not that of its text")
    try:
        record: dict[str, Any] = json.loads(body + b"}")
    except ValueError:
        raise ChainError("is not valid JSON") from None
    number = record.get("seq")
    # A line that its key's holder did not number follows no other one.
    return record, Head(number if isinstance(number, int) else -2, digest)


def read_lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Lines of a segment without their newlines, and whether each was whole; memory stays bounded."""
    with path.open("rb") as stream:
        while data := stream.readline(MAX_LINE_BYTES):
            whole = data.endswith(b"\n")
            yield (data[:-1] if whole else data), whole


def make_folder(folder: Path) -> None:
    """A folder for its owner alone; one that is there stays as it is. What clients asked is nobody else's business."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def lane_path(folder: Path, number: int) -> Path:
    """Folder of one lane."""
    return folder / f"lane-{number:02d}"


def segments(lane: Path) -> list[tuple[int, Path]]:
    """Segments of a lane with their numbers, in order."""
    return sorted((int(m[1]), p) for p in lane.iterdir() if (m := _SEGMENT.fullmatch(p.name)))


def segment_path(lane: Path, number: int) -> Path:
    """File of one segment."""
    return lane / f"{number:08d}.jsonl"


def read_key(path: str | os.PathLike[str] | None) -> bytes | None:
    """The key of a keyed chain: the file's bytes without white space around them; None without a file.

    Raises
    ------
    SettingsError
        If the file cannot be read or is too short to be a key.
    """
    if not path:
        return None
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"The audit key file cannot be read: {error.strerror}.", "Check `key_file`.") from None
    if len(key) < MIN_KEY_BYTES:
        raise SettingsError(
            f"The audit key has {len(key)} bytes; at least {MIN_KEY_BYTES} are needed.",
            "Make one with: openssl rand -hex 32",
        )
    return key


def require_log(folder: Path) -> list[Path]:
    """Lanes of a folder that must hold a log, in order of their numbers.

    Raises
    ------
    InputError
        If the folder does not exist, or has no lane in it.
    """
    if not folder.is_dir():
        raise InputError(f"There is no audit log {folder.name!r}.", "Give the folder that `path` of the plug-in names.")
    found = sorted((int(m[1]), p) for p in folder.iterdir() if (m := _LANE.fullmatch(p.name)) and p.is_dir())
    if not found:
        raise InputError(f"{folder.name!r} holds no audit log: it has no folder lane-00.")
    return [path for _, path in found]
