"""What flows between hooks: frozen, batched, read-only.

Every object describes a batch of N rows over K classes. Arrays are float32 and C-contiguous where they
hold probabilities, and every array is read-only, so that no plug-in can change what another one sees.
Constructors validate shapes and raise `InputError`; a single bad *row* is not an error of the batch:
it is marked in a mask and ends as the status `error` of that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fides_plugins.errors import InputError

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
OutputKind = Literal["logits", "probabilities"]

#: A row of claimed probabilities may miss a sum of one by this much (float16 services over 1,000 classes do).
SUM_TOLERANCE = 1e-2

_EMPTY: Mapping[str, Any] = MappingProxyType({})
#: Name of the row-only tensor of a query whose inputs the host does not have.
ROWS_ONLY = "FIDES_ROWS"


class Status(IntEnum):
    """Verdict of one row. The order is no ranking."""

    TRUSTED = 0
    ATTACKED = 1
    INDETERMINATE = 2
    ERROR = 3

    @property
    def text(self) -> str:
        """Lower-case name, as it appears in headers, tensors and records."""
        return self.name.lower()


STATUS_TEXTS: tuple[str, ...] = tuple(s.text for s in Status)
_STATUS_TEXT_ARRAY = np.array(STATUS_TEXTS)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _set(instance: object, name: str, value: object) -> None:
    object.__setattr__(instance, name, value)


def _matrix(values: ArrayLike, what: str) -> Float32Array:
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.ndim != 2:
        raise InputError(
            f"{what} has shape {array.shape}; expected two dimensions (rows, classes).",
            "Reshape it so that there is one row per input and one column per class.",
        )
    if array.shape[1] < 2:
        raise InputError(f"{what} has {array.shape[1]} class(es); at least 2 are needed.")
    return array


def _column(values: ArrayLike, n: int, dtype: Any, what: str) -> NDArray[Any]:
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.shape != (n,):
        raise InputError(f"{what} has shape {array.shape}; expected ({n},), one value per row.")
    return _frozen(array)


def _mask(values: ArrayLike | None, n: int, what: str) -> BoolArray:
    if values is None:
        return _frozen(np.ones(n, dtype=np.bool_))
    return _column(values, n, np.bool_, what)


def softmax(logits: ArrayLike, axis: int = -1) -> Float32Array:
    """Softmax over `axis`, computed in float64 and returned as float32.

    Rows with a NaN or an infinity come out as NaN; the caller decides what that means.
    """
    z = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        z = z - np.max(z, axis=axis, keepdims=True) if z.size else z
        e = np.exp(z)
        total = np.sum(e, axis=axis, keepdims=True)
        return np.asarray(e / total if e.size else e, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Query:
    """One batch of requests, as the service model sees it.

    Attributes
    ----------
    inputs:
        Name to tensor; the first axis of every tensor is the row (N). Read-only.
    request_ids:
        One string per row, or empty when the host knows none.
    model_name:
        Name under which the service model is served.
    metadata:
        Host-specific strings (server, version). Never used for a decision by the built-ins.
    """

    inputs: Mapping[str, NDArray[Any]]
    request_ids: tuple[str, ...] = ()
    model_name: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: _EMPTY)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("A query has no input tensor.", "Give at least one named tensor.")
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in self.inputs.items():
            array = np.asarray(value)
            if array.ndim == 0:
                raise InputError(f"Input {name!r} is a scalar; the first axis must be the row.")
            arrays[name] = _frozen(array)
        lengths = {name: a.shape[0] for name, a in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"Inputs disagree on the number of rows: {lengths}.")
        _set(self, "inputs", MappingProxyType(arrays))
        _set(self, "metadata", MappingProxyType(dict(self.metadata)))
        if self.request_ids and len(self.request_ids) != self.n_rows:
            raise InputError(f"{len(self.request_ids)} request ids for {self.n_rows} rows.")

    @classmethod
    def without_inputs(
        cls,
        n_rows: int,
        request_ids: tuple[str, ...] = (),
        model_name: str = "",
        metadata: Mapping[str, str] = _EMPTY,
    ) -> Query:
        """A query of N rows whose inputs the host does not have: its one tensor is empty, (N, 0)."""
        return cls({ROWS_ONLY: np.empty((n_rows, 0), dtype=np.float32)}, request_ids, model_name, metadata)

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(next(iter(self.inputs.values())).shape[0])

    def tensor(self, name: str = "") -> NDArray[Any]:
        """The input called `name`; the only input when there is just one and the name is unknown.

        Raises
        ------
        InputError
            If there are several inputs and none has that name.
        """
        if name in self.inputs:
            return self.inputs[name]
        if len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        raise InputError(
            f"The query has inputs {sorted(self.inputs)}, none is called {name!r}.",
            "Set `input` to the name of the tensor that the verification model takes.",
        )


@dataclass(frozen=True, eq=False)
class Prediction:
    """The service's claimed answer, as probabilities.

    Attributes
    ----------
    probabilities:
        (N, K) float32, rows sum to one. Rows that were not a distribution are uniform here.
    valid:
        (N,) bool: False where the service's row was not finite or not a distribution.
    """

    probabilities: Float32Array
    valid: BoolArray

    def __post_init__(self) -> None:
        array = _matrix(self.probabilities, "The prediction")
        _set(self, "probabilities", _frozen(array))
        _set(self, "valid", _mask(self.valid, len(array), "Prediction.valid"))

    @classmethod
    def from_output(cls, output: ArrayLike, kind: OutputKind, temperature: float = 1.0) -> Prediction:
        """Make a prediction at the edge, from what the service model returned.

        Parameters
        ----------
        output:
            (N, K) numbers.
        kind:
            "logits" (a softmax is applied) or "probabilities" (checked, then renormalised).
        temperature:
            Divides logits before the softmax (Guo et al. 2017); ignored for probabilities.

        Raises
        ------
        InputError
            If the shape is not (N, K) with K of at least 2, or the dtype is not numeric.
        """
        raw = np.asarray(output)
        if raw.dtype.kind not in "fiub":
            raise InputError(f"The class output has dtype {raw.dtype}; expected numbers.")
        array = _matrix(raw, "The class output")
        valid = np.isfinite(array).all(axis=1)
        if kind == "logits":
            safe = np.where(valid[:, None], array, np.float32(0))
            probabilities = softmax(safe / np.float32(temperature))
        else:
            array = np.where(valid[:, None], array, np.float32(0))
            total = array.sum(axis=1, dtype=np.float64)
            valid &= (array >= -SUM_TOLERANCE).all(axis=1) & (np.abs(total - 1.0) <= SUM_TOLERANCE)
            clipped = np.clip(np.where(valid[:, None], array, np.float32(1)), 0, None)
            probabilities = clipped / clipped.sum(axis=1, keepdims=True, dtype=np.float32)
        return cls(probabilities=probabilities, valid=valid)

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.probabilities.shape[0])

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return int(self.probabilities.shape[1])

    @property
    def label(self) -> IntArray:
        """(N,) int64: index of the top class; -1 where the row is not valid."""
        return np.where(self.valid, self.probabilities.argmax(axis=1), -1)


@dataclass(frozen=True, eq=False)
class Verification:
    """Reference distributions for a batch, from M verifiers.

    A plug-in answers with M = 1 through `Verification.single`; the pipeline joins the answers of all
    plug-ins along M with `Verification.join`.

    Attributes
    ----------
    references:
        (N, M, K) float32; unavailable entries are uniform.
    available:
        (N, M) bool: False where a verifier has no answer for a row.
    sources:
        M names, for reasons and records.
    evidence:
        M mappings: what the verifier can show for its answer (a receipt, timings). Opaque to detection.
    """

    references: Float32Array
    available: BoolArray
    sources: tuple[str, ...]
    evidence: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        array = np.ascontiguousarray(self.references, dtype=np.float32)
        if array.ndim != 3 or array.shape[1] < 1 or array.shape[2] < 2:
            raise InputError(f"References have shape {array.shape}; expected (rows, verifiers, classes).")
        n, m, k = array.shape
        available = np.ascontiguousarray(self.available, dtype=np.bool_)
        if available.shape != (n, m):
            raise InputError(f"Verification.available has shape {available.shape}; expected {(n, m)}.")
        if len(self.sources) != m:
            raise InputError(f"{len(self.sources)} sources for {m} references.")
        with np.errstate(invalid="ignore"):
            total = array.sum(axis=2, dtype=np.float64)
            sound = np.isfinite(array).all(axis=2) & (array >= -SUM_TOLERANCE).all(axis=2)
            available = available & sound & (np.abs(total - 1.0) <= SUM_TOLERANCE)
        array = np.where(available[..., None], array, np.float32(1.0 / k))
        _set(self, "references", _frozen(array))
        _set(self, "available", _frozen(available))
        evidence = self.evidence or tuple(_EMPTY for _ in range(m))
        if len(evidence) != m:
            raise InputError(f"{len(evidence)} pieces of evidence for {m} references.")
        _set(self, "evidence", tuple(MappingProxyType(dict(e)) for e in evidence))

    @classmethod
    def single(
        cls,
        probabilities: ArrayLike,
        source: str,
        available: ArrayLike | None = None,
        evidence: Mapping[str, Any] = _EMPTY,
    ) -> Verification:
        """One verifier's answer: probabilities (N, K), optionally a mask (N,) of the rows it answers."""
        array = _matrix(probabilities, f"The reference of {source!r}")
        mask = _mask(available, len(array), "Verification.available")
        return cls(array[:, None, :], mask[:, None], (source,), (evidence,))

    @classmethod
    def join(cls, parts: Sequence[Verification]) -> Verification:
        """All verifiers' answers side by side along M. At least one part is needed."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([p.references for p in parts], axis=1),
            np.concatenate([p.available for p in parts], axis=1),
            tuple(s for p in parts for s in p.sources),
            tuple(e for p in parts for e in p.evidence),
        )

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.references.shape[0])

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return int(self.references.shape[2])

    @property
    def valid(self) -> BoolArray:
        """(N,) bool: at least one verifier answered the row."""
        return np.asarray(self.available.any(axis=1))

    @property
    def probabilities(self) -> Float32Array:
        """(N, K) float32: mean over the verifiers that answered; uniform where none did."""
        if self.references.shape[1] == 1:
            return np.asarray(self.references[:, 0, :])
        weight = self.available[..., None].astype(np.float32)
        count = weight.sum(axis=1)
        k = np.float32(self.n_classes)
        total = (self.references * weight).sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), 1 / k).astype(np.float32)

    @property
    def label(self) -> IntArray:
        """(N,) int64: top class of the mean reference; -1 where no verifier answered."""
        return np.where(self.valid, self.probabilities.argmax(axis=1), -1)


@dataclass(frozen=True, eq=False)
class Detection:
    """One detector's opinion on a batch.

    Attributes
    ----------
    score:
        (N,) float32 in [0, 1]; higher is more suspicious.
    attacked:
        (N,) bool: the detector's own decision at its own threshold.
    p_value:
        (N,) float32 in [0, 1]: probability of a score at least this high on benign traffic; NaN where
        the detector is not calibrated. With p-values the policy's false-alarm budget decides, without
        them `attacked` does.
    source:
        Name of the detector, for reasons.
    valid:
        (N,) bool: False where the detector has no opinion.
    unscored:
        (N,) bool: rows that were given as valid with a score that is not a finite number. They are not
        `valid`, and the pipeline counts them as failures of the detector: only `valid=False` says "no opinion".
    """

    score: Float32Array
    attacked: BoolArray
    p_value: Float32Array
    source: str
    valid: BoolArray
    unscored: BoolArray

    def __init__(
        self,
        score: ArrayLike,
        attacked: ArrayLike,
        source: str,
        p_value: ArrayLike | None = None,
        valid: ArrayLike | None = None,
    ) -> None:
        scores = np.ascontiguousarray(score, dtype=np.float32)
        n = scores.shape[0] if scores.ndim == 1 else -1
        if n < 0:
            raise InputError(f"The score of {source!r} has shape {scores.shape}; expected (rows,).")
        given = _mask(valid, n, "Detection.valid")
        ok = given & np.isfinite(scores)
        p = np.full(n, np.nan, dtype=np.float32) if p_value is None else p_value
        p = _column(p, n, np.float32, "Detection.p_value")
        with np.errstate(invalid="ignore"):
            if np.any((p < 0) | (p > 1)):
                raise InputError(f"A p-value of {source!r} lies outside [0, 1].")
            if np.any(ok & ((scores < 0) | (scores > 1))):
                raise InputError(f"A score of {source!r} lies outside [0, 1].")
        _set(self, "score", _frozen(np.where(ok, scores, np.float32(np.nan)).astype(np.float32)))
        _set(self, "attacked", _column(attacked, n, np.bool_, "Detection.attacked"))
        _set(self, "p_value", p)
        _set(self, "source", source)
        _set(self, "valid", _frozen(np.asarray(ok)))
        _set(self, "unscored", _frozen(np.asarray(given & ~ok)))

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.score.shape[0])


@dataclass(frozen=True, eq=False)
class Reclassification:
    """What the un-attacked service would have answered.

    Attributes
    ----------
    probabilities:
        (N, K) float32, rows sum to one.
    source:
        Name of the re-classifier.
    valid:
        (N,) bool: False where there is no correction, or it was not a distribution.
    """

    probabilities: Float32Array
    source: str
    valid: BoolArray

    def __init__(self, probabilities: ArrayLike, source: str, valid: ArrayLike | None = None) -> None:
        checked = Prediction.from_output(probabilities, "probabilities")
        mask = _mask(valid, checked.n_rows, "Reclassification.valid")
        _set(self, "probabilities", checked.probabilities)
        _set(self, "source", source)
        _set(self, "valid", _frozen(np.asarray(mask & checked.valid)))

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.probabilities.shape[0])

    @property
    def label(self) -> IntArray:
        """(N,) int64: corrected class; -1 where there is no correction."""
        return np.where(self.valid, self.probabilities.argmax(axis=1), -1)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The outcome for a batch, and what the caller should use.

    Attributes
    ----------
    status:
        (N,) uint8, values of `Status`.
    score:
        (N,) float32 in [0, 1], NaN where no detector had an opinion. Higher is more suspicious.
    p_value:
        (N,) float32, combined over detectors; NaN where none is calibrated.
    service_label, verified_label:
        (N,) int64: top class of the service and of the reference; -1 where there is none.
    label, probabilities:
        (N,) int64 and (N, K) float32: what the caller should use. The service's answer, or for attacked
        rows the re-classified one. -1 and zeros where there is nothing to use.
    corrected:
        (N,) bool: the row carries a re-classified answer.
    refused:
        (N,) bool: policy refuses this row; a host must not hand out its answer.
    reason_codes, reasons:
        (N,) int64 into a tuple of distinct texts, so that building reasons needs no loop over rows.
    """

    status: NDArray[np.uint8]
    score: Float32Array
    p_value: Float32Array
    service_label: IntArray
    verified_label: IntArray
    label: IntArray
    probabilities: Float32Array
    corrected: BoolArray
    refused: BoolArray
    reason_codes: IntArray
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        probabilities = _matrix(self.probabilities, "Verdict.probabilities")
        n = len(probabilities)
        _set(self, "probabilities", _frozen(probabilities))
        columns: dict[str, Any] = {
            "status": np.uint8,
            "score": np.float32,
            "p_value": np.float32,
            "service_label": np.int64,
            "verified_label": np.int64,
            "label": np.int64,
            "corrected": np.bool_,
            "refused": np.bool_,
            "reason_codes": np.int64,
        }
        for name, dtype in columns.items():
            _set(self, name, _column(getattr(self, name), n, dtype, f"Verdict.{name}"))
        if n and (self.reason_codes.min() < 0 or self.reason_codes.max() >= len(self.reasons)):
            raise InputError("Verdict.reason_codes point outside Verdict.reasons.")

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.status.shape[0])

    @property
    def status_text(self) -> NDArray[np.str_]:
        """(N,) strings: trusted, attacked, indeterminate or error."""
        return np.asarray(_STATUS_TEXT_ARRAY[self.status])

    @property
    def reason(self) -> NDArray[np.str_]:
        """(N,) strings: why each row has its status; empty for a trusted row."""
        return np.asarray(np.array(self.reasons or ("",))[self.reason_codes])

    def is_status(self, status: Status) -> BoolArray:
        """(N,) bool: rows with this status."""
        return np.asarray(self.status == status)

    def counts(self) -> dict[str, int]:
        """Number of rows by status text."""
        return dict(zip(STATUS_TEXTS, np.bincount(self.status, minlength=len(STATUS_TEXTS)).tolist(), strict=True))
