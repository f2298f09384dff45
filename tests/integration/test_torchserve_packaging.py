"""Archives built by `torch-model-archiver`, archives that bring the package along, and `fides check`."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fides_plugins.cli import app
from fides_plugins.errors import FidesError, InputError, ServerError
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.serving.torchserve.attach import attach
from fides_plugins.serving.torchserve.build import build_archive
from tests.support.paths import REPOSITORY
from tests.support.torchserve_models import CLASS, READ_BYTES, SERVICE, backdoor_bundle, body, plain_archive, post, rows

pytestmark = pytest.mark.integration

ARCHIVER = Path(sys.executable).with_name("torch-model-archiver")
#: What a server's Python without Fides would lack.
HIDDEN = ("fides", "__editable__.fides", "_fides", "pluggy", "pydantic", "onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("packaging")
    (made / "store").mkdir()
    (made / "sources").mkdir()
    backdoor_bundle(made / "bundle")
    (made / "sources" / "digits.py").write_text(CLASS)
    (made / "sources" / "common.py").write_text(SERVICE + READ_BYTES)
    return made


def archived(folder: Path, name: str, mode: str) -> None:
    """The README's way: no command of ours, only the archiver."""
    config = folder / "sources" / "model-config.yaml"
    config.write_text(f"minWorkers: 1\nfides:\n  handler: digits.py\n  bundle: bundle\n  mode: {mode}\n")
    extra = ",".join(str(p) for p in (folder / "sources/digits.py", folder / "sources/common.py", folder / "bundle"))
    command = [str(ARCHIVER), "--model-name", name, "--version", "1.0", "--force"]
    command += ["--handler", str(REPOSITORY / "handlers" / "fides_handler.py"), "--config-file", str(config)]
    command += ["--extra-files", extra, "--export-path", str(folder / "store")]
    subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TorchServeServer]:
    store = folder / "store"
    bare = plain_archive(store, name="bare")
    with zipfile.ZipFile(bare) as zipped:
        zipped.extractall(folder / "unpacked")
    with tarfile.open(folder / "packed.tar.gz", "w:gz") as tar:
        tar.add(folder / "unpacked", arcname="digits")
    for source, target in (("unpacked", "as_folder"), ("packed.tar.gz", "as_tar.tar.gz")):
        attach(folder / source, folder / "bundle", store / target, {"mode": "flag"})
    archived(folder, "archived", "flag")
    archived(folder, "observed", "observe")
    models = {p.stem: p.name for p in store.glob("*.mar")}
    models |= {"as_folder": "as_folder", "as_tar": "as_tar.tar.gz"}
    with TorchServeServer(store, models) as running:
        yield running


