"""What every client is and offers, whatever server it asks: `infer`, `ask`, the alarm, closing, in two ways of waiting.

A question is written once, as a coroutine. `AsyncCalls` awaits it; in `Calls` nothing that it awaits ever suspends,
so that one step runs it to its end. A client of a server says how one question is put and answered (`_service`) and
how its connections are closed.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fides_plugins import oip
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import Scheme
from fides_plugins.attestation.verify import TrustRoots
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.client.address import checked_address
from fides_plugins.client.http import connections, exchange, remaining, wait, within
from fides_plugins.client.receipts import Brought, Pending, ReceiptChecker
from fides_plugins.client.trust import EvidenceFile, EvidenceUrl, Trust
from fides_plugins.errors import InputError, ServerError
from fides_plugins.observation.alarm import make_monitor
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.protection import Protection
from fides_plugins.settings import Settings
from fides_plugins.statistics.monitor import Alarm
from fides_plugins.types import Float32Array, Query, Verdict, Verification

if TYPE_CHECKING:
    from typing_extensions import Self


T = TypeVar("T")
ReceiptFrom = Literal["host", "verifier"]
_LONGEST_EXCUSE = 200
#: What an answer may hold besides its numbers, and for each number of its class output.
_ANSWER_BYTES = 1 << 20
_NUMBER_BYTES = 64


#: Refusals that a restart of the verifier explains: its evidence is then fetched anew, and the request repeated.
_RESTARTED = frozenset(("receipt-missing", "receipt-key", "receipt-start"))


@dataclass(frozen=True)
class Reply:
    """The service's class output, what came as its receipt, and the response itself."""

    output: NDArray[Any]
    brought: Brought
    raw: Any


@dataclass(frozen=True)
class Answer:
    """One answer and what is known about it.

    Attributes
    ----------
    verdict:
        Per row: status, score, p-value, what to use, why.
    output:
        The service's class output as it came, (N, K).
    raw:
        The response itself: httpx's, or tritonclient's where Triton is asked over gRPC.
    refusal:
        Why the receipt was refused; None where it was good.
    reference:
        The enclave's reference, (N, K) float32; None where the receipt was refused.
    """

    verdict: Verdict
    output: NDArray[Any]
    raw: Any
    refusal: Refusal | None
    reference: Float32Array | None


def printable(words: str) -> str:
    """A host's words, fit to be printed: one short line without control characters."""
    return "".join(c if c.isprintable() else " " for c in words[:_LONGEST_EXCUSE])


