"""Which verifiers a client trusts at the moment: evidence fetched, checked, kept and renewed."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from functools import partial
from pathlib import Path
from typing import Protocol

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import to_text
from fides_plugins.attestation.verify import TrustedEvidence, TrustRoots, new_challenge, verify_evidence
from fides_plugins.client.address import checked_address
from fides_plugins.client.http import AnswerTooLong, connections, exchange, remaining, wait
from fides_plugins.errors import InputError, ServerError

_MAX_DOCUMENT = 1 << 20
#: Keys of earlier starts stay known, so that receipts under way when a verifier is replaced are still accepted.
_KEPT = 4
#: A host must not make a client fetch evidence as often as it likes by answering with nonsense.
_RENEWAL_PAUSE_S = 5.0
#: For another thread's evidence, where the caller has no time of its own.
_LONGEST_WAIT_S = 60.0


class EvidenceSource(Protocol):
    """Where evidence documents come from."""

    #: Whether a challenge can be bound into the evidence.
    challenges: bool

    def fetch(self, challenge: bytes) -> Evidence:
        """The document, with `challenge` bound where that is possible."""


class EvidenceUrl:
    """The evidence endpoint of a verifier."""

    challenges = True

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        self._url = f"{checked_address(url, 'a verifier')}/v2/fides/evidence"
        self._timeout_s = timeout_s

    def fetch(self, challenge: bytes) -> Evidence:
        """Fetch fresh evidence.

        Raises
        ------
        ServerError, Refusal
            If the endpoint cannot be reached, or gives no document.
        """
        try:
            reply = wait(self._get(to_text(challenge), remaining(self._timeout_s)))
        except AnswerTooLong as error:
            raise Refusal("evidence-malformed", f"The evidence at {self._url} is no document: {error}.") from None
        except httpx.HTTPError as error:
            raise ServerError(f"The evidence at {self._url} cannot be fetched ({type(error).__name__}).") from None
        if reply.status_code != 200:
            raise ServerError(f"The evidence at {self._url} was answered with status {reply.status_code}.")
        return Evidence.from_json(reply.content)

    async def _get(self, challenge: str, timeout_s: float) -> httpx.Response:
        call = {"method": "GET", "url": self._url, "params": {"challenge": challenge}}
        async with connections(timeout_s) as client:
            return await exchange(client, timeout_s, _MAX_DOCUMENT, **call)


class EvidenceFile:
    """A document that was brought here by other means; its age is what its host's clock says."""

    challenges = False

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def fetch(self, challenge: bytes) -> Evidence:
        """Read the file.

        Raises
        ------
        InputError, Refusal
            If it cannot be read, or is not an evidence document.
        """
        try:
            return Evidence.from_json(self._path.read_bytes())
        except OSError as error:
            raise InputError(f"Cannot read the evidence {self._path.name}: {error.strerror}.") from None


class Trust:
    """The verifiers that a policy trusts. Safe to use from several threads.

    Parameters
    ----------
    policy:
        What is demanded of evidence.
    source:
        Where it comes from.
    roots:
        Other roots than the vendors'; for tests.
    insecure_development:
        Accept development evidence, with a warning at each check.
    clock:
        Seconds since 1970 by this client's clock.
    """

    def __init__(
        self,
        policy: EvidencePolicy,
        source: EvidenceSource,
        *,
        roots: TrustRoots | None = None,
        insecure_development: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self._source = source
        self._verify = partial(verify_evidence, policy=policy, roots=roots, insecure_development=insecure_development)
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, TrustedEvidence] = OrderedDict()
        self._fetching: Future[TrustedEvidence] | None = None
        self._renewed = -_RENEWAL_PAUSE_S

    def current(self) -> TrustedEvidence:
        """The newest trusted evidence, fetched where there is none or it is too old.

        Raises
        ------
        Refusal, ServerError
            If there is no trusted evidence.
        """
        with self._lock:
            newest = next(reversed(self._known.values()), None)
        return self._fetch() if newest is None or self._expired(newest) else newest

    def renew(self) -> bool:
        """Fetch evidence again, at most once in a few seconds; whether it is of another start than before.

        Raises
        ------
        Refusal, ServerError
            If there is no trusted evidence any more.
        """
        with self._lock:
            if time.monotonic() - self._renewed < _RENEWAL_PAUSE_S:
                return False
            self._renewed = time.monotonic()
            before = next(reversed(self._known.values()), None)
        after = self._fetch()
        return before is None or _key(before) != _key(after)

    def keys(self) -> dict[bytes, Ed25519PublicKey]:
        """Keys by key id whose receipts may be believed now."""
        with self._lock:
            trusted = [e for e in self._known.values() if not self._expired(e)]
        return {_key(e): e.signing_key for e in trusted}

    def _fetch(self) -> TrustedEvidence:
        """Fetch evidence, or wait for what another thread fetches: a slow host holds up only those who have none."""
        with self._lock:
            others, mine = self._fetching, Future[TrustedEvidence]()
            self._fetching = others or mine
        if others is not None:
            try:
                return others.result(remaining(_LONGEST_WAIT_S))
            except TimeoutError:
                raise ServerError("The evidence did not come in time.") from None
        try:
            mine.set_result(self._fetched())
        except BaseException as error:
            mine.set_exception(error)
        with self._lock:
            self._fetching = None
        return mine.result()

    def _fetched(self) -> TrustedEvidence:
        challenge = new_challenge() if self._source.challenges else b""
        trusted = self._verify(self._source.fetch(challenge), now=self._clock(), challenge=challenge)
        if trusted.statement is None:
            raise Refusal("evidence-statement", "This evidence vouches for no key.")
        with self._lock:
            self._known[trusted.facts.evidence_id] = trusted
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return trusted

    def _expired(self, evidence: TrustedEvidence) -> bool:
        now = self._clock()
        return now > evidence.valid_until or now - evidence.dated_at > self.policy.maximum_age_s


def _key(evidence: TrustedEvidence) -> bytes:
    assert evidence.statement is not None  # `_fetch` keeps no other
    return evidence.statement.key_id
