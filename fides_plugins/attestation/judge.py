"""What an answer is judged by: the model's name, its classes, and the parts of the bundle that decide.

Client and verifier hold bundles of different digests, because a client's lacks the verification model. These three must
be the same on both sides all the same: a reference of another model judges nothing, and one that another detector was
calibrated for is judged by the wrong scale.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

from fides_plugins.attestation.refusal import Refusal
from fides_plugins.bundle import Bundle
from fides_plugins.errors import BundleError

_LONGEST_NAME = 128


class Judged(Protocol):
    """What says by what it is judged: a request, a receipt, a `Judge`."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def classes(self) -> bytes:
        """Digest of the class names in their order."""

    @property
    def judge(self) -> bytes:
        """Digest of detector, re-classifier, calibration and how a service's output is read."""


@dataclass(frozen=True)
class Judge:
    """The three, of one bundle; the digests have 32 bytes."""

    model: str
    classes: bytes
    judge: bytes

    @classmethod
    def of(cls, bundle: Bundle) -> Judge:
        """What this bundle judges by.

        Raises
        ------
        BundleError
            If no request can carry its name.
        """
        manifest = bundle.manifest
        if len(manifest.name) > _LONGEST_NAME:
            raise BundleError(
                f"The bundle's name is longer than {_LONGEST_NAME} characters.", "Make it with a shorter one."
            )
        parts = manifest.model_dump(mode="json", include={"service", "detector", "reclassifier", "calibration"})
        files = [p.file for p in (manifest.detector, manifest.reclassifier, manifest.calibration) if p is not None]
        parts["files"] = {name: manifest.files[name].sha256 for name in files}
        return cls(manifest.name, _digest(list(bundle.class_names)), _digest(parts))

    def check(self, said: Judged, what: str) -> None:
        """Refuse what is judged by anything else.

        Raises
        ------
        Refusal
            `<what>-model`, `<what>-classes` or `<what>-judge`.
        """
        same = "Give client and verifier bundles of one `fides fit`; the client's may leave out the verification model."
        if said.model != self.model:
            raise Refusal(f"{what}-model", f"The {what} is for another model than {self.model!r}.", same)
        if said.classes != self.classes:
            raise Refusal(f"{what}-classes", f"The {what} is for other class names, or another order of them.", same)
        if said.judge != self.judge:
            raise Refusal(f"{what}-judge", f"The {what} is for another detector, re-classifier or calibration.", same)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(b"fides-judge/1" + json.dumps(value, sort_keys=True).encode()).digest()