def check(server: TorchServeServer, folder: Path, model: str, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    request = folder / "request.json"
    request.write_text(json.dumps(body(rows(1)[0])))
    addresses = ["--management", server.management_url, "--metrics", server.metrics_url]
    command = ["check", "torchserve", server.inference_url, model, "--input", str(request), *addresses, "--json", *more]
    result = CliRunner().invoke(app, command)
    assert not isinstance(result.exception, FidesError), result.exception
    return result.exit_code, {f["what"]: f for f in json.loads(result.output)["findings"]}


@pytest.mark.parametrize("model", ["archived", "as_folder", "as_tar"])
def test_every_form_of_archive_is_served(server: TorchServeServer, model: str) -> None:
    for index, row in enumerate(rows(4, attacked=(2,))):
        bare, answer = post(server, "bare", row), post(server, model, row)
        assert answer.content == bare.content
        assert answer.headers["x-fides-status"] == ("attacked" if index == 2 else "trusted")


def test_check_sees_a_protected_model(server: TorchServeServer, folder: Path) -> None:
    code, steps = check(server, folder, "archived")
    assert code == 0
    assert {s["good"] for s in steps.values()} == {True}
    assert steps["workers"]["detail"] == "1 of 1 ready"
    assert "trusted" in steps["verdict"]["detail"]


def test_check_tells_observe_from_unprotected(server: TorchServeServer, folder: Path) -> None:
    code, steps = check(server, folder, "observed")
    assert code == 0
    assert "observe" in steps["verdict"]["detail"]
    code, steps = check(server, folder, "bare")
    assert code == 1
    assert "not protected" in steps["verdict"]["detail"]
    assert "attach torchserve" in steps["verdict"]["remedy"]
    # Other models of this server are counted, so the lines in config.properties are there.
    assert "metrics_mode" not in steps["verdict"]["remedy"] + steps["metrics"]["remedy"]


def test_check_names_what_is_wrong(server: TorchServeServer, folder: Path) -> None:
    code, steps = check(server, folder, "absent")
    assert code == 1
    assert "no model 'absent'" in steps["workers"]["detail"]
    assert steps["inference"]["good"] is False
    request = folder / "bad.json"
    request.write_text("[]")
    result = CliRunner().invoke(
        app, ["check", "torchserve", server.inference_url, "archived", "-i", str(request), "--json"]
    )
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_check_without_any_metrics_names_the_lines_once(folder: Path, tmp_path: Path) -> None:
    plain_archive(tmp_path, name="bare")
    with TorchServeServer(tmp_path, {"bare": "bare.mar"}) as server:
        code, steps = check(server, folder, "bare")
    assert code == 1
    assert steps["verdict"]["remedy"].startswith("Run `fides attach torchserve`")
    assert "metrics_mode" in steps["verdict"]["remedy"]
    assert steps["metrics"]["remedy"] == ""


def test_check_without_a_server_fails_in_one_line(folder: Path) -> None:
    (folder / "request.json").write_text("{}")
    command = ["check", "torchserve", "http://127.0.0.1:9", "m", "-i", str(folder / "request.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "cannot be reached" in " ".join(result.output.split())


def bare_python(folder: Path) -> Path:
    """An interpreter that has TorchServe and torch, and neither Fides nor what it needs."""
    root = folder / "server-python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    packages = next((root / "lib").glob("python*")) / "site-packages"
    for source in {Path(p) for p in (*site.getsitepackages(), sysconfig.get_path("purelib"))}:
        for entry in source.iterdir():
            hidden = entry.name.lower().startswith(HIDDEN) or entry.suffix == ".pth"
            if not hidden and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    return root / "bin" / "python"


def test_vendored_archive_runs_where_nothing_is_installed(folder: Path) -> None:
    python = bare_python(folder)
    for package in ("fides_plugins", "onnxruntime", "pydantic", "pluggy"):
        assert subprocess.run([str(python), "-c", f"import {package}"], capture_output=True).returncode != 0
    store = folder / "vendored"
    store.mkdir()
    plain = plain_archive(folder, name="plain")
    with pytest.raises(InputError, match="--vendor"):
        attach(plain, folder / "bundle", store / "out.mar", {"mode": "flag"}, python=str(python))
    done = attach(plain, folder / "bundle", store / "out.mar", {"mode": "flag"}, vendor=True, python=str(python))
    assert done.handler == "digits: class DigitHandler"
    with TorchServeServer(store, {"digits": "out.mar"}, python=str(python)) as server:
        for index, row in enumerate(rows(2, attacked=(1,))):
            answer = post(server, "digits", row)
            assert answer.headers["x-fides-status"] == ("attacked" if index else "trusted")


def test_missing_java_and_broken_models_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_archive(tmp_path / "broken.mar", "mine.py", {"mine.py": "import a_package_that_is_not_there\n"})
    with pytest.raises(ServerError, match="a_package_that_is_not_there"):
        TorchServeServer(tmp_path, {"broken": "broken.mar"}).start()
    with pytest.raises(ServerError, match="absent"):
        TorchServeServer(tmp_path, {"absent": "absent.mar"}).start()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ServerError, match="Java 11"):
        TorchServeServer(tmp_path, {"broken": "broken.mar"}).start()
