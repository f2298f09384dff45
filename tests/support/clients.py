"""A client that asks nobody: it judges answers whose receipts are good, or refused, as every client does."""

from __future__ import annotations

from typing import Any, NoReturn

from numpy.typing import NDArray

from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.bundle import Bundle
from fides_plugins.client.calls import Answer, Calls, Reply
from fides_plugins.client.receipts import Brought
from fides_plugins.settings import Settings
from fides_plugins.types import Float32Array, Query


class JudgingClient(Calls):
    """Brought each answer together with what its receipt holds."""

    def __init__(self, bundle: Bundle, settings: Settings | None = None) -> None:
        super().__init__(bundle, EvidencePolicy(), evidence="none", settings=settings)

    async def _service(self, *asked: Any) -> NoReturn:
        raise AssertionError("this client asks nobody")

    def judge(self, query: Query, output: NDArray[Any], brought: Float32Array | Refusal) -> Answer:
        """The answer to a query, with the reference of a good receipt or the refusal of another one."""

        def check(*receipt: Any) -> Float32Array:
            if isinstance(brought, Refusal):
                raise brought
            return brought

        self.checker.check = check  # type: ignore[method-assign]
        return self.finish(query, None, Reply(output, Brought(None), None))  # type: ignore[arg-type]
