"""Everything between a client and a verifier, each part real, with the host's proxies on both sides.

    client -> front (proxy of the host) -> Triton -> plug-in `remote` -> back (proxy of the host) -> verifier

The verifier's evidence comes from the hardware of our own PKI (`tests/support/pki.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.wire import RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.client import TritonClient
from fides_plugins.client.trust import EvidenceUrl, Trust
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.launch.triton import TritonServer
from fides_plugins.testing import fake_logits
from tests.support.lying_host import LyingHost, Message
from tests.support.pki import NOW_S
from tests.support.triton_models import images, set_parameter, template_repository
from tests.support.verifiers import IDENTITY, Hardware

MODEL = "digits__fides"


@dataclass
class World:
    """Everything between a client and a verifier."""

    hardware: Hardware
    folder: Path
    bundle: Bundle
    verifier: Verifier
    verifier_url: str
    triton: TritonServer
    front: LyingHost
    back: LyingHost

    def trust(self, **changes: Any) -> Trust:
        return Trust(
            self.hardware.policy(self.bundle, **changes),
            EvidenceUrl(f"http://{self.back.url}"),
            roots=self.hardware.roots,
            clock=lambda: NOW_S,
        )

    def client(self, **options: Any) -> TritonClient:
        chosen: dict[str, Any] = {"identity": IDENTITY, "trust": self.trust(), **options}
        return TritonClient(self.front.url, MODEL, self.bundle, chosen["trust"].policy, **chosen)

    def direct(self, scheme: str) -> TritonClient:
        """A client that asks the verifier itself, through the host's proxy."""
        return self.client(scheme=scheme, receipt_from="verifier", verifier_url=f"http://{self.back.url}")


def enclave_repository(target: Path, verifier_url: str) -> Path:
    """The template, with the plug-in `remote` in place of the model in the server, and FIDES_RECEIPT handed out."""
    repository = template_repository(target)
    verify = repository / "fides_verify" / "config.pbtxt"
    set_parameter(verify, "fides.plugins.options.remote.url", f"http://{verifier_url}")
    set_parameter(verify, "fides.plugins.blocked", "verifier")
    for model, line in (
        ("fides_validate", '  { name: "FIDES_REASON" data_type: TYPE_STRING dims: [ 1 ] }\n'),
        (MODEL, '  { name: "FIDES_REASON" data_type: TYPE_STRING dims: [ 1 ] }\n'),
        (MODEL, '      output_map { key: "FIDES_REASON" value: "FIDES_REASON" }\n'),
    ):
        config = repository / model / "config.pbtxt"
        text = config.read_text()
        assert text.count(line) == 1
        separator = "," if "data_type" in line else ""
        more = line.replace("FIDES_REASON", RECEIPT_OUTPUT)
        config.write_text(text.replace(line, line.rstrip("\n") + separator + "\n" + more))
    return repository


def rows(n: int, seed: int = 5) -> NDArray[np.float32]:
    return images(fake_logits(n, 10, seed=seed))


def logits_of(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.log(np.maximum(probabilities, 1e-9)).astype(np.float32)


def lie_with(change: Any) -> Any:
    """A hook that changes the service's logits."""

    def hook(message: Message) -> Message:
        message.tensors["logits"] = np.asarray(change(message.tensors["logits"]), dtype=np.float32)
        return message

    return hook


def swap_top_two(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    lie = logits.copy()
    for row in lie:
        a, b = np.argsort(row)[-2:]
        row[[a, b]] = row[[b, a]]
    return lie


def refused(client: TritonClient, query: dict[str, NDArray[Any]]) -> str:
    """The reason for which an answer is refused; nothing of it may be usable."""
    answer = client.ask(query)
    assert answer.refusal is not None
    verdict = answer.verdict
    assert verdict.status_text.tolist() == ["attacked"] * verdict.n_rows
    assert verdict.refused.all()
    assert (verdict.label == -1).all()
    assert not verdict.probabilities.any()
    assert verdict.reason[0].startswith(f"{answer.refusal.code}: ")
    assert client.refusals[answer.refusal.code] >= 1
    return answer.refusal.code
