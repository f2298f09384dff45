"""Start and stop a real Triton Inference Server, from the wheel that PyPI carries.

The wheel `nvidia-pytriton` bundles `tritonserver` with its python backend. It is started here without
PyTriton itself: the python backend and its stub are put into one folder, the interpreter's shared
library and the wheel's libraries go on the loader's path, and the environment's `bin` folder comes first
on PATH, because the stub takes its site-packages from the `python3` that it finds there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from fides_plugins.errors import ServerError
from fides_plugins.launch.process import HOST, Process, Server, command_line, free_ports
from fides_plugins.serving.triton.operator.api import TritonApi

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
#: Lines that every start without a GPU logs as errors.
_HARMLESS = ("CudaDriverHelper", "NVML", "DCGM", "CUDA driver version")


def wheel_folder() -> Path:
    """Folder `tritonserver` of the wheel `nvidia-pytriton`.

    Raises
    ------
    ServerError
        If the wheel is not installed, or has no server for this platform and interpreter.
    """
    try:
        spec = importlib.util.find_spec("pytriton")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        where = f"{platform.system()} {platform.machine()}"
        raise ServerError(
            f"No Triton server is installed here ({where}): the wheel nvidia-pytriton is missing.",
            "Install it with: pip install 'fides-plugins[triton]' (Linux x86-64 with glibc 2.35 or newer only).",
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
    stub = folder / "python_backend_stubs" / _PYTHON
    for needed in (folder / "bin" / "tritonserver", stub):
        if not needed.exists():
            raise ServerError(
                f"The wheel nvidia-pytriton has no {needed.name!r} for Python {_PYTHON}.",
                "Use nvidia-pytriton 0.7.0 with Python 3.10 to 3.12.",
            )
    return folder


def is_available() -> bool:
    """Whether a Triton server can be started here."""
    with contextlib.suppress(ServerError):
        wheel_folder()
        return True
    return False


def _make_backends(target: Path) -> Path:
    """Put the python backend and the stub for this interpreter into `target/python`."""
    wheel = wheel_folder()
    backend = target / "python"
    shutil.copytree(wheel / "backends" / "python", backend, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(wheel / "python_backend_stubs" / _PYTHON, backend, dirs_exist_ok=True)
    return target


def _environment() -> dict[str, str]:
    wheel = wheel_folder()
    libraries = [
        str(sysconfig.get_config_var("LIBDIR") or ""),
        str(wheel.parent.parent / "nvidia_pytriton.libs"),
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(p for p in libraries if p),
        # Not `resolve()`: the symbolic link in a virtual environment is what makes it that environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).absolute().parent), os.environ.get("PATH", "")]),
    }


def _error_lines(log: str) -> str:
    """What a failed start is about: the error lines of Triton's log, which its tables would hide."""
    lines = [line for line in log.splitlines() if line.startswith("E") and not any(h in line for h in _HARMLESS)]
    return "\n".join(lines[:12]) or "\n".join(log.splitlines()[-12:])


@dataclass(eq=False)
class TritonServer(Server):
    """A real `tritonserver` on free ports; a context manager.

    Attributes
    ----------
    repository:
        Folder of models.
    explicit:
        Start in explicit model-control mode: models are loaded and unloaded over the API. `load` names
        the models to load at start ("*" for all).
    config_name:
        Start with `--model-config-name`: `configs/<name>.pbtxt` is used where a model has one.
    auto_complete:
        False adds `--disable-auto-complete-config`, which spares a second start of every python model
        but wants every config complete.
    env:
        Further environment variables.
    timeout_s:
        How long to wait until the server and its models are ready, seconds.
    grace_s:
        How long the server may take to stop before it is killed, seconds.

    Example
    -------
    >>> with TritonServer("model_repository") as server:  # doctest: +SKIP
    ...     server.api.ready()
    True
    """

    repository: str | os.PathLike[str]
    _: KW_ONLY
    explicit: bool = False
    load: Sequence[str] = ("*",)
    config_name: str = ""
    auto_complete: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    grace_s: float = 10.0
    http_port: int = field(default=0, init=False)
    grpc_port: int = field(default=0, init=False)
    metrics_port: int = field(default=0, init=False)
    _id: str = field(default="", init=False)

    @property
    def http_address(self) -> str:
        """`host:port` for `tritonclient.http`."""
        return f"{HOST}:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        """`host:port` for `tritonclient.grpc`."""
        return f"{HOST}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics."""
        return f"http://{HOST}:{self.metrics_port}/metrics"

    @property
    def api(self) -> TritonApi:
        """A light HTTP client for health, control, metadata, inference and metrics."""
        return TritonApi(self.http_address, metrics_url=self.metrics_url)

    def command(self, backends: Path) -> list[str]:
        """The full command line."""
        command = [str(wheel_folder() / "bin" / "tritonserver")]
        command += [
            f"--model-repository={Path(self.repository).resolve()}",
            f"--backend-directory={backends}",
            f"--http-address={HOST}",
            f"--grpc-address={HOST}",
            f"--metrics-address={HOST}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--id={self._id}",
            f"--backend-config=python,shm-region-prefix-name={self._id}",
        ]
        if self.explicit:
            command += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in self.load)]
        if self.config_name:
            command += [f"--model-config-name={self.config_name}"]
        if not self.auto_complete:
            command += ["--disable-auto-complete-config"]
        return command

    def _start_once(self) -> None:
        if not Path(self.repository).is_dir():
            raise ServerError(f"There is no model repository {str(self.repository)!r}.")
        self._id = f"fides-{uuid.uuid4().hex[:12]}"
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        process = Process("Triton", [], env={**_environment(), **self.env}, grace_s=self.grace_s)
        self._process = process
        process.command = self.command(_make_backends(process.folder / "backends"))
        process.start()
        try:
            process.wait_ready(self._is_ours_and_ready, self.timeout_s)
        except ServerError as error:
            raise ServerError(f"{error.cause_text.splitlines()[0]}\n{_error_lines(process.log(1000))}") from None

    def _is_ours_and_ready(self) -> bool:
        """Whether our own server is ready: another one may have taken the port first, and answer there."""
        if not self.api.ready() or self.api.server_name() != self._id:
            return False
        # The metrics come up last, and a server that cannot bind their port ends after it said "ready".
        try:
            self.api.metrics()
        except ServerError:
            return False
        return True

    def stop(self) -> None:
        """Stop the server and its stubs; may be called more than once."""
        super().stop()
        # A killed process leaves its shared memory behind.
        for region in Path("/dev/shm").glob(f"{self._id}*") if self._id else ():
            with contextlib.suppress(OSError):
                region.unlink()

    def stub_pids(self, model: str) -> list[int]:
        """Process ids of the python-backend instances of `model`, found among the server's children."""
        found = []
        for pid in self.process.tree[1:]:
            # The stub is started with the path of the model's file as its first argument.
            program, file = [*command_line(pid), "", ""][:2]
            if "stub" in program and model in Path(file).parts:
                found.append(pid)
        return found
