"""The code with which a call refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fides_plugins.attestation.refusal import Refusal


def code(call: Callable[[], object]) -> str:
    """Code of the refusal that a call must end in."""
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value.code
