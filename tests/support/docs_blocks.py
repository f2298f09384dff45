"""Fenced code blocks of Markdown pages, for the tests that run and check them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import REPOSITORY

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its title (a file name, by our habit), its text and where it stands."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def pages() -> list[Path]:
    """README, every page of the documentation, and the READMEs of the example packages."""
    docs = sorted((REPOSITORY / "docs").rglob("*.md"))
    examples = sorted((REPOSITORY / "examples").glob("*/README.md"))
    return [REPOSITORY / "README.md", *docs, *examples]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        info = match["info"].strip()
        language = info.split()[0] if info and not info.startswith("title") else ""
        title = _TITLE.search(info)
        body = "\n".join(line.removeprefix(match["indent"]) for line in match["body"].splitlines()) + "\n"
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, language, title[1] if title else "", body))
    return found


def fides_commands(block: Block) -> list[list[str]]:
    """The words of every `fides` command in a shell block, without environment variables before it."""
    import shlex

    text = block.text.replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ")
        for part in re.split(r"\s(?:&&|\|\||\||;)\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "fides":
                found.append(words[1:])
    return found
