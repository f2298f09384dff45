"""What every client is and offers, whatever server it asks: `infer`, `ask`, the alarm, closing, in two ways of waiting.

A client of a server says how one question is put and answered (`_once`) and how its connections are closed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import httpx
from numpy.typing import NDArray

from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.bundle import Bundle
from fides_plugins.client.core import ClientCore, Reply
from fides_plugins.client.judge import Answer
from fides_plugins.client.receipts import Brought, Pending
from fides_plugins.client.verifier_call import VerifierCall
from fides_plugins.errors import InputError
from fides_plugins.statistics.monitor import Alarm
from fides_plugins.types import Verdict

if TYPE_CHECKING:
    from typing_extensions import Self


ReceiptFrom = Literal["host", "verifier"]


class Client:
    """What a client judges with, where its receipts come from, and what it has seen so far."""

    #: Why this kind of host cannot commit to its output before it is verified.
    _no_commitment: str

    def __init__(
        self,
        bundle: Bundle | str | Path,
        policy: EvidencePolicy,
        *,
        receipt_from: ReceiptFrom,
        verifier_url: str,
        timeout_s: float,
        **core: Any,
    ) -> None:
        if receipt_from == "verifier" and not verifier_url:
            raise InputError("The verifier's address is needed to ask it.", "Give verifier_url.")
        self.core = ClientCore(bundle, policy, verifier_url=verifier_url, timeout_s=timeout_s, **core)
        self.receipt_from: ReceiptFrom = receipt_from
        self._timeout_s = timeout_s
        self._verifier: VerifierCall | None = None
        if receipt_from == "verifier":
            manifest = self.core.judge.bundle.manifest
            name = manifest.input.name if manifest.input is not None else "input"
            self._verifier = VerifierCall(verifier_url, manifest.name, name, self.core.checker)
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


class Calls(Client, ABC):
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
            If the service gave no answer. An answer that may not be used is no error but a verdict.
        Refusal
            If no verifier is trusted.
        """
        return self.ask(inputs).verdict

    def ask(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        """Like `infer`, with the raw response and the reference beside the verdict."""
        answer = self._once(inputs)
        return self._once(inputs) if self.core.worth_repeating(answer) else answer

    @abstractmethod
    def _once(self, inputs: Mapping[str, NDArray[Any]]) -> Answer: ...

    def _with_receipt(self, reply: Reply, tensor: NDArray[Any], pending: Pending) -> Reply:
        """The reply with what the verifier brings, where the client asks it."""
        verifier = self._verifier
        if verifier is None:
            return reply
        try:
            brought = verifier.read(self._http.post(**verifier.request(tensor, pending, reply.output)))
        except httpx.HTTPError as error:
            brought = verifier.no_answer(error)
        return replace(reply, brought=brought)

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


class AsyncCalls(Client, ABC):
    """A client for asyncio: many requests may be under way at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._http = httpx.AsyncClient(timeout=self._timeout_s)

    async def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Verdict:
        """See `Calls.infer`."""
        return (await self.ask(inputs)).verdict

    async def ask(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        """See `Calls.ask`."""
        answer = await self._once(inputs)
        # Fetching evidence again blocks, so it happens in a thread; it is rare.
        if answer.refusal is not None and await asyncio.to_thread(self.core.worth_repeating, answer):
            return await self._once(inputs)
        return answer

    @abstractmethod
    async def _once(self, inputs: Mapping[str, NDArray[Any]]) -> Answer: ...

    async def _receipt(
        self, verifier: VerifierCall, tensor: NDArray[Any], pending: Pending, output: NDArray[Any] | None
    ) -> Brought:
        """What the verifier brings when the client asks it."""
        try:
            return verifier.read(await self._http.post(**verifier.request(tensor, pending, output)))
        except httpx.HTTPError as error:
            return verifier.no_answer(error)

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
