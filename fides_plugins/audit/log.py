"""The plug-in `audit`: one line per judged row, in a log that shows tampering.

Configured as any plug-in (TOML shown)::

    [fides.plugins]
    load = ["fides_plugins.audit:audit"]
    [fides.plugins.options.audit]
    path = "/var/log/fides"

A row is one request where clients send one row at a time. docs/reference/audit-log.md describes every
field and option.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.tensors import bytes_digest, tensor_digest
from fides_plugins.audit.anchor import AnchorFile
from fides_plugins.audit.chain import FORMAT_VERSION, make_folder, read_key
from fides_plugins.audit.writer import AuditOptions, LaneWriter, timestamp
from fides_plugins.bundle import Bundle
from fides_plugins.errors import SettingsError
from fides_plugins.hookspecs import ENTRY_POINT_GROUP, hookimpl
from fides_plugins.oip import BYTES, encode_bytes
from fides_plugins.settings import Settings
from fides_plugins.types import STATUS_TEXTS, Query, Status, Verdict

logger = logging.getLogger("fides_plugins")


class AuditLog:
    """Writes one line per judged row; never blocks, never changes a verdict."""

    def __init__(self) -> None:
        self._writer: LaneWriter | None = None
        self._random = np.random.default_rng()

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Check options and folder; the log itself is opened by the first verdict."""
        self._options = AuditOptions.from_settings(settings)
        self._key = read_key(self._options.key_file)
        self._bundle_digest = bundle.digest if bundle is not None else ""
        self._context = _context(settings, bundle)
        try:
            make_folder(Path(self._options.path))
        except OSError as error:
            raise SettingsError(
                f"The audit log's folder cannot be made: {error.strerror}.", "Set `path` to a folder it may write."
            ) from None
        folder = Path(self._options.path).stat()
        if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            logger.warning("the audit log's folder is one that others may write; make it 0700")
        if self._options.anchor_file:
            self._check_anchor_file(folder.st_dev)

    def _check_anchor_file(self, device: int) -> None:
        try:
            fd = AnchorFile(self._options.anchor_file, self._options.anchor_interval_s).open()
            try:
                same = os.fstat(fd).st_dev == device
            finally:
                os.close(fd)
        except OSError as error:
            raise SettingsError(
                f"The audit log's anchor_file cannot be written: {error.strerror}.",
                "Set it to a file on another mount.",
            ) from None
        if same:
            logger.warning("the audit log's anchor_file is on the same file system: both can be rolled back together")

    @hookimpl
    def fides_record(self, query: Query, verdict: Verdict) -> None:
        """Queue the rows of one verdict. Hashing happens here, because a host may reuse the inputs' memory."""
        rows = self._chosen(verdict)
        if not rows.size:
            return
        if self._writer is None:
            self._writer = LaneWriter(self._options, self._context, self._key)
        now = time.time()
        inputs = [_input_digests(query, int(i)) if self._options.digest_inputs else {} for i in rows]
        ids, model = query.request_ids, query.model_name

        def make() -> list[dict[str, Any]]:
            moment = timestamp(now)
            return [
                {
                    "kind": "row",
                    "time": moment,
                    "model": model,
                    "request_id": ids[i] if ids else "",
                    "bundle": self._bundle_digest,
                    "inputs": digests,
                    **_verdict_fields(verdict, int(i)),
                }
                for i, digests in zip(rows, inputs, strict=True)
            ]

        self._writer.put(len(rows), make)

    @hookimpl
    def fides_unconfigure(self) -> None:
        """Write what is queued and give the log back."""
        if self._writer is not None:
            self._writer.close()

    @property
    def line_counts(self) -> Mapping[str, int]:
        """Lines written, dropped and failed since start; the metrics recorder publishes them."""
        return self._writer.line_counts if self._writer is not None else {"written": 0, "dropped": 0, "failed": 0}

    def _chosen(self, verdict: Verdict) -> NDArray[np.int64]:
        if self._options.sample >= 1.0:
            return np.arange(verdict.n_rows)
        chosen = self._random.random(verdict.n_rows) < self._options.sample
        return np.flatnonzero(chosen | (verdict.status != Status.TRUSTED))


def _context(settings: Settings, bundle: Bundle | None) -> dict[str, Any]:
    """What holds for all rows until the next line of this kind."""
    return {
        "format_version": FORMAT_VERSION,
        "service": settings.service_name,
        "mode": settings.mode,
        "false_alarm_rate": settings.false_alarm_rate,
        "bundle": bundle.digest if bundle is not None else "",
        "bundle_name": bundle.manifest.name if bundle is not None else "",
        "bundle_version": bundle.manifest.bundle_version if bundle is not None else 0,
        "plugins": plugin_versions(settings),
        "python": ".".join(str(v) for v in sys.version_info[:3]),
    }


def plugin_versions(settings: Settings) -> dict[str, str]:
    """Version of everything that may judge a row: this package (the built-ins), entry points, loaded modules.

    A module that belongs to no installed distribution has the version "unpackaged".
    """
    from fides_plugins import __version__

    versions = {"fides-plugins": __version__}
    if settings.plugins.entry_points:
        for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
            if entry.name not in settings.plugins.blocked:
                versions[entry.name] = entry.dist.version if entry.dist is not None else "unpackaged"
    for target in settings.plugins.load:
        package = target.partition(":")[0].partition(".")[0]
        if package == "fides_plugins":
            versions[target] = __version__
            continue
        owners = metadata.packages_distributions().get(package, [])
        versions[target] = metadata.version(owners[0]) if owners else "unpackaged"
    return versions


def _input_digests(query: Query, row: int) -> dict[str, str]:
    """Hex digest of one row of every input, as a client of one row computes it over its own tensor."""
    digests = {}
    for name, array in query.inputs.items():
        part = array[row : row + 1]
        if part.size == 0:
            continue
        if part.dtype.kind in "OSU":
            digests[name] = bytes_digest(encode_bytes(part), BYTES, part.shape).hex()
        else:
            digests[name] = tensor_digest(part).hex()
    return digests


def _verdict_fields(verdict: Verdict, i: int) -> dict[str, Any]:
    return {
        "output": tensor_digest(verdict.probabilities[i : i + 1]).hex(),
        "status": STATUS_TEXTS[verdict.status[i]],
        "score": _number(verdict.score[i]),
        "p_value": _number(verdict.p_value[i]),
        "service_label": int(verdict.service_label[i]),
        "verified_label": int(verdict.verified_label[i]),
        "label": int(verdict.label[i]),
        "corrected": bool(verdict.corrected[i]),
        "refused": bool(verdict.refused[i]),
        "reason": verdict.reasons[verdict.reason_codes[i]],
    }


def _number(value: np.float32) -> float | None:
    """The shortest decimal that gives the same float32; None for NaN, which JSON does not know."""
    return float(str(value)) if np.isfinite(value) else None
