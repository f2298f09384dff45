"""Shared by all tests. Integration fixtures live beside the tests that use them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fides_plugins.bundle import Bundle
from fides_plugins.settings import ENVIRONMENT_PREFIX
from fides_plugins.testing import make_bundle
from tests.support.paths import SHARED_DATA


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's FIDES_ variables must not change what the tests see."""
    for name in [n for n in os.environ if n.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of data that is not part of the repository; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared test data are not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def session_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One fake bundle for tests that only read it; its folder is `session_bundle_folder`."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A fresh fake bundle on disk, for tests that change it."""
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"