class Client(ABC):
    """Whom a client trusts, what it asks, what it judges with, and what it has seen so far.

    Parameters
    ----------
    bundle:
        Folder, or a loaded bundle: detector, re-classifier and calibration. Its verification model, if there is one,
        is not run.
    settings:
        Default: mode "correct", `on_error` "closed".
    policy, verifier_url, evidence, roots, insecure_development:
        Whom to trust: evidence comes from the file `evidence`, or from the verifier at `verifier_url`.
    receipt_from:
        "host": the server passes the request on and the receipt back. "verifier": the client asks the verifier.
    identity:
        The key that the verifier knows this client by.
    scheme:
        "hpke" or "commitment".
    trust:
        Verifiers that are trusted already, instead of evidence.
    timeout_s:
        For one question: evidence, answer, receipt and a repetition together.

    Attributes
    ----------
    alarm:
        Set once the sequence of answers shows that the service as a whole is under attack.
    refusals:
        Refused receipts by code.

    Raises
    ------
    FidesError
        If the bundle cannot be used, no place for evidence is given, or the options exclude each other.
    """

    #: Why this kind of host cannot commit to its output before it is verified.
    _no_commitment: str

    def __init__(
        self,
        bundle: Bundle | str | Path,
        policy: EvidencePolicy,
        *,
        receipt_from: ReceiptFrom = "host",
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
        if receipt_from == "verifier" and not verifier_url:
            raise InputError("The verifier's address is needed to ask it.", "Give verifier_url.")
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        chosen = settings or Settings(mode="correct", on_error="closed")
        # References come from the enclave; a client that also ran the model itself would need no enclave.
        self.protection = Protection.load(chosen, bundle=loaded, references="brought", concurrent=False)
        if trust is None:
            if not verifier_url and evidence is None:
                raise InputError("No evidence can be fetched.", "Give verifier_url, or a file as evidence.")
            source = EvidenceFile(evidence) if evidence is not None else EvidenceUrl(verifier_url, timeout_s)
            trust = Trust(policy, source, roots=roots, insecure_development=insecure_development)
        self.checker = ReceiptChecker(trust, identity, scheme, loaded)
        self.receipt_from: ReceiptFrom = receipt_from
        self.alarm: Alarm | None = None
        self.refusals: Counter[str] = Counter()
        self._monitor = make_monitor(chosen, loaded)
        self._lock = threading.Lock()
        self._timeout_s = timeout_s
        if receipt_from == "verifier":
            model, spec = quote(loaded.manifest.name, safe=""), loaded.manifest.input
            self._verifier_url = f"{checked_address(verifier_url, 'a verifier')}/v2/models/{model}/infer"
            self._verifier_input = spec.name if spec is not None else "input"
        elif scheme == "commitment":
            raise InputError(self._no_commitment, 'Use receipt_from="verifier" with this scheme, or the scheme "hpke".')

    @abstractmethod
    async def _service(self, query: Query, pending: Pending) -> Reply:
        """Ask the service, and read its answer."""

    @abstractmethod
    async def _http_call(self, n_rows: int, **call: Any) -> httpx.Response:
        """A request over HTTP about so many rows; the arguments are those of httpx."""

    def _longest_answer(self, n_rows: int) -> int:
        """Bytes of the longest answer about so many rows: no honest one has more for a number, whatever its form."""
        return _ANSWER_BYTES + _NUMBER_BYTES * n_rows * self.checker.n_classes

    async def _blocking(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of a call that may block."""
        return call(*arguments)

    async def _both(
        self, first: Coroutine[Any, Any, Reply], second: Coroutine[Any, Any, Brought]
    ) -> tuple[Reply, Brought]:
        """What comes of two questions that need not wait for each other."""
        try:
            return await first, await second
        finally:
            second.close()  # where the first one failed, it was never asked

    async def _ask(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        with within(self._timeout_s):
            answer = await self._once(inputs)
            # Evidence is fetched again only where a receipt was refused.
            if answer.refusal is not None and await self._blocking(self.worth_repeating, answer):
                return await self._once(inputs)
            return answer

    async def _once(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        query = Query(inputs)
        tensor = query.tensor(self.protection.input_name)
        # Fetching and checking evidence blocks; it is rare.
        pending = await self._blocking(self.checker.begin, tensor)
        if self.receipt_from == "host":
            return self.finish(query, pending, await self._service(query, pending))
        if self.checker.scheme == "commitment":
            reply = await self._service(query, pending)
            brought = await self._receipt(tensor, pending, reply.output)
        else:
            receipt = self._receipt(tensor, pending)
            reply, brought = await self._both(self._service(query, pending), receipt)
        return self.finish(query, pending, replace(reply, brought=brought))

    async def _receipt(self, tensor: NDArray[Any], pending: Pending, committed: NDArray[Any] | None = None) -> Brought:
        """What the verifier brings when the client asks it; `committed` is the service's output, in that scheme.

        Whatever answers there may be the host: nothing but the receipt in the answer is believed.
        """
        parameters = {PARAMETER: pending.text}
        if committed is not None:
            parameters[COMMITMENT_PARAMETER] = self.checker.commitment(committed)
        body, headers = oip.request_body({self._verifier_input: tensor}, parameters=parameters)
        try:
            call = {"method": "POST", "url": self._verifier_url, "content": body, "headers": headers}
            response = await self._http_call(len(tensor), **call)
        except httpx.HTTPError as error:
            return Brought(None, f"no answer ({type(error).__name__})")
        try:
            outputs = oip.read_answer(response.content, response.headers.get(oip.JSON_LENGTH), (RECEIPT_OUTPUT,))
        except ServerError:
            outputs = {}
        receipt = oip.first_text(outputs, RECEIPT_OUTPUT)
        if receipt is not None:
            return Brought(receipt)
        words = printable(oip.read_error(response.content))
        return Brought(None, words or f"status {response.status_code}, no receipt")

    def finish(self, query: Query, pending: Pending, reply: Reply) -> Answer:
        """Check the receipt and judge the answer; where it is refused, every row is attacked, with nothing to use."""
        try:
            reference = self.checker.check(pending, reply.brought.receipt, reply.output, reply.brought.excuse)
        except Refusal as refusal:
            with self._lock:
                self.refusals[refusal.code] += 1
            refused = self.protection.refuse(query, refusal.reason)
            return Answer(refused, reply.output, reply.raw, refusal, None)
        brought = VerifyOutcome(Verification.single(reference, "enclave"))
        verdict = self.protection.judge(query, reply.output, brought)
        if self._monitor is not None:
            with self._lock:
                self.alarm = self._monitor.update(verdict.p_value) or self.alarm
        return Answer(verdict, reply.output, reply.raw, None, reference)

    def reset(self) -> None:
        """After an incident: no alarm, and the evidence for one starts again."""
        with self._lock:
            self.alarm = None
            if self._monitor is not None:
                self._monitor.reset()

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


class Calls(Client):
    """A client that waits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._http = connections(self._timeout_s)

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Verdict:
        """Ask the service and give the verdict on its answer.

        Parameters
        ----------
        inputs:
            Name to tensor, rows first.

        Raises
        ------
        ServerError
            If the service gave no answer. An answer that may not be used is a verdict, not an error.
        Refusal
            If no verifier is trusted.
        """
        return self.ask(inputs).verdict

    def ask(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        """Like `infer`, with the raw response and the reference beside the verdict."""
        return _run(self._ask(inputs))

    async def _http_call(self, n_rows: int, **call: Any) -> httpx.Response:
        return wait(exchange(self._http, remaining(self._timeout_s), self._longest_answer(n_rows), **call))

    def close(self) -> None:
        """Close the connections."""
        wait(self._http.aclose())
        self.protection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncCalls(Client):
    """A client for asyncio: many requests may be under way at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._http = connections(self._timeout_s)

    async def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Verdict:
        """See `Calls.infer`."""
        return (await self._ask(inputs)).verdict

    async def ask(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        """See `Calls.ask`."""
        return await self._ask(inputs)

    async def _http_call(self, n_rows: int, **call: Any) -> httpx.Response:
        return await exchange(self._http, remaining(self._timeout_s), self._longest_answer(n_rows), **call)

    async def _blocking(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(call, *arguments)

    async def _both(
        self, first: Coroutine[Any, Any, Reply], second: Coroutine[Any, Any, Brought]
    ) -> tuple[Reply, Brought]:
        found: tuple[Reply, Brought] = await asyncio.gather(first, second)
        return found

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        self.protection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a client that waits has nothing to suspend for")
