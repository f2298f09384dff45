"""`fides serve-verifier` as a process of its own, and clients' requests to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.wire import PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.client.receipts import ReceiptChecker
from fides_plugins.client.trust import EvidenceUrl, Trust
from fides_plugins.errors import ServerError
from fides_plugins.oip import JSON_LENGTH, first_text, read_answer, request_body
from tests.support.verifiers import IDENTITY, IDENTITY_PUBLIC, IMAGE_28, models_of


class Process:
    """The command in a process of its own; free ports."""

    def __init__(
        self, folder: Path, *options: str, clients: tuple[str, ...] = ("--client", IDENTITY_PUBLIC.hex())
    ) -> None:
        command = [sys.executable, "-m", "fides_plugins.cli", "serve-verifier", "--bundle", str(folder)]
        command += ["--evidence", "development", *clients, "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stderr is not None
        self.errors: list[str] = []
        for line in self.process.stderr:
            self.errors.append(line)
            if found := re.search(r"HTTP on (\S+)", line):
                self.http = found[1]
                break
        else:
            raise AssertionError("".join(self.errors))
        self._drain = threading.Thread(target=self._read, daemon=True)
        self._drain.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    def memory_mb(self) -> float:
        """Resident memory."""
        return self._memory_mb("VmRSS")

    def peak_mb(self) -> float:
        """The most that was ever resident."""
        return self._memory_mb("VmHWM")

    def _memory_mb(self, name: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) / 1024  # type: ignore[union-attr]

    def stop(self) -> int:
        """SIGTERM, then the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def image(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).uniform(0, 1, (1, *IMAGE_28)).astype(np.float32)


def checker(server: Process, bundle: Bundle) -> ReceiptChecker:
    source = EvidenceUrl(f"http://{server.http}", timeout_s=60)
    rules = EvidencePolicy.model_validate({"models": models_of(bundle), "allow_any_client": True})
    return ReceiptChecker(Trust(rules, source, insecure_development=True), IDENTITY, "hpke", bundle)


def body(text: str, tensor: np.ndarray[Any, Any]) -> tuple[bytes, dict[str, str]]:
    return request_body({"image": tensor}, parameters={PARAMETER: text})


def receipt_in(response: httpx.Response) -> str | None:
    try:
        return first_text(read_answer(response.content, response.headers.get(JSON_LENGTH)), RECEIPT_OUTPUT)
    except ServerError:
        return None
