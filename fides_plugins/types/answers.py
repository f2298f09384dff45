"""What the models answered: the service's claim, and the references of the verifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fides_plugins.errors import InputError
from fides_plugins.types.arrays import (
    EMPTY,
    SUM_TOLERANCE,
    BoolArray,
    Float32Array,
    IntArray,
    OutputKind,
    Rows,
    class_matrix,
    frozen,
    row_mask,
    set_field,
    softmax,
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
        array = class_matrix(self.probabilities, "The prediction")
        set_field(self, "probabilities", frozen(array))
        set_field(self, "valid", row_mask(self.valid, len(array), "Prediction.valid"))

    @classmethod
    def from_output(cls, output: ArrayLike, kind: OutputKind, temperature: float = 1.0) -> Prediction:
        """Make a prediction at the edge, from what the service model returned.

        Hosts come here through `codec.OutputCodec`, which knows kind and temperature and takes other shapes too.

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
        array = class_matrix(raw, "The class output")
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

    @classmethod
    def concat(cls, parts: Sequence[Prediction]) -> Prediction:
        """The rows of several predictions over the same classes, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([p.probabilities for p in parts]), np.concatenate([p.valid for p in parts]))

    def rows(self, index: Rows) -> Prediction:
        """Some of the rows."""
        return Prediction(self.probabilities[index], self.valid[index])

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
        set_field(self, "references", frozen(array))
        set_field(self, "available", frozen(available))
        evidence = self.evidence or tuple(EMPTY for _ in range(m))
        if len(evidence) != m:
            raise InputError(f"{len(evidence)} pieces of evidence for {m} references.")
        set_field(self, "evidence", tuple(MappingProxyType(dict(e)) for e in evidence))

    @classmethod
    def single(
        cls,
        probabilities: ArrayLike,
        source: str,
        available: ArrayLike | None = None,
        evidence: Mapping[str, Any] = EMPTY,
    ) -> Verification:
        """One verifier's answer: probabilities (N, K), optionally a mask (N,) of the rows it answers."""
        array = class_matrix(probabilities, f"The reference of {source!r}")
        mask = row_mask(available, len(array), "Verification.available")
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

    @classmethod
    def concat(cls, parts: Sequence[Verification]) -> Verification:
        """The rows of several verifications by the same verifiers, in order.

        Evidence belongs to a whole request, so it is kept where there is one part, and dropped otherwise.
        """
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([p.references for p in parts]),
            np.concatenate([p.available for p in parts]),
            parts[0].sources,
        )

    def rows(self, index: Rows) -> Verification:
        """Some of the rows, with the evidence of all."""
        return Verification(self.references[index], self.available[index], self.sources, self.evidence)

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
