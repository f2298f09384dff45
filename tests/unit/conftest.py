"""Shared by the unit tests."""

from __future__ import annotations

import pytest

from tests.support.pki import AmdPki, IntelPki


@pytest.fixture(scope="session")
def intel() -> IntelPki:
    return IntelPki()


@pytest.fixture(scope="session")
def amd() -> AmdPki:
    return AmdPki()
