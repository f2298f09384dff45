"""Real server processes: free ports, start, wait until ready, logs, and a stop that leaves nothing behind.

A server is a *tree* of processes: Triton starts one stub per python-backend instance, TorchServe a Java process
and its workers. Processes are ended only by the ids collected here, never by name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fides_plugins.errors import ServerError

try:
    import psutil
except ModuleNotFoundError:
    raise ServerError(
        "No server can be started here: the Python package psutil is not installed.",
        "Run `pip install 'fides-plugins[triton]'` or `pip install 'fides-plugins[torchserve]'`.",
    ) from None

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
_POLL_S = 0.05
_TRIES = 3
#: What Triton and TorchServe say when another process has taken a port.
_PORT_TAKEN = ("already in use", "failed to start grpc", "failed to start http", "failed to start metrics")


def free_ports(count: int) -> list[int]:
    """Return `count` different TCP ports that nobody listens on right now.

    Another process may take one before the server binds it, so a launcher should try again with
    new ports when its server dies because of a port.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((HOST, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def wait_until(
    ready: Callable[[], bool],
    timeout_s: float,
    what: str,
    alive: Callable[[], bool] = lambda: True,
    poll_s: float = _POLL_S,
) -> float:
    """Call `ready` until it says True; return the seconds it took.

    Parameters
    ----------
    ready:
        Any `OSError` it raises (refused connection, time-out) counts as "not yet".
    alive:
        Asked between two tries; when it says False waiting ends at once.

    Raises
    ------
    ServerError
        If the time is up, or `alive` says False.
    """
    start = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            if ready():
                return time.monotonic() - start
        if not alive():
            raise ServerError(f"{what} ended before it was ready.")
        if time.monotonic() - start > timeout_s:
            raise ServerError(f"{what} was not ready after {timeout_s:.0f} s.")
        time.sleep(poll_s)


def descendants(pid: int) -> list[int]:
    """Ids of all living descendants of `pid`, parents before children; empty where there is no such process."""
    return [child.pid for root in _found([pid]) for child in _below(root)]


def command_line(pid: int) -> list[str]:
    """The program and its arguments; empty where the process has ended or is not ours to see."""
    for process in _found([pid]):
        with contextlib.suppress(psutil.Error):
            return list(process.cmdline())
    return []


def stop_tree(pid: int, grace_s: float = 10.0, also: Sequence[int] = ()) -> None:
    """End a process and all its descendants, by id: SIGTERM to the root, SIGKILL after `grace_s`.

    An id that another process has taken meanwhile is left alone.

    Parameters
    ----------
    pid:
        Root of the tree.
    grace_s:
        How long the roots may take to end, seconds.
    also:
        Further ids to end with it, for daemons that left the tree (TorchServe writes such an id to a
        file).
    """
    roots = _found([pid, *also])
    tree = [*roots, *(child for root in roots for child in _below(root))]
    for root in roots:
        with contextlib.suppress(psutil.Error):
            root.terminate()
    _wait_for_end(roots, grace_s)
    # Children may outlive the root (a stub whose server was killed), so the tree of before is ended too.
    for process in tree:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait_for_end(tree, 5.0)


def _found(pids: Iterable[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def _below(root: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in root.children(recursive=True) if _lives(child)]
    return []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _wait_for_end(processes: Sequence[psutil.Process], seconds: float) -> None:
    # Not `psutil.wait_procs`: it would wait for zombies that are another process's to reap.
    deadline = time.monotonic() + seconds
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def resident_bytes(pids: Sequence[int]) -> int:
    """Sum of the resident memory of these processes, bytes (shared pages count once per process)."""
    return int(_total(pids, lambda process: process.memory_info().rss))


def cpu_seconds(pids: Sequence[int]) -> float:
    """Sum of the user and system time of these processes, seconds."""
    return _total(pids, lambda process: sum(process.cpu_times()[:2]))


def _total(pids: Sequence[int], measure: Callable[[psutil.Process], float]) -> float:
    total = 0.0
    for process in _found(pids):
        with contextlib.suppress(psutil.Error):
            total += measure(process)
    return total


@dataclass
class Process:
    """A started server: its process, its log and its own temporary folder.

    Use as a context manager; leaving it stops the whole tree and removes the temporary folder.

    Attributes
    ----------
    name:
        What people call the server, for messages ("Triton").
    command, env:
        As given to `subprocess.Popen`; `env` is laid over the current environment, and TMPDIR and TEMP
        are set to the private folder unless `env` sets them.
    cwd:
        Working folder, the private folder by default.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    grace_s: float = 10.0
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)
    _popen: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        """Private temporary folder; made on first use, removed by `stop`."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fides-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    @property
    def log_path(self) -> Path:
        """Standard output and error of the server, in one file."""
        return self.folder / "server.log"

    @property
    def pid(self) -> int:
        """Id of the root process."""
        if self._popen is None:
            raise ServerError(f"{self.name} was not started.")
        return self._popen.pid

    @property
    def tree(self) -> list[int]:
        """Ids of the root and of all its living descendants."""
        return [self.pid, *descendants(self.pid)]

    def log(self, lines: int = 30) -> str:
        """The end of the server's log; empty where there is none."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def running(self) -> bool:
        """Whether the root process lives."""
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C here does not reach it first.

        Raises
        ------
        ServerError
            If the program does not exist or cannot be executed.
        """
        env = {**os.environ, "TMPDIR": str(self.folder), "TEMP": str(self.folder), **self.env}
        with self.log_path.open("ab") as log:
            try:
                self._popen = subprocess.Popen(
                    list(self.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=self.cwd or self.folder,
                    start_new_session=True,
                )
            except OSError as error:
                raise ServerError(f"{self.name} cannot be started: {error.strerror}.") from error

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `ready` says True. On failure the end of the log is in the error."""
        try:
            wait_until(ready, timeout_s, self.name, alive=self.running)
        except ServerError as error:
            raise ServerError(f"{error} The end of its log:\n{self.log()}") from None

    def stop(self, also: Sequence[int] = ()) -> None:
        """Stop the whole tree and remove the temporary folder; may be called more than once."""
        if self._popen is not None:
            stop_tree(self._popen.pid, self.grace_s, also)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout=1)
            self._popen = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class Server(ABC):
    """A model server on free ports; a context manager, which starts it and stops it."""

    _process: Process | None = None

    @property
    def process(self) -> Process:
        """The running process tree, for memory and processor time."""
        if self._process is None:
            raise ServerError("The server is not running.", "Use it inside a with block.")
        return self._process

    def log(self, lines: int = 50) -> str:
        """The end of what the server wrote."""
        return self.process.log(lines)

    def start(self) -> Self:
        """Start the server and wait until all its models are ready.

        Raises
        ------
        ServerError
            If something is missing, or the server does not become ready; the end of its log is in the message.
        """
        for tries_left in reversed(range(_TRIES)):
            try:
                self._start_once()
                return self
            # Ctrl-C while waiting must not leave a server behind.
            except BaseException as error:
                log = self._process.log(1000).lower() if self._process is not None else ""
                self.stop()
                # Another process may take a port between looking for a free one and binding it.
                clash = isinstance(error, ServerError) and any(text in log for text in _PORT_TAKEN)
                if not clash or not tries_left:
                    raise
        raise AssertionError("unreachable")

    @abstractmethod
    def _start_once(self) -> None:
        """Set `_process` to a process with new ports, start it and wait until it is ready."""

    def stop(self) -> None:
        """Stop all of the server's processes, by id; may be called more than once."""
        if self._process is not None:
            self._process.stop(also=self._daemons(self._process))
            self._process = None

    def _daemons(self, process: Process) -> list[int]:
        """Ids of processes that left the tree."""
        return []

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()
