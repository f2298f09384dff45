"""The import check runs a stranger's code, which writes into its scratch folder only; what is read is bounded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fides_plugins.cli import app
from fides_plugins.errors import InputError
from fides_plugins.serving.torchserve import confine, probe
from fides_plugins.serving.torchserve.archive import MANIFEST, open_archive
from fides_plugins.serving.torchserve.attach import RECORD, attach, detach
from fides_plugins.serving.torchserve.build import build_archive

HANDLER = """
class Handler:
    def initialize(self, context): ...
    def handle(self, data, context): return self.inference(data)
    def inference(self, data): return data
"""
#: Code of an archive that does something to the one who attaches it; "{home}" is a folder of that person's.
DEEDS = {
    "writes": "open('{home}/new', 'w')",
    "appends": "open('{home}/mine', 'a').write('x')",
    "truncates": "import os; os.truncate('{home}/mine', 0)",
    "removes": "import os; os.remove('{home}/mine')",
    "renames": "import os; os.rename('{home}/mine', '{home}/other')",
    "makes a folder": "import os; os.mkdir('{home}/new')",
    "links": "import os; os.symlink('/etc/passwd', '{home}/new')",
    "starts a program": "import subprocess; subprocess.run('echo x > {home}/new', shell=True)",
    "connects": "import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
    "kills": "import os; os.kill({pid}, 9)",
}
needs_landlock = pytest.mark.skipif(confine.landlock_version() < 6, reason="this kernel's Landlock is too old")


@needs_landlock
@pytest.mark.parametrize("deed", DEEDS)
def test_code_of_the_archive_does_nothing_to_others(tmp_path: Path, bundle_folder: Path, deed: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine").write_text("kept")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            line = DEEDS[deed].format(home=home, port=server.getsockname()[1], pid=victim.pid)
            source = f"try:\n    {line}\nexcept OSError:\n    pass\n{HANDLER}"
            plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": source})
            assert attach(plain, bundle_folder, tmp_path / "b.mar").handler
            with pytest.raises(TimeoutError):
                server.accept()
        assert victim.poll() is None
        victim.communicate(b"\n")
    assert [(p.name, p.read_text()) for p in home.iterdir()] == [("mine", "kept")]


@needs_landlock
def test_code_of_the_archive_sees_no_secret_of_the_environment(
    tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_SECRET_KEY", "secret")
    source = "import os\nassert 'CLOUD_SECRET_KEY' not in os.environ\nassert os.environ['HOME'] != '~'\n"
    source += "open(os.path.join(os.environ['HOME'], 'cache'), 'w')\nopen(os.devnull, 'w')\n" + HANDLER
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": source})
    assert attach(plain, bundle_folder, tmp_path / "b.mar").handler


@needs_landlock
def test_what_the_archives_code_started_is_ended_with_it(tmp_path: Path, bundle_folder: Path) -> None:
    token = f"fides-left-{os.getpid()}-{time.monotonic_ns()}"
    source = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {token!r}])\n"
    )
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": source + HANDLER})
    assert attach(plain, bundle_folder, tmp_path / "b.mar").handler

    def running() -> bool:
        commands = (p / "cmdline" for p in Path("/proc").iterdir() if p.name.isdigit())
        return any(token.encode() in c.read_bytes() for c in commands if c.exists())

    deadline = time.monotonic() + 5
    while running():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_landlock
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("while True: pass", "took more than"),
        ("while True: print('x' * 10**6)", "took more than|File too large"),
        ("print('fides-probe:' + '[' * 100000); raise SystemExit", "cannot be imported"),
        ("print('fides-probe:{}'); raise SystemExit", "cannot be imported"),
        ("b = bytearray(10**12)", "MemoryError"),
    ],
)
def test_code_that_never_ends_or_floods_is_ended(
    tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT_S", 5.0)
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": f"{line}\n{HANDLER}"})
    begin = time.monotonic()
    with pytest.raises(InputError, match=message):
        attach(plain, bundle_folder, tmp_path / "b.mar")
    assert time.monotonic() - begin < 20


def test_without_confinement_nothing_is_imported_and_attach_says_so(
    tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confine, "landlock_version", lambda: 0)
    source = f"open('{tmp_path}/new', 'w')\n{HANDLER}"
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": source})
    done = attach(plain, bundle_folder, tmp_path / "b.mar")
    assert not (tmp_path / "new").exists()
    assert not done.handler
    assert any("not imported" in note for note in done.notes)


#: Nine names, each a list of nine times the one before it: 9 ** 9 values in 700 bytes.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "config",
    [BOMB, "a: &a [*a]\n", "a: " + "[" * 30_000, "a: b\n" * 400_000, "x" * 10**7],
    ids=["aliases", "a cycle", "deep", "long", "one word"],
)
def test_a_yaml_bomb_is_refused_at_once(tmp_path: Path, bundle_folder: Path, config: str) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER}, config=config)
    begin = time.monotonic()
    with pytest.raises(InputError, match="config file"):
        attach(plain, bundle_folder, tmp_path / "b.mar", check_import=False)
    assert time.monotonic() - begin < 3


def test_honest_aliases_are_read(tmp_path: Path, bundle_folder: Path) -> None:
    config = "base: &base {minWorkers: 1}\nmore: *base\n"
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER}, config=config)
    attach(plain, bundle_folder, tmp_path / "b.mar", check_import=False)


@pytest.mark.parametrize("name", [MANIFEST, RECORD])
@pytest.mark.parametrize("content", [b"[" * 100_000, b" " * 20_000_000], ids=["deep", "long"])
def test_hostile_documents_of_an_archive_are_refused(
    tmp_path: Path, bundle_folder: Path, name: str, content: bytes
) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER})
    attach(plain, bundle_folder, tmp_path / "b.mar", check_import=False)
    whole = tmp_path / ("b.mar" if name == RECORD else "a.mar")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "c.mar", "w", 8) as out:
        for info in source.infolist():
            out.writestr(info.filename, content if info.filename == name else source.read(info))
    with pytest.raises(InputError, match=name):
        attach(tmp_path / "c.mar", bundle_folder, tmp_path / "d.mar", check_import=False)
    if name == RECORD:
        with pytest.raises(InputError, match=name):
            detach(tmp_path / "c.mar", tmp_path / "d.mar")


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER})
    with zipfile.ZipFile(plain, "a", zipfile.ZIP_DEFLATED) as out, out.open("zeros", "w") as sink:
        for _ in range(1100):
            sink.write(bytes(1 << 20))
    with pytest.raises(InputError, match="unpacks"), open_archive(plain):
        pass


def test_a_pipe_in_a_folder_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER})) as zipped:
        zipped.extractall(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "weights")
    with pytest.raises(InputError, match="weights"), open_archive(tmp_path / "a"):
        pass


def test_the_help_says_that_code_is_run() -> None:
    result = CliRunner().invoke(app, ["attach", "torchserve", "--help"], env={"COLUMNS": "200"})
    assert "code of the archive" in " ".join(result.stdout.split())
    assert result.exit_code == 0
