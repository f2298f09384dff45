"""The threat model names tests: they exist, and every refusal a client can meet is explained somewhere."""

from __future__ import annotations

import ast
import re

from tests.support.paths import REPOSITORY

TEXT = (REPOSITORY / "docs" / "explanation" / "threat-model.md").read_text()


def test_every_named_test_exists() -> None:
    named = re.findall(r"`((?:unit|integration)/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) >= 25
    for file, name in named:
        tree = ast.parse((REPOSITORY / "tests" / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_named_refusal_exists() -> None:
    code = "".join(p.read_text() for p in (REPOSITORY / "fides_plugins").rglob("*.py"))
    for refusal in set(re.findall(r"`((?:receipt|request|evidence)-[a-z-]+)`", TEXT)):
        kind, rest = refusal.split("-", 1)
        assert f'"{refusal}"' in code or f'"{{what}}-{rest}"' in code, (kind, refusal)
