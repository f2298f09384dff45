"""Verifiers for tests: in this process, behind real sockets, and under the hardware of our own PKI."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from typing_extensions import Self

from fides_plugins.attestation.evidence import Evidence, Tee
from fides_plugins.attestation.judge import Judge
from fides_plugins.attestation.policy import EvidencePolicy, SnpTcb
from fides_plugins.attestation.request import SignedRequest
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.attestation.verify import TrustRoots
from fides_plugins.builtin.verify import OnnxVerifier
from fides_plugins.bundle import Bundle, Manifest, write_bundle
from fides_plugins.enclave.connections import ServerLimits
from fides_plugins.enclave.serve import serve
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.settings import Settings
from fides_plugins.testing import memory_bundle
from fides_plugins.types import Float32Array, Query
from tests.support.pki import NOW_S, AmdPki, IntelPki, measurement_of, roots_of

IDENTITY = Ed25519PrivateKey.from_private_bytes(b"the client's identity in tests!!")
IDENTITY_PUBLIC = IDENTITY.public_key().public_bytes_raw()


def receipt_keys(verifier: Verifier) -> dict[bytes, Ed25519PublicKey]:
    """The key of a verifier's receipts by its id, as the verifier's evidence tells it."""
    statement = verifier.evidence().statement
    assert statement is not None
    return {statement.key_id: Ed25519PublicKey.from_public_bytes(statement.signing_key)}


def models_of(*bundles: Bundle, **rule: Any) -> dict[str, Any]:
    """The `models` of a policy that trusts these bundles, each for its own model."""
    return {b.manifest.name: {"bundle_digests": [b.digest], **rule} for b in bundles}


def reference_of(bundle: Bundle, tensor: NDArray[Any]) -> Float32Array:
    """What a verifier with this bundle answers, by the plug-in that a server without one runs."""
    plugin = OnnxVerifier()
    plugin.fides_configure(Settings(), bundle)
    return plugin.fides_verify(Query({"input": tensor})).probabilities


class PkiProvider:
    """Hardware of our own: a TEE whose quotes our own root vouches for."""

    def __init__(self, tee: Tee, intel: IntelPki, amd: AmdPki, measurement: str = "program") -> None:
        self.tee: Tee = tee
        self._intel = intel
        self._amd = amd
        self._measurement = measurement

    def report(self, report_data: bytes) -> Evidence:
        if self.tee == "sev-snp":
            report = self._amd.report(report_data, self._measurement)
            return Evidence(self.tee, report, vcek=self._amd.vcek, chain=self._amd.chain)
        return Evidence(self.tee, self._intel.quote(self.tee, report_data, self._measurement))


class Hardware:
    """One PKI for a test module, with what a client needs to trust it."""

    def __init__(self) -> None:
        self.intel = IntelPki()
        self.amd = AmdPki()

    @property
    def roots(self) -> TrustRoots:
        return roots_of(self.intel, self.amd)

    def verifier(
        self,
        bundle: Bundle,
        tee: Tee = "tdx",
        measurement: str = "program",
        options: VerifierOptions | None = None,
        clock: Callable[[], float] = lambda: NOW_S,
    ) -> Verifier:
        chosen = options or VerifierOptions(clients=frozenset((IDENTITY_PUBLIC,)))
        if tee in ("sgx", "tdx"):
            fields = {f: getattr(chosen, f) for f in chosen.__dataclass_fields__}
            chosen = VerifierOptions(**{**fields, "collateral": self.intel.collateral(tee)})
        return Verifier(bundle, PkiProvider(tee, self.intel, self.amd, measurement), chosen, clock=clock)

    def policy(
        self, bundle: Bundle, tee: Tee = "tdx", minimum_bundle_version: int = 0, **changes: object
    ) -> EvidencePolicy:
        values = {
            "measurements": [measurement_of(tee)],
            "models": models_of(bundle, minimum_bundle_version=minimum_bundle_version),
            "clients": [IDENTITY_PUBLIC.hex()],
            "snp_minimum_tcb": SnpTcb(bootloader=3, tee=0, snp=20, microcode=209),
        }
        return EvidencePolicy.model_validate({**values, **changes})


class Asked:
    """A client's request with the key that opens its answer."""

    def __init__(
        self,
        verifier: Verifier,
        tensor: NDArray[Any],
        scheme: str = "hpke",
        identity: Ed25519PrivateKey = IDENTITY,
        **changes: Any,
    ) -> None:
        self.key = X25519PrivateKey.generate()
        values: dict[str, Any] = {
            "key_id": verifier.key_id,
            **vars(Judge.of(verifier.bundle)),
            "input_digest": tensor_digest(tensor),
            "scheme": scheme,
            "client_key": self.key.public_key().public_bytes_raw() if scheme == "hpke" else None,
        }
        self.request = SignedRequest(**{**values, **changes})
        self.text = self.request.encode(identity)


class RunningVerifier:
    """A verifier behind a real socket, in a thread of this process.

    Attributes
    ----------
    http:
        Its `host:port`.
    """

    def __init__(self, verifier: Verifier, limits: ServerLimits | None = None) -> None:
        self.verifier = verifier
        self._limits = limits
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30), "the verifier did not start"
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop gracefully and wait for it."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(30)
            assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        await serve(self.verifier, "127.0.0.1", 0, self._limits, self._up, self._stop)

    def _up(self, port: int) -> None:
        self.http = f"127.0.0.1:{port}"
        self._ready.set()


IMAGE_28 = (1, 28, 28)


def digits_cnn(hidden: int = 24) -> bytes:
    """A CNN for 28 x 28 digits with random weights, of the size (0.75 MB) of a distilled MNIST verifier."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> Any:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return numpy_helper.from_array(rng.normal(0, scale, shape).astype(np.float32), name)

    flat = hidden * 2 * 14 * 14
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Flatten", ["r2"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["g"], transB=1),
        helper.make_node("Relu", ["g"], ["r3"]),
        helper.make_node("Gemm", ["r3", "w4"], ["logits"], transB=1),
    ]
    initializers = [
        weights("w1", hidden, 1, 3, 3),
        weights("w2", hidden * 2, hidden, 3, 3),
        weights("w3", 18, flat),
        weights("w4", 10, 18),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *IMAGE_28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def digits_bundle(folder: Path) -> Bundle:
    """A bundle of the size of a real MNIST one, with detector, re-classifier and calibration."""
    fake = memory_bundle()
    files = {name: fake.file(name) for name in fake.file_names}
    files["verification.onnx"] = digits_cnn()
    fields = {
        **fake.manifest.model_dump(),
        "name": "digits",
        "files": {},
        "input": {"name": "image", "dtype": "float32", "shape": (None, *IMAGE_28)},
        "verification": {**fake.manifest.model_dump()["verification"], "input_name": "image"},
    }
    return write_bundle(folder, Manifest.model_validate(fields), files)
