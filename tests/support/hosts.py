"""Hosts that answer with whatever bytes a test chooses, and clients that ask them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from types import TracebackType
from typing import Any

from typing_extensions import Self

from fides_plugins.attestation.evidence import Evidence
from fides_plugins.client import AsyncTorchServeClient, AsyncTritonClient, TorchServeClient, TritonClient
from fides_plugins.client.trust import Trust
from fides_plugins.testing import fake_logits, memory_bundle
from tests.support.pki import NOW_S
from tests.support.verifiers import IDENTITY, Hardware

ROWS = fake_logits(1)
#: Longer than any time-out here, shorter than a test may take.
SILENCE_S = 20.0


def reply(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


class Raw:
    """A socket that answers every request with the same bytes; with none it stays silent.

    Attributes
    ----------
    address:
        Its `host:port`.
    heard:
        What each connection said first; with TLS only what was understood.
    """

    def __init__(self, answer: bytes, pause_s: float = 0.0, tls: ssl.SSLContext | None = None) -> None:
        self._answer, self._pause_s, self._tls = answer, pause_s, tls
        self.heard: list[bytes] = []
        self._closed = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._socket.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._speak, args=(connection,), daemon=True).start()

    def _speak(self, connection: socket.socket) -> None:
        with connection:
            try:
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                if said := connection.recv(1 << 20):
                    self.heard.append(said)
                if not self._answer:
                    self._closed.wait(SILENCE_S)
                elif not self._pause_s:
                    connection.sendall(self._answer)
                    if self._tls is None:
                        connection.shutdown(socket.SHUT_WR)
                    # What stayed unread would reset the line, and with it take the answer back.
                    while connection.recv(1 << 20):
                        pass
                else:
                    for byte in self._answer:
                        connection.sendall(bytes((byte,)))
                        if self._closed.wait(self._pause_s):
                            return
            except OSError:
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._closed.set()
        self._socket.close()


class Known:
    """Evidence that was fetched when all was well."""

    challenges = True

    def __init__(self, hardware: Hardware) -> None:
        self.bundle = memory_bundle()
        self.verifier = hardware.verifier(self.bundle)
        self.trust = Trust(hardware.policy(self.bundle), self, roots=hardware.roots, clock=lambda: NOW_S)
        self.options: dict[str, Any] = {"trust": self.trust, "identity": IDENTITY}

    def fetch(self, challenge: bytes) -> Evidence:
        return Evidence.from_json(self.verifier.evidence(challenge).to_json())


def ask(known: Known, kind: Any, address: str, timeout_s: float = 1.0, tls: bool = False, **options: Any) -> Any:
    """One question to a host, of a client that waits or of one that does not."""
    prefix = "https://" if tls else "http://" if kind in (TorchServeClient, AsyncTorchServeClient) else ""
    arguments = (f"{prefix}{address}", "m", known.bundle, known.trust.policy)
    client = kind(*arguments, timeout_s=timeout_s, **known.options, **options)
    if kind in (TorchServeClient, TritonClient):
        with client:
            return client.ask({"input": ROWS})

    async def waiting() -> Any:
        async with client:
            return await client.ask({"input": ROWS})

    return asyncio.run(waiting())


CLIENTS = [TorchServeClient, AsyncTorchServeClient, TritonClient, AsyncTritonClient]
