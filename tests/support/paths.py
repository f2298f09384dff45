"""Where this checkout lies, and data beside it that are no part of it."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
#: Tests that need these data skip where they are absent.
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
