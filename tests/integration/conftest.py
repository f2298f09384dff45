"""What several integration tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.torchserve_models import backdoor_bundle


@pytest.fixture(scope="session")
def backdoor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the service with the backdoor, for tests that only read it."""
    folder = tmp_path_factory.mktemp("backdoor") / "bundle"
    backdoor_bundle(folder)
    return folder
