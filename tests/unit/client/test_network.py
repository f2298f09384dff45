"""Where a client's requests go: to the address that was given and nowhere else, over TLS with the system's roots."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fides_plugins.attestation.evidence import Evidence
from fides_plugins.client import AsyncTorchServeClient, AsyncTritonClient, TorchServeClient, TritonClient
from fides_plugins.client.trust import EvidenceUrl
from fides_plugins.errors import ServerError
from tests.support.hosts import CLIENTS, Known, Raw, ask, reply
from tests.support.verifiers import Hardware


@pytest.fixture(scope="module")
def known() -> Known:
    return Known(Hardware())


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_of_the_environment_is_asked(known: Known, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    with Raw(reply(b"{}")) as proxy, Raw(reply(b"no tensors")) as host:
        monkeypatch.setenv(name, f"http://{proxy.address}")
        for kind in CLIENTS:
            with pytest.raises(ServerError):
                ask(known, kind, host.address)
        evidence = known.fetch(bytes(32)).to_json().encode()
        with Raw(reply(evidence)) as verifier:
            assert EvidenceUrl(f"http://{verifier.address}", 5.0).fetch(bytes(32)).statement is not None
        assert len(host.heard) == len(CLIENTS)
        assert proxy.heard == []


@pytest.mark.parametrize("name", ["http_proxy", "grpc_proxy"])
@pytest.mark.parametrize("kind", [TritonClient, AsyncTritonClient])
def test_no_proxy_of_the_environment_is_asked_over_grpc(
    known: Known, monkeypatch: pytest.MonkeyPatch, kind: Any, name: str
) -> None:
    with Raw(b"") as proxy, Raw(b"") as host:
        monkeypatch.setenv(name, f"http://{proxy.address}")
        with pytest.raises(ServerError, match="no answer"):
            ask(known, kind, host.address, protocol="grpc", output="logits")
        assert host.heard
        assert proxy.heard == []


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect"])
def test_nobody_is_sent_elsewhere(known: Known, status: str) -> None:
    with Raw(reply(b"{}")) as elsewhere:
        moved = reply(b"", status, f"Location: http://{elsewhere.address}/\r\nConnection: close\r\n")
        with Raw(moved) as host:
            for kind in CLIENTS:
                with pytest.raises(ServerError):
                    ask(known, kind, host.address)
            with pytest.raises(ServerError, match="with status"):
                EvidenceUrl(f"http://{host.address}", 5.0).fetch(bytes(32))
        assert elsewhere.heard == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A server's certificate for 127.0.0.1 that is its own root, in PEM, and TLS with it."""
    folder = tmp_path_factory.mktemp("tls")
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "host")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "root.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "root.pem", folder / "key.pem")
    return folder / "root.pem", context


def test_certificates_are_checked_and_a_root_of_ones_own_can_be_named(
    known: Known, certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, tls = certificate
    document = known.fetch(bytes(32)).to_json().encode()
    with Raw(reply(document, more="Connection: close\r\n"), tls=tls) as host:
        url = f"https://{host.address}"
        for kind in (TorchServeClient, AsyncTorchServeClient):
            with pytest.raises(ServerError, match="ConnectError"):
                ask(known, kind, host.address, tls=True)
        with pytest.raises(ServerError, match="ConnectError"):
            EvidenceUrl(url, 5.0).fetch(bytes(32))
        assert host.heard == []
        monkeypatch.setenv("SSL_CERT_FILE", str(root))
        assert EvidenceUrl(url, 5.0).fetch(bytes(32)) == Evidence.from_json(document)
        for kind in CLIENTS:
            with pytest.raises(ServerError, match=r"cannot be decoded|another form|the outputs"):
                ask(known, kind, host.address, tls=True)
        assert len(host.heard) == 5


GRPC = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import grpc
from tritonclient.grpc import service_pb2
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.client import TritonClient
from fides_plugins.testing import memory_bundle

folder = Path(sys.argv[1])
credentials = grpc.ssl_server_credentials([((folder / "key.pem").read_bytes(), (folder / "root.pem").read_bytes())])
live = grpc.unary_unary_rpc_method_handler(
    lambda request, context: service_pb2.ServerLiveResponse(live=True),
    service_pb2.ServerLiveRequest.FromString,
    service_pb2.ServerLiveResponse.SerializeToString,
)
server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers(
    (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ServerLive": live}),)
)
address = f"grpcs://127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
server.start()
client = TritonClient(address, "m", memory_bundle(), EvidencePolicy(), evidence="none", protocol="grpc")
try:
    print(client._connect(1).is_server_live(client_timeout=5))
except Exception as error:
    print("refused")
"""


@pytest.mark.parametrize("named", [False, True])
def test_certificates_are_checked_over_grpc_as_well(
    certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """In a process of its own: gRPC reads its roots once."""
    root, _ = certificate
    if named:
        monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(root))
    done = subprocess.run([sys.executable, "-c", GRPC, str(root.parent)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == ("True" if named else "refused"), done.stderr
