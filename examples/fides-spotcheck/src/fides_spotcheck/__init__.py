"""Re-runs a random, unpredictable share of the rows on a trusted copy of the service.

Rows are drawn from the operating system's randomness while the request is under way, so a service
cannot know which of its answers will be compared. A mismatch is an attack, and becomes a line of
evidence: what was asked (as a digest), what the service said, what the trusted copy said, and when.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins import Detection, Prediction, Query, SettingsError, Verification, hookimpl
from fides_plugins.client.oip import OipModel

if TYPE_CHECKING:
    from fides_plugins.bundle import Bundle
    from fides_plugins.settings import Settings
    from fides_plugins.types import OutputKind

NAME = "spotcheck"
logger = logging.getLogger("fides_spotcheck")
#: Evidence files stop growing here; what comes later is counted, not written.
MAX_EVIDENCE_BYTES = 64 * 1024 * 1024


def rows_until_caught(share: float, lies: float, confidence: float = 0.95) -> int:
    """Rows after which a service that lies in a share `lies` of them is caught with this confidence.

    Each row is a lie and drawn with probability share * lies, independently, so n rows pass with
    probability (1 - share * lies) ** n.
    """
    return math.ceil(math.log1p(-confidence) / math.log1p(-share * lies))


def draw(n_rows: int, share: float) -> NDArray[np.bool_]:
    """(N,) bool: rows to check, each with probability `share`, from the operating system's randomness."""
    numbers = np.frombuffer(os.urandom(8 * n_rows), dtype=np.uint64)
    return numbers < np.uint64(min(int(share * 2.0**64), 2**64 - 1)) if share < 1 else np.ones(n_rows, np.bool_)


class Spotcheck:
    """Options: `endpoint`, `share`, `tolerance`, `output`, `evidence` (a file), `timeout_ms`.

    Attributes
    ----------
    counts:
        Rows checked and mismatches since start, and evidence lines written or lost.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._model: OipModel | None = None
        self._share = 0.05
        self._tolerance = 0.01
        self._output = ""
        self._evidence: Path | None = None
        self._kind: OutputKind = "logits"
        self._temperature = 1.0

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Read the options."""
        options = settings.plugins.options.get(NAME, {})
        if not options.get("endpoint"):
            raise SettingsError(
                f"{NAME} has no trusted copy to ask.",
                "Set plugins.options.spotcheck.endpoint to http://host:port/v2/models/NAME.",
            )
        timeout_s = float(options.get("timeout_ms", 0.8 * settings.timeout_ms)) / 1000.0
        self._model = OipModel(str(options["endpoint"]), timeout_s)
        self._share = float(options.get("share", self._share))
        if not 0 < self._share <= 1:
            raise SettingsError(f"Option share of {NAME!r} is {self._share}; it must lie above 0 and be at most 1.")
        self._tolerance = float(options.get("tolerance", self._tolerance))
        self._output = str(options.get("output", settings.output))
        self._evidence = Path(options["evidence"]) if options.get("evidence") else None
        if bundle is not None:
            self._kind = settings.output_kind or bundle.manifest.service.output_kind
            self._temperature = bundle.manifest.service.temperature

    @hookimpl
    def fides_verify(self, query: Query) -> Verification | None:
        """The trusted copy's answer for the rows drawn; an unreachable copy is a failure, not a pass."""
        chosen = draw(query.n_rows, self._share)
        if self._model is None or not chosen.any():
            return None
        output = self._model.infer({name: a[chosen] for name, a in query.inputs.items()}, self._output)
        trusted = Prediction.from_output(output.reshape(int(chosen.sum()), -1), self._kind, self._temperature)
        reference = np.full((query.n_rows, trusted.n_classes), 1.0 / trusted.n_classes, dtype=np.float32)
        reference[chosen] = trusted.probabilities
        available = np.zeros(query.n_rows, dtype=np.bool_)
        available[chosen] = trusted.valid
        # Hosts may merge and split batches on the way to detection: digests travel by the reference they
        # belong to, not by row number.
        digests = {_key(reference[row]): _digest(query, row) for row in np.flatnonzero(available)}
        return Verification.single(reference, NAME, available=available, evidence={"inputs": digests})

    @hookimpl
    def fides_detect(self, query: Query, service: Prediction, verification: Verification) -> Detection | None:
        """Attacked where a drawn row differs from the trusted copy; no opinion on the others."""
        if NAME not in verification.sources:
            return None
        index = verification.sources.index(NAME)
        checked = verification.available[:, index]
        reference = verification.references[:, index]
        distance = 0.5 * np.abs(service.probabilities - reference).sum(axis=1)
        attacked = checked & service.valid & (distance > self._tolerance)
        with self._lock:
            self.counts["checked"] += int(checked.sum())
            self.counts["mismatches"] += int(attacked.sum())
        inputs = verification.evidence[index].get("inputs", {})
        for row in np.flatnonzero(attacked):
            self._write(_record(query, service, reference[row], float(distance[row]), int(row), inputs))
        return Detection(np.clip(distance, 0.0, 1.0), attacked, source=NAME, valid=checked)

    def _write(self, record: dict[str, Any]) -> None:
        logger.error("mismatch with the trusted copy: service %s, trusted %s", record["service"], record["trusted"])
        if self._evidence is None:
            return
        line = json.dumps(record, sort_keys=True) + "\n"
        with self._lock:
            try:
                if self._evidence.exists() and self._evidence.stat().st_size + len(line) > MAX_EVIDENCE_BYTES:
                    raise OSError("the evidence file is full")
                with self._evidence.open("a", encoding="utf-8") as stream:
                    stream.write(line)
                self.counts["written"] += 1
            except OSError as error:  # a full disk must not undo the alarm
                self.counts["lost"] += 1
                logger.error("evidence could not be written: %s", error.strerror or error)


def _record(
    query: Query, service: Prediction, reference: NDArray[np.float32], distance: float, row: int, inputs: dict[str, str]
) -> dict[str, Any]:
    return {
        "time": time.time(),
        "model": query.model_name,
        "request_id": query.request_ids[row] if query.request_ids else "",
        "input_sha256": inputs.get(_key(reference), ""),
        "total_variation": round(distance, 6),
        "service": {"label": int(service.label[row]), "probabilities": _numbers(service.probabilities[row])},
        "trusted": {"label": int(reference.argmax()), "probabilities": _numbers(reference)},
    }


def _numbers(values: NDArray[np.float32]) -> list[float]:
    return [float(f"{v:.6g}") for v in values]


def _key(reference: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(reference, dtype=np.float32).tobytes()).hexdigest()[:16]


def _digest(query: Query, row: int) -> str:
    """SHA-256 over name, dtype, shape and bytes of every input of a row."""
    state = hashlib.sha256()
    for name in sorted(query.inputs):
        array = np.ascontiguousarray(query.inputs[name][row])
        state.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        state.update(array.tobytes())
    return state.hexdigest()
