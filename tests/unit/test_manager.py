"""Plug-ins as they are installed: a fake distribution on disk with a good, a blocked and a broken one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fides_plugins.bundle import Bundle
from fides_plugins.errors import PluginError
from fides_plugins.manager import FidesPluginManager, create_plugin_manager
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, fake_query, fake_service

GOOD = """
from fides_plugins import Detection, hookimpl

@hookimpl
def fides_detect(service):
    always = [True] * service.n_rows
    return Detection([1.0] * service.n_rows, always, "always")
"""

ENTRY_POINTS = """[fides_plugins]
good = fake_good
blocked = fake_blocked
broken = fake_broken
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    info = site / "fake_fides-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-fides\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "fake_good.py").write_text(GOOD)
    (site / "fake_blocked.py").write_text("raise SystemError('a blocked plug-in must not even be imported')")
    (site / "fake_broken.py").write_text("import a_package_that_nobody_has_installed")
    monkeypatch.syspath_prepend(str(site))
    for name in ("fake_good", "fake_blocked", "fake_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return site


def test_good_is_loaded_blocked_is_not_imported_broken_is_reported(distribution: Path, session_bundle: Bundle):
    settings = Settings.from_mapping({"plugins": {"blocked": ["blocked"]}})
    manager = create_plugin_manager(settings, session_bundle)
    states = {p.name: p.state for p in manager.report.plugins}
    assert states == {
        "reclassifier": "loaded",
        "detector": "loaded",
        "verifier": "loaded",
        "good": "loaded",
        "blocked": "blocked",
        "broken": "failed",
    }
    broken = next(p for p in manager.report.plugins if p.name == "broken")
    assert "a_package_that_nobody_has_installed" in broken.detail
    assert "fake_blocked" not in sys.modules
    pipeline = Pipeline(settings, session_bundle, manager)
    logits = fake_logits()
    assert pipeline.run(fake_query(logits), fake_service(logits)).counts()["attacked"] == 8


@pytest.mark.parametrize("name", ["broken", "missing"])
def test_a_required_plugin_that_cannot_load_stops_start_up(distribution: Path, session_bundle: Bundle, name: str):
    settings = Settings.from_mapping({"plugins": {"blocked": ["blocked"], "required": [name]}})
    with pytest.raises(PluginError, match=name):
        create_plugin_manager(settings, session_bundle)


def test_a_required_plugin_that_is_blocked_stops_start_up(distribution: Path, session_bundle: Bundle):
    settings = Settings.from_mapping({"plugins": {"blocked": ["blocked", "good"], "required": ["good"]}})
    with pytest.raises(PluginError, match=r"not loaded: good.*unblock"):
        create_plugin_manager(settings, session_bundle)


def test_entry_points_can_be_switched_off(distribution: Path, session_bundle: Bundle):
    manager = create_plugin_manager(Settings.from_mapping({"plugins": {"entry_points": False}}), session_bundle)
    assert not manager.has_plugin("good")


def load(target: str) -> Settings:
    return Settings.from_mapping({"plugins": {"entry_points": False, "load": [target]}})


def test_a_configured_module_is_loaded(distribution: Path, session_bundle: Bundle):
    assert create_plugin_manager(load("fake_good"), session_bundle).has_plugin("fake_good")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("no_such_module", "no module 'no_such_module'"),
        ("fake_good:nothing", "has no 'nothing'"),
        ("fake_broken", "a_package_that_nobody_has_installed"),
    ],
)
def test_a_configured_module_that_cannot_load_stops_start_up(
    distribution: Path, session_bundle: Bundle, target: str, text: str
):
    with pytest.raises(PluginError, match=text):
        create_plugin_manager(load(target), session_bundle)


def make_plugin(source: str) -> object:
    namespace: dict[str, object] = {}
    exec("from fides_plugins import hookimpl\n" + source, namespace)  # noqa: S102  # source is written above
    return namespace["Plugin"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("class Plugin:\n  @hookimpl\n  def fides_detekt(self): ...", "Did you mean 'fides_detect'"),
        ("class Plugin:\n  @hookimpl\n  def fides_detect(self, servise): ...", "servise"),
        ("class Plugin:\n  def fides_detect(self): ...", "implements no hook"),
    ],
)
def test_a_plugin_that_does_not_fit_is_explained(source: str, text: str):
    manager = FidesPluginManager()
    with pytest.raises(PluginError, match=text):
        manager.add_plugin(make_plugin(source), "mine", "test")
    assert not manager.has_plugin("mine")


def test_a_name_can_be_used_once(session_bundle: Bundle):
    plugin = make_plugin("class Plugin:\n  @hookimpl\n  def fides_detect(self): ...")
    with pytest.raises(PluginError, match="Two plug-ins are called 'detector'"):
        create_plugin_manager(Settings(), session_bundle, {"detector": plugin})


def test_a_plugin_that_cannot_configure_itself_stops_start_up(session_bundle: Bundle):
    plugin = make_plugin("class Plugin:\n  @hookimpl\n  def fides_configure(self): raise KeyError('url')")
    with pytest.raises(PluginError, match=r"'mine' failed in fides_configure: KeyError"):
        create_plugin_manager(Settings(), session_bundle, {"mine": plugin})


def test_two_managers_share_nothing(session_bundle: Bundle):
    plugin = make_plugin("class Plugin:\n  @hookimpl\n  def fides_detect(self): ...")
    first = create_plugin_manager(Settings(), session_bundle, {"mine": plugin})
    second = create_plugin_manager(Settings(), session_bundle)
    assert first.has_plugin("mine")
    assert not second.has_plugin("mine")


def test_the_serving_path_imports_no_torch(bundle_folder: Path):
    code = f"""
import sys, types
# Triton's own module exists only inside its python backend.
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
import fides_plugins.serving.triton.verify, fides_plugins.serving.triton.validate
import fides_plugins.serving.torchserve.handler, fides_plugins.cli
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, fake_query, fake_service
pipeline = Pipeline.from_settings(Settings(bundle={str(bundle_folder)!r}, detector="both"))
logits = fake_logits()
assert pipeline.run(fake_query(logits), fake_service(logits)).counts()["trusted"] == 8
heavy = {{"torch", "sklearn", "onnx", "tensorflow", "pandas", "scipy", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
print("no torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "no torch", done.stderr
