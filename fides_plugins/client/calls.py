"""What every client is and offers, whatever server it asks: `infer`, `ask`, the alarm, closing, in two ways of waiting.

A question is written once, as a coroutine. `AsyncCalls` awaits it; in `Calls` nothing that it awaits ever suspends,
so that one step runs it to its end. A client of a server says how one question is put and answered (`_service`) and
how its connections are closed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import httpx
from numpy.typing import NDArray

from fides_plugins import oip
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.client.address import checked_address
from fides_plugins.client.core import ClientCore, Reply
from fides_plugins.client.judge import Answer
from fides_plugins.client.receipts import Brought, Pending
from fides_plugins.errors import InputError, ServerError
from fides_plugins.statistics.monitor import Alarm
from fides_plugins.types import Query, Verdict

if TYPE_CHECKING:
    from typing_extensions import Self


T = TypeVar("T")
ReceiptFrom = Literal["host", "verifier"]
_LONGEST_EXCUSE = 200


class Client(ABC):
    """What a client judges with, where its receipts come from, and what it has seen so far."""

    #: Why this kind of host cannot commit to its output before it is verified.
    _no_commitment: str

    def __init__(
        self,
        bundle: Bundle | str | Path,
        policy: EvidencePolicy,
        *,
        receipt_from: ReceiptFrom = "host",
        verifier_url: str = "",
        timeout_s: float = 10.0,
        **core: Any,
    ) -> None:
        if receipt_from == "verifier" and not verifier_url:
            raise InputError("The verifier's address is needed to ask it.", "Give verifier_url.")
        self.core = ClientCore(bundle, policy, verifier_url=verifier_url, timeout_s=timeout_s, **core)
        self.receipt_from: ReceiptFrom = receipt_from
        self._timeout_s = timeout_s
        if receipt_from == "verifier":
            manifest = self.core.judge.bundle.manifest
            model = quote(manifest.name, safe="")
            self._verifier_url = f"{checked_address(verifier_url, 'a verifier')}/v2/models/{model}/infer"
            self._verifier_input = manifest.input.name if manifest.input is not None else "input"
        if receipt_from == "host" and self.core.checker.scheme == "commitment":
            raise InputError(self._no_commitment, 'Use receipt_from="verifier" with this scheme, or the scheme "hpke".')

    @property
    def alarm(self) -> Alarm | None:
        """The service alarm of the monitor, or None."""
        return self.core.judge.alarm

    @property
    def refusals(self) -> Mapping[str, int]:
        """Refused receipts by code."""
        return self.core.judge.refusals

    @abstractmethod
    async def _service(self, query: Query, pending: Pending) -> Reply:
        """Ask the service, and read its answer."""

    @abstractmethod
    async def _post(self, **call: Any) -> httpx.Response:
        """A request over HTTP; the arguments are those of httpx."""

    async def _blocking(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of a call that may block."""
        return call(*arguments)

    async def _both(self, first: Awaitable[Reply], second: Awaitable[Brought]) -> tuple[Reply, Brought]:
        """What comes of two questions that need not wait for each other."""
        return await first, await second

    async def _ask(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        answer = await self._once(inputs)
        # Evidence is fetched again only where a receipt was refused.
        if answer.refusal is not None and await self._blocking(self.core.worth_repeating, answer):
            return await self._once(inputs)
        return answer

    async def _once(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        query, tensor = self.core.prepare(inputs)
        # Fetching and checking evidence blocks; it is rare.
        pending = await self._blocking(self.core.checker.begin, tensor)
        if self.receipt_from == "host":
            return self.core.finish(query, pending, await self._service(query, pending))
        if self.core.checker.scheme == "commitment":
            reply = await self._service(query, pending)
            brought = await self._receipt(tensor, pending, reply.output)
        else:
            receipt = self._receipt(tensor, pending)
            reply, brought = await self._both(self._service(query, pending), receipt)
        return self.core.finish(query, pending, replace(reply, brought=brought))

    async def _receipt(self, tensor: NDArray[Any], pending: Pending, committed: NDArray[Any] | None = None) -> Brought:
        """What the verifier brings when the client asks it; `committed` is the service's output, in that scheme.

        Whatever answers there may be the host: nothing but the receipt in the answer is believed.
        """
        parameters = {PARAMETER: pending.text}
        if committed is not None:
            parameters[COMMITMENT_PARAMETER] = self.core.checker.commitment(committed)
        body, headers = oip.request_body({self._verifier_input: tensor}, parameters=parameters)
        try:
            response = await self._post(url=self._verifier_url, content=body, headers=headers)
        except httpx.HTTPError as error:
            return Brought(None, f"no answer ({type(error).__name__})")
        try:
            outputs = oip.read_answer(response.content, response.headers.get(oip.JSON_LENGTH), (RECEIPT_OUTPUT,))
        except ServerError:
            outputs = {}
        receipt = oip.first_text(outputs, RECEIPT_OUTPUT)
        if receipt is not None:
            return Brought(receipt)
        # Foreign words, fit to be printed: one short line without control characters.
        words = "".join(c if c.isprintable() else " " for c in oip.read_error(response.content)[:_LONGEST_EXCUSE])
        return Brought(None, words or f"status {response.status_code}, no receipt")


class Calls(Client):
    """A client that waits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._http = httpx.Client(timeout=self._timeout_s)

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

    async def _post(self, **call: Any) -> httpx.Response:
        return self._http.post(**call)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self.core.judge.close()

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
        self._http = httpx.AsyncClient(timeout=self._timeout_s)

    async def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Verdict:
        """See `Calls.infer`."""
        return (await self._ask(inputs)).verdict

    async def ask(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        """See `Calls.ask`."""
        return await self._ask(inputs)

    async def _post(self, **call: Any) -> httpx.Response:
        return await self._http.post(**call)

    async def _blocking(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(call, *arguments)

    async def _both(self, first: Awaitable[Reply], second: Awaitable[Brought]) -> tuple[Reply, Brought]:
        return await asyncio.gather(first, second)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        self.core.judge.close()

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
