"""What travels between the steps of the ensemble: tensor names, and a verification outcome as tensors.

`fides_verify` hands three tensors on to `fides_validate`. Their first axis is the row, so that Triton
may batch requests: references (N, M, K) float32, available (N, M) uint8, and a small JSON text about the
verifiers, repeated in every row as (N, L) uint8.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.wire import RECEIPT_OUTPUT
from fides_plugins.errors import InputError
from fides_plugins.guard import Failure, FailureKind
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.types import Verification

#: Parameters of the adapter itself, which `fides attach` writes; `fides.*` are the settings every host knows.
STEP_PREFIX = "fides_step."

REFERENCES = "FIDES_REFERENCES"
AVAILABLE = "FIDES_AVAILABLE"
VERIFICATION = "FIDES_VERIFICATION"
#: Between the steps, never seen by clients.
INTERNAL = (REFERENCES, AVAILABLE, VERIFICATION)

STATUS = "FIDES_STATUS"
SCORE = "FIDES_SCORE"
P_VALUE = "FIDES_P_VALUE"
LABEL = "FIDES_LABEL"
PROBABILITIES = "FIDES_PROBABILITIES"
REASON = "FIDES_REASON"
#: A verifier's receipt for the request, in its first row; empty where there is none.
RECEIPT = RECEIPT_OUTPUT
#: The verdict, as clients may ask for it; name to Triton data type.
VERDICT_TYPES = {
    STATUS: "BYTES",
    SCORE: "FP32",
    P_VALUE: "FP32",
    LABEL: "INT64",
    PROBABILITIES: "FP32",
    REASON: "BYTES",
    RECEIPT: "BYTES",
}

_KINDS = get_args(FailureKind)
#: A client may call `fides_validate` by itself, with any tensors.
_MAX_TEXT = 64 * 1024


def pack_outcome(outcome: VerifyOutcome, n_rows: int, n_classes: int) -> dict[str, NDArray[Any]]:
    """A verification outcome as tensors.

    Without any verification there is one column, unavailable in every row, and no source: zero-sized
    axes are avoided, because Triton's python backend has trouble with 0-byte tensors.
    """
    verification = outcome.verification
    described: dict[str, Any] = {"failures": [[f.plugin, f.hook, f.kind, f.detail] for f in outcome.failures]}
    if verification is None:
        references = np.full((n_rows, 1, max(n_classes, 2)), 1.0 / max(n_classes, 2), dtype=np.float32)
        available = np.zeros((n_rows, 1), dtype=np.uint8)
        described["sources"] = []
    else:
        references = np.asarray(verification.references)
        available = verification.available.astype(np.uint8)
        described["sources"] = list(verification.sources)
        described["evidence"] = [_plain(e) for e in verification.evidence]
    text = np.frombuffer(json.dumps(described).encode(), dtype=np.uint8)
    return {
        REFERENCES: references,
        AVAILABLE: available,
        VERIFICATION: np.ascontiguousarray(np.broadcast_to(text, (n_rows, text.size))),
    }


def mark_probe(text: NDArray[Any]) -> NDArray[np.uint8]:
    """The packed text with the mark of a health probe, whose verdict is not recorded.

    The mark travels in a tensor that `fides_verify` writes, and not in a request's id or parameters: these
    come from clients, who must not be able to keep their requests out of the records.
    """
    described = json.loads(text[0].tobytes())
    data = np.frombuffer(json.dumps({**described, "probe": True}).encode(), dtype=np.uint8)
    return np.ascontiguousarray(np.broadcast_to(data, (len(text), data.size)))


def is_probe(text: NDArray[Any]) -> bool:
    """Whether `mark_probe` marked this text."""
    return (
        bool(len(text)) and b'"probe": true' in text[0].tobytes() and json.loads(text[0].tobytes()).get("probe") is True
    )


def unpack_outcome(references: NDArray[Any], available: NDArray[Any], text: NDArray[Any]) -> VerifyOutcome:
    """The outcome that `pack_outcome` packed.

    Raises
    ------
    InputError
        If the tensors do not hold one, for example because a client called the step by itself.
    """
    if text.ndim != 2 or not 0 < text.shape[1] <= _MAX_TEXT:
        raise InputError("The verification step's answer cannot be read.")
    if len(text) == 0:
        return VerifyOutcome(None)
    try:
        described = json.loads(text[0].tobytes())
        failures = tuple(_failure(item) for item in described["failures"])
        sources = tuple(str(s) for s in described["sources"])
        evidence = tuple(dict(e) for e in described.get("evidence", []))
    except (ValueError, KeyError, TypeError):
        raise InputError("The verification step's answer cannot be read.") from None
    if not sources:
        return VerifyOutcome(None, failures)
    return VerifyOutcome(Verification(references, available.astype(np.bool_), sources, evidence), failures)


def _failure(item: Sequence[Any]) -> Failure:
    plugin, hook, kind, detail = (str(part) for part in item)
    if kind not in _KINDS:
        raise ValueError(kind)
    return Failure(plugin, hook, kind, detail)  # type: ignore[arg-type]


def _plain(evidence: Any) -> dict[str, Any]:
    """Evidence as JSON; what JSON cannot hold is left out rather than guessed at."""
    kept = {}
    for key, value in dict(evidence).items():
        try:
            kept[str(key)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept
