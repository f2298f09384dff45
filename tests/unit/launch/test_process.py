"""Free ports, process trees and logs of the launchers."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from fides_plugins.errors import ServerError
from fides_plugins.launch import torchserve
from fides_plugins.launch.process import (
    Process,
    cpu_seconds,
    descendants,
    free_ports,
    resident_bytes,
    stop_tree,
    wait_until,
)

# A parent that starts a child which ignores SIGTERM, prints its id and waits.
_STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
print("child", child.pid, flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_free_ports_are_different():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(1024 <= p < 65536 for p in ports)


def test_stop_ends_the_whole_tree_and_removes_the_folder():
    process = Process("Sample", [sys.executable, "-c", _STUBBORN], grace_s=1.0)
    with process:
        process.wait_ready(lambda: "child" in process.log(), 20)
        child = int(process.log().split()[-1])
        assert child in descendants(process.pid)
        folder, pid = process.folder, process.pid
        assert is_alive(child)
    assert not is_alive(pid)
    assert not is_alive(child)
    assert not folder.exists()


def test_a_process_that_dies_early_reports_its_log():
    process = Process("Sample", [sys.executable, "-c", "print('no licence'); raise SystemExit(3)"])
    with (
        process,
        pytest.raises(ServerError, match=r"ended before it was ready(.|\n)*no licence"),
    ):
        process.wait_ready(lambda: False, 20)


def test_a_missing_program_is_a_server_error():
    with (
        pytest.raises(ServerError, match="cannot be started"),
        Process("Sample", ["/nonexistent/program"]),
    ):
        pass


def test_wait_until_gives_up_and_counts_refused_connections_as_not_yet():
    def refused() -> bool:
        raise ConnectionRefusedError

    with pytest.raises(ServerError, match="not ready after 0 s"):
        wait_until(refused, 0.2, "Sample")


def test_stop_tree_ends_daemons_given_by_id():
    root = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stop_tree(root.pid, also=[daemon.pid])
    daemon.wait(timeout=5)
    time.sleep(0.05)
    assert not is_alive(root.pid)
    assert not is_alive(daemon.pid)


# As a TorchServe worker does: the notice of its death first, the traceback afterwards, line by line.
_SLOW_TRACEBACK = """
import time
def log(text):
    print("2026-01-01T00:00:00,000 [INFO ] W-9000-m_1.0-stdout MODEL_LOG - " + text, flush=True)
    time.sleep(0.1)
log("Backend worker process died.")
log("Traceback (most recent call last):")
for _ in range(6):
    log('  File "model_loader.py", line 108, in load')
log("ModuleNotFoundError: No module named 'absent'")
log("During handling of the above exception, another exception occurred:")
log("ImportError: Unable to load the handler")
time.sleep(60)
"""


def test_the_error_of_a_worker_is_read_when_its_traceback_is_whole(tmp_path, monkeypatch):
    (tmp_path / "m.mar").touch()
    monkeypatch.setattr(torchserve, "require_torchserve", lambda python: None)
    server = torchserve.TorchServeServer(tmp_path, {"m": "m.mar"})
    monkeypatch.setattr(server, "_command", lambda: [sys.executable, "-c", _SLOW_TRACEBACK])
    with pytest.raises(ServerError, match=r"No module named 'absent'; ImportError: Unable to load"):
        server.start()


def test_without_psutil_the_launcher_names_the_extra_to_install():
    code = """
import sys
sys.modules["psutil"] = None
from fides_plugins.errors import ServerError
from fides_plugins.cli.demo import _default_server
assert _default_server(quiet=True) == "inprocess"
try:
    import fides_plugins.launch.triton
except ServerError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'fides-plugins[triton]'" in done.stdout, done.stderr


def test_a_process_that_has_ended_has_no_memory_and_no_children():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert (descendants(ended.pid), resident_bytes([ended.pid]), cpu_seconds([ended.pid])) == ([], 0, 0.0)
    assert resident_bytes([os.getpid()]) > 2**20
    assert cpu_seconds([os.getpid()]) > 0
