"""What all clients share: whom to trust, what to ask, how to judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import Scheme
from fides_plugins.attestation.verify import TrustRoots
from fides_plugins.bundle import Bundle
from fides_plugins.client.judge import Answer, ClientJudge
from fides_plugins.client.receipts import Brought, Pending, ReceiptChecker
from fides_plugins.client.trust import EvidenceFile, EvidenceUrl, Trust
from fides_plugins.errors import InputError, ServerError
from fides_plugins.settings import Settings
from fides_plugins.types import Float32Array, Query

#: Refusals that a restart of the verifier explains: its evidence is then fetched anew, and the request repeated.
_RESTARTED = frozenset(("receipt-missing", "receipt-key", "receipt-start"))


@dataclass(frozen=True)
class Reply:
    """The service's class output, what came as its receipt, and the library's own object."""

    output: NDArray[Any]
    brought: Brought
    raw: Any


class ClientCore:
    """What all clients share: whom to trust, what to ask, how to judge.

    Parameters
    ----------
    bundle, settings:
        See `ClientJudge`.
    policy, verifier_url, evidence, roots, insecure_development:
        Whom to trust: evidence comes from the file `evidence`, or from the verifier at `verifier_url`.
    identity:
        The key that the verifier knows this client by.
    scheme:
        "hpke" or "commitment".

    Raises
    ------
    FidesError
        If the bundle cannot be used, or no place for evidence is given.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        policy: EvidencePolicy,
        *,
        verifier_url: str = "",
        evidence: str | Path | None = None,
        identity: Ed25519PrivateKey | None = None,
        scheme: Scheme = "hpke",
        settings: Settings | None = None,
        roots: TrustRoots | None = None,
        insecure_development: bool = False,
        trust: Trust | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self.judge = ClientJudge(bundle, settings)
        if trust is None:
            if not verifier_url and evidence is None:
                raise InputError("No evidence can be fetched.", "Give verifier_url, or a file as evidence.")
            source = EvidenceFile(evidence) if evidence is not None else EvidenceUrl(verifier_url, timeout_s)
            trust = Trust(policy, source, roots=roots, insecure_development=insecure_development)
        self.checker = ReceiptChecker(trust, identity, scheme, self.judge.bundle.n_classes)

    def prepare(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Query, NDArray[Any]]:
        """The query, and the tensor that the verifier sees."""
        query = Query(inputs)
        return query, query.inputs[self.judge.input_name(dict(query.inputs))]

    def finish(self, query: Query, pending: Pending, reply: Reply) -> Answer:
        """Check the receipt and judge the answer."""
        try:
            reference: Float32Array = self.checker.check(
                pending, reply.brought.receipt, reply.output, reply.brought.excuse
            )
        except Refusal as refusal:
            return self.judge.refuse(query, reply.output, refusal, reply.raw)
        return self.judge.judge(query, reply.output, reference, reply.raw)

    def worth_repeating(self, answer: Answer) -> bool:
        """Whether the verifier was started again since its evidence was fetched, and asking again is safe.

        It is not in the scheme "commitment": the reference comes in the clear, so a host that read it, dropped
        the receipt and started the verifier again would shape its second answer by it. The next request finds
        the new verifier.
        """
        if answer.refusal is None or answer.refusal.code not in _RESTARTED:
            return False
        try:
            restarted = self.checker.trust.renew()
        except (Refusal, ServerError):
            return False
        return restarted and self.checker.scheme != "commitment"
