"""The host of docs/how-to/host.md: at most 60 lines, public names, installed by pip, attached, held to the contract."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.testing import Answered, HostCase, check_host, host_cases, make_bundle
from fides_plugins.types import Float32Array
from tests.support.docs_blocks import REPOSITORY, blocks
from tests.support.plugin_environments import make_environment

CASES = list(host_cases())
MODEL = """
from fides_plugins.testing import host_cases
(case,) = [c for c in host_cases() if c.name == {name!r}]
predict = case.service
"""
SERVE = """
import json, sys, threading
from pathlib import Path
from fides_pyfile import make_server
servers = {folder.name: make_server(folder) for folder in Path(sys.argv[1]).iterdir()}
for server in servers.values():
    threading.Thread(target=server.serve_forever).start()
print(json.dumps({name: server.server_address[1] for name, server in servers.items()}), flush=True)
sys.stdin.read()
for server in servers.values():
    server.shutdown()
"""


def page(title: str) -> str:
    (block,) = [b for b in blocks(REPOSITORY / "docs" / "how-to" / "host.md") if b.title == title]
    return block.text


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter for which the host is installed as a distribution."""
    root = tmp_path_factory.mktemp("pyfile")
    (root / "package").mkdir()
    for name in ("fides_pyfile.py", "pyproject.toml"):
        (root / "package" / name).write_text(page(name))
    return make_environment(root / "home", root / "package")


def fides(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), "-m", "fides_plugins.cli", *words], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def ports(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        folder = root / "served" / case.name
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(MODEL.format(name=case.name))
        make_bundle(root / "bundles" / case.name, **case.bundle_options())
        values = {"mode": case.settings.mode, "on_error": case.settings.on_error}
        values["plugins.load"] = ",".join(case.settings.plugins.load)
        chosen = [w for key, value in values.items() for w in ("--setting", f"{key}={value}")]
        done = fides(python, "attach", "pyfile", str(folder), str(root / "bundles" / case.name), *chosen)
        assert done.returncode == 0, done.stderr
    command = [str(python), "-c", SERVE, str(root / "served")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.communicate(timeout=30)


def test_it_is_short_and_uses_public_names_only() -> None:
    source = page("fides_pyfile.py")
    assert len(source.splitlines()) <= 60
    assert "._" not in source
    assert "import _" not in source


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_keeps_the_contract(ports: dict[str, int], case: HostCase) -> None:
    def ask(rows: Float32Array) -> Answered:
        body = json.dumps({"rows": rows.ravel().tolist(), "shape": rows.shape}).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{ports[case.name]}", body, timeout=30) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as refused:
            told = json.loads(refused.read())
            return Answered((), None) if told["code"] in (409, 503) and "label" not in told["fides"] else None
        return Answered(tuple(row["status"] for row in answer.get("fides", ())), np.array(answer["output"]))

    check_host(case, ask)


def test_what_cannot_work_is_said_by_attach(python: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    done = fides(python, "attach", "pyfile", str(tmp_path), str(tmp_path / "bundle"), "--setting", "mod=flag")
    assert done.returncode == 2
    assert "Did you mean 'mode'?" in " ".join(done.stderr.split())
    done = fides(python, "detach", "pyfile", str(tmp_path))
    assert done.returncode == 0
