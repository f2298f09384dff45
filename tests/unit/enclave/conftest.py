"""What a verifier is made of."""

from __future__ import annotations

import pytest

from fides_plugins.bundle import Bundle
from fides_plugins.testing import memory_bundle
from tests.support.verifiers import Hardware


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return Hardware()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return memory_bundle()
