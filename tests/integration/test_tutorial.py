"""The tutorial, followed to the letter: its files are saved, its commands run, its outputs compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fides_plugins.launch.triton import is_available
from tests.support.docs_blocks import Block, blocks
from tests.support.paths import REPOSITORY

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
    pytest.mark.timeout(600),
]

TUTORIAL = blocks(REPOSITORY / "docs" / "tutorial" / "index.md")


def run(block: Block, folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).absolute().parent), os.environ["PATH"]]),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{block}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def figures(text: str) -> tuple[int, int, dict[str, int]]:
    """What `ask.py` prints: rows, wrong answers, rows by status."""
    rows, wrong = map(int, re.search(r"(\d+) digits, (\d+) wrong", text).groups())  # type: ignore[union-attr]
    return rows, wrong, {s: int(n) for s, n in re.findall(r"'(\w+)': (\d+)", text)}


def test_the_tutorial_reaches_a_protected_attacked_and_corrected_model(tmp_path: Path) -> None:
    outputs: list[tuple[Block, str]] = []
    shown: list[tuple[str, str]] = []
    for block in TUTORIAL:
        if block.title == "set-up":
            continue
        if block.language == "text":
            # A picture of what the command before it prints.
            shown.append((outputs[-1][1], block.text))
        elif block.title:
            target = tmp_path / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
        else:
            assert block.language == "sh", str(block)
            outputs.append((block, run(block, tmp_path)))

    asked = [figures(out) for block, out in outputs if "ask.py" in block.text]
    (rows, honest, calm), (_, attacked, alarmed), (_, corrected, still) = asked
    assert rows == 447
    # Training differs between machines; the story must not.
    assert honest <= 12
    assert calm["attacked"] <= 20
    assert attacked >= 420
    # 441 here; over four services and two detectors each 0.94 to 1. A lie that is not caught stays wrong.
    assert alarmed["attacked"] >= 0.92 * rows
    assert corrected <= 0.08 * rows
    assert still == alarmed
    # What the page shows is what was printed, but for figures that depend on the machine.
    for printed, page in shown:
        for line in page.splitlines():
            pattern = r"\s+".join(re.sub(r"\d+", r"\\d+", re.escape(word)) for word in line.split())
            pattern = pattern.replace("cnn\\-\\d+x\\d+\\-\\d+", r"\S+")
            # Said only where the rows that choose happen to agree less.
            pattern = pattern.partition(r"\s+\(less")[0].removesuffix("\\.")
            assert re.search(_either_order(pattern), printed), f"{line!r} is not in:\n{printed}"
    # Attach left nothing behind.
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["digits"]
    assert sorted(p.name for p in (tmp_path / "models" / "digits").iterdir()) == ["1", "config.pbtxt"]


def _either_order(pattern: str) -> str:
    """The statuses are counted as they come, so their order differs."""
    return r"\{'\w+': \d+, '\w+': \d+\}" if pattern.startswith("\\{") else pattern
