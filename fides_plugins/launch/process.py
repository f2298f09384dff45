"""Real server processes: free ports, start, wait until ready, logs, and a stop that leaves nothing behind.

Shared by the Triton and the TorchServe launchers. A server is a *tree* of processes (Triton starts one
stub per python-backend instance, TorchServe a Java process and its workers), and processes are ended
only by the ids collected here, never by name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fides_plugins.errors import ServerError

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
_POLL_S = 0.05


def free_ports(count: int, host: str = HOST) -> list[int]:
    """Return `count` different TCP ports that nobody listens on right now.

    Another process may take one before the server binds it, so a launcher should try again with
    new ports when its server dies because of a port.
    """
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.bind((host, 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


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


def _parents() -> dict[int, int]:
    """Process id to parent id, for every process this user may see (Linux)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The command name may hold spaces and parentheses: fields count from the last ")".
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    return parents


def descendants(pid: int) -> list[int]:
    """Ids of all living descendants of `pid`, parents before children; empty off Linux."""
    if not Path("/proc/self/stat").exists():
        return []
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def is_alive(pid: int) -> bool:
    """Whether a process with this id exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return not Path("/proc/self/stat").exists()
    return bool(state) and state[0] != "Z"


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def stop_tree(pid: int, grace_s: float = 10.0, also: Sequence[int] = ()) -> None:
    """End a process and all its descendants, by id: SIGTERM to the root, SIGKILL after `grace_s`.

    Parameters
    ----------
    pid:
        Root of the tree.
    also:
        Further ids to end with it, for daemons that left the tree (TorchServe writes such an id to a
        file).
    """
    tree = descendants(pid)
    for extra in also:
        tree += [extra, *descendants(extra)]
    _signal_all([pid, *also], signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(is_alive(p) for p in (pid, *also)):
        _reap(pid)
        time.sleep(_POLL_S)
    # Children may outlive the root (a stub whose server was killed): they are ended by the ids from before.
    left = [p for p in (pid, *tree) if is_alive(p)]
    _signal_all(left, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and any(is_alive(p) for p in left):
        _reap(pid)
        time.sleep(_POLL_S)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError, OSError):
        os.waitpid(pid, os.WNOHANG)


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a log file; empty where there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def resident_bytes(pids: Sequence[int]) -> int:
    """Sum of the resident memory of these processes, bytes (shared pages count once per process)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def cpu_seconds(pids: Sequence[int]) -> float:
    """Sum of the user and system time of these processes, seconds."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


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

    def __post_init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._popen: subprocess.Popen[bytes] | None = None

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
        """The end of the server's log."""
        return tail(self.log_path, lines)

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
        env = {
            **os.environ,
            "TMPDIR": str(self.folder),
            "TEMP": str(self.folder),
            **self.env,
        }
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

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float = 60.0) -> float:
        """Wait until `ready` says True; return the seconds. On failure the log's end is in the error."""
        try:
            return wait_until(ready, timeout_s, self.name, alive=self.running)
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
