"""Start a real TorchServe on free ports and stop it cleanly.

Used by the demo, the tests and the benchmarks. Three things that a plain `torchserve --start` gets
wrong here are handled: parallel servers share a process-id file unless each has its own TMPDIR; ending
the launcher leaves the Java process; and `/ping` says Healthy while no worker has ever loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from fides_plugins.errors import ServerError
from fides_plugins.launch.process import HOST, Process, Server, free_ports

#: TorchServe appends `.model_server.pid` to its temporary folder; it holds the Java process id.
PID_FILE = ".model_server.pid"
#: Seconds until TorchServe takes a worker that does not answer to be dead.
_RESPONSE_TIMEOUT_S = 60
_LOG_LINES = 2000
_WORKER_DIED = "Backend worker process died"
#: How long a dead worker's traceback is waited for, and how long nothing is written when it is whole.
_TRACEBACK_S = 5.0
_QUIET_S = 0.2
_PYTHON_ERROR = re.compile(r"MODEL_LOG - (\w[\w.]*(?:Error|Exception)\w*: .*)")


@dataclass(frozen=True)
class WorkerState:
    """What the management API says about one worker."""

    id: str
    ready: bool
    pid: int


def require_torchserve(python: str = sys.executable) -> None:
    """Check that TorchServe can run here.

    Raises
    ------
    ServerError
        If Java or the `torchserve` package is absent, with what to install.
    """
    java_home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(java_home) / "bin")) if java_home else shutil.which("java")
    if java is None:
        raise ServerError(
            "TorchServe needs Java 11 or newer, and no `java` was found.", "Install a JRE or set JAVA_HOME."
        )
    missing = [m for m in ("ts", "yaml", "torch") if python == sys.executable and importlib.util.find_spec(m) is None]
    if missing:
        raise ServerError(
            f"TorchServe cannot run: the Python package(s) {', '.join(missing)} are not installed.",
            "Run `pip install 'fides-plugins[torchserve]'`.",
        )


@dataclass(eq=False)
class TorchServeServer(Server):
    """A TorchServe process tree, as a context manager.

    Attributes
    ----------
    model_store:
        Folder with the archives.
    models:
        Served name to archive (a file name in `model_store`).
    batch_size:
        For every model; an archive's own model-config.yaml wins over it.
    python:
        Interpreter of the workers and the launcher.
    env:
        Further environment of the server.
    properties:
        Further lines of config.properties.
    ready_timeout_s:
        How long to wait until every worker has loaded its model, seconds.
    """

    model_store: Path
    models: Mapping[str, str]
    _: KW_ONLY
    batch_size: int = 1
    python: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 180.0
    _ports: list[int] = field(default_factory=list, init=False)

    @property
    def inference_url(self) -> str:
        """Root of the inference API."""
        return f"http://{HOST}:{self._ports[0]}"

    @property
    def management_url(self) -> str:
        """Root of the management API."""
        return f"http://{HOST}:{self._ports[1]}"

    @property
    def metrics_url(self) -> str:
        """Prometheus page."""
        return f"http://{HOST}:{self._ports[2]}/metrics"

    @property
    def grpc_target(self) -> str:
        """host:port of the gRPC inference API."""
        return f"{HOST}:{self._ports[3]}"

    def workers(self, model: str) -> list[WorkerState]:
        """State of a model's workers, as the management API tells it."""
        with urllib.request.urlopen(f"{self.management_url}/models/{model}", timeout=5) as answer:
            (description,) = json.load(answer)
        return [WorkerState(w["id"], w["status"] == "READY", int(w["pid"])) for w in description["workers"]]

    def _start_once(self) -> None:
        require_torchserve(self.python)
        missing = [a for a in self.models.values() if not (self.model_store / a).exists()]
        if missing:
            raise ServerError(f"The model store has no {', '.join(missing)}.", "Give archives that exist.")
        self._ports = free_ports(6)
        process = self._process = Process("TorchServe", self._command(), env=self._environment())
        (process.folder / "config.properties").write_text(self._config())
        process.command = [*process.command, "--ts-config", str(process.folder / "config.properties")]
        process.start()
        process.wait_ready(self._ready, self.ready_timeout_s)

    def _daemons(self, process: Process) -> list[int]:
        with contextlib.suppress(OSError, ValueError):
            return [int((process.folder / PID_FILE).read_text())]
        return []

    def _command(self) -> Sequence[str]:
        models = [f"{name}={archive}" for name, archive in self.models.items()]
        command = [self.python, "-m", "ts.model_server", "--start", "--foreground", "--no-config-snapshots"]
        return [*command, "--disable-token-auth", "--model-store", str(self.model_store.resolve()), "--models", *models]

    def _environment(self) -> dict[str, str]:
        # A user's own TS_CONFIG_FILE would win over the file written here.
        quiet = {"LOG_LOCATION": "logs", "METRICS_LOCATION": "logs", "PYTHONUNBUFFERED": "1"}
        hidden = {"TS_CONFIG_FILE": ""} if "TS_CONFIG_FILE" in os.environ else {}
        return {**quiet, **hidden, **self.env}

    def _config(self) -> str:
        inference, management, metrics, grpc_inference, grpc_management, worker = self._ports
        options = {
            "minWorkers": 1,
            "maxWorkers": 1,
            "batchSize": self.batch_size,
            "maxBatchDelay": 20,
            "responseTimeout": _RESPONSE_TIMEOUT_S,
        }
        # The version in an archive's manifest is not known here, so its options are given for the usual one.
        models = {name: {"1.0": {"marName": archive, **options}} for name, archive in self.models.items()}
        lines = {
            "inference_address": f"http://{HOST}:{inference}",
            "management_address": f"http://{HOST}:{management}",
            "metrics_address": f"http://{HOST}:{metrics}",
            "grpc_inference_address": HOST,
            "grpc_management_address": HOST,
            "grpc_inference_port": str(grpc_inference),
            "grpc_management_port": str(grpc_management),
            "initial_worker_port": str(worker),
            "default_workers_per_model": "1",
            "default_response_timeout": str(_RESPONSE_TIMEOUT_S),
            "metrics_mode": "prometheus",
            "model_metrics_auto_detect": "true",
            "disable_system_metrics": "true",
            "models": json.dumps(models),
            **self.properties,
        }
        return "".join(f"{key}={value}\n" for key, value in lines.items())

    def _ready(self) -> bool:
        # Workers that fail to load are started again for minutes; one death at start-up is enough to know.
        log = self.process.log(_LOG_LINES)
        if _WORKER_DIED in log:
            errors = self._errors_of_worker() or ["its log names no error"]
            raise ServerError(f"A TorchServe worker cannot load its model: {'; '.join(errors[:3])}.")
        for name in self.models:
            try:
                workers = self.workers(name)
            except urllib.error.HTTPError:
                return False
            if not workers or not all(w.ready for w in workers):
                return False
        return True

    def _errors_of_worker(self) -> list[str]:
        """The error lines of a worker that died.

        It announces its death first and writes the traceback afterwards, line by line: the log is read until
        an error stands there and nothing more is added, or the time is up.
        """
        deadline = time.monotonic() + _TRACEBACK_S
        log, before = self.process.log(_LOG_LINES), None
        while (log != before or not _PYTHON_ERROR.search(log)) and time.monotonic() < deadline:
            time.sleep(_QUIET_S)
            before, log = log, self.process.log(_LOG_LINES)
        return list(dict.fromkeys(_PYTHON_ERROR.findall(log)))
