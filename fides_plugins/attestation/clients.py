"""Whom a verifier may answer: a list in the policy, or a set that an operator signed for a while.

A list must be the same in the verifier and in every policy, so nobody can be added or removed without changing all of
them. A signed set changes in one place: policies name its id and the operator's key, and the set's serial number and
last day see to it that those who were removed stay out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BeforeValidator, Field, Strict

from fides_plugins.attestation import cose
from fides_plugins.attestation.cose import Bytes, Bytes32, Count, Text
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import from_text, to_text

if TYPE_CHECKING:
    from fides_plugins.attestation.policy import EvidencePolicy

PROFILE = "fides-clients/1"
_WHAT = "client-set"
_Keys = Annotated[tuple[Bytes32, ...], Strict(), Field(min_length=1), BeforeValidator(cose.as_tuple)]


@dataclass(frozen=True, kw_only=True)
class ClientSet:
    """Clients that a verifier answers. A field's number on the wire is its place here; `operator` stays behind.

    Attributes
    ----------
    profile:
        `PROFILE`.
    id:
        The set's name, which policies ask for.
    serial:
        Grows with each change.
    not_before, not_after:
        Seconds since 1970 between which it holds.
    clients:
        Ed25519 public keys (32 bytes each).
    operator:
        Ed25519 public key (32 bytes) that signed; filled in by `open`.
    """

    profile: Text = PROFILE
    id: Text
    serial: Count
    not_before: Count
    not_after: Count
    clients: _Keys
    operator: Bytes = b""

    def sign(self, operator: Ed25519PrivateKey) -> str:
        """The signed text."""
        signer = operator.public_key().public_bytes_raw()
        return to_text(cose.sign(_PAYLOAD.encode(self), operator, signer, PROFILE.encode()))

    @classmethod
    def open(cls, text: str) -> ClientSet:
        """Check and decode a set; who signed it is for the caller to judge.

        Raises
        ------
        Refusal
            `client-set-...`.
        """
        frame = cose.parse(from_text(text, _WHAT), _WHAT)
        try:
            key = Ed25519PublicKey.from_public_bytes(frame.key_id)
        except ValueError:
            raise Refusal("client-set-operator", "The operator's identity is not an Ed25519 key.") from None
        cose.verify(frame, key, PROFILE.encode(), _WHAT)
        found = _PAYLOAD.decode(frame)
        if found.profile != PROFILE:
            raise _PAYLOAD.wrong("profile")
        return found


_PAYLOAD = cose.Payload(ClientSet, _WHAT)


def check_clients(settings: dict[str, Any], policy: EvidencePolicy, now: float) -> float:
    """Whether a verifier with this attested configuration answers whom the policy wants; until when that holds.

    Raises
    ------
    Refusal
        `evidence-clients` or `policy-empty`.
    """
    answered = sorted(settings.get("clients") or ())
    rule = policy.client_set
    if rule is not None:
        try:
            found = ClientSet.open(str(settings.get("client_set") or ""))
        except Refusal as refusal:
            raise Refusal("evidence-clients", f"The verifier shows no set of clients: {refusal.cause_text}") from None
        wanted = (rule.id, rule.operator, True, answered)
        shown = (
            found.id,
            found.operator.hex(),
            found.serial >= rule.minimum_serial,
            sorted(c.hex() for c in found.clients),
        )
        if shown != wanted:
            raise Refusal(
                "evidence-clients", "The verifier's set of clients is another one, or older than the policy's."
            )
        if not found.not_before <= now <= found.not_after:
            raise Refusal(
                "evidence-clients",
                "The verifier's set of clients does not hold now.",
                "Start it with a set that the operator signed for today.",
            )
        return float(found.not_after)
    if not policy.clients and not policy.allow_any_client:
        raise Refusal(
            "policy-empty",
            "The policy names no client, so the verifier may answer the host and show it every reference.",
            "Add the clients' public keys as `clients`, or a `client_set`, or set allow_any_client.",
        )
    if policy.clients and answered != sorted(policy.clients):
        raise Refusal(
            "evidence-clients",
            "The verifier answers other clients than the policy's: the host may ask it, and shape its lie.",
        )
    return math.inf
