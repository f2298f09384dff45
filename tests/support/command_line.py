"""The command line in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def fides(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `fides` printed and how it ended; a command that goes on for ever fails by its time-out."""
    return subprocess.run(
        [sys.executable, "-m", "fides_plugins.cli", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "160", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
