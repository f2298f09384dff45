"""A worker over an unpacked archive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.torchserve_models import CLASS, READ_BYTES, SERVICE, backdoor_bundle
from tests.support.torchserve_worker import MODULES, Worker


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Makes a worker over an unpacked archive; sources can be exchanged."""
    backdoor_bundle(tmp_path / "bundle")
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str = CLASS, files: dict[str, str] | None = None, **section: Any) -> Worker:
        for name in MODULES:
            sys.modules.pop(name, None)
        contents = {"digits.py": source, "common.py": SERVICE + READ_BYTES, **(files or {})}
        for name, text in contents.items():
            (tmp_path / name).write_text(text)
        return Worker(tmp_path, **section)

    yield make
    for name in MODULES:
        sys.modules.pop(name, None)
