"""What imports what and stands where: no circle in the package; tests and benchmarks do not lean on each other.

Type-only imports count. The layers themselves are `lint-imports`' to hold.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import grimp
import pytest

from tests.support.paths import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = grimp.build_graph("fides_plugins", exclude_type_checking_imports=False, cache_dir=None)
    below = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    # Modules that import nothing of what is left are taken away until none is: what then stays is a circle.
    while True:
        free = {module for module, imported in below.items() if not imported}
        if not free:
            break
        below = {module: imported - free for module, imported in below.items() if module not in free}
    assert not below, f"these modules import each other in a circle, or stand above one: {sorted(below)}"


def test_the_architecture_page_names_every_layer() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    page = (REPOSITORY / "docs" / "explanation" / "architecture.md").read_text()
    table = page.split("## Layers")[1].split("## ")[0]
    for contract in contracts:
        for room in re.findall(r"\w+", " ".join(contract["layers"])):
            assert f"`{room}`" in table, f"{room} is not on the page"


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {module.split(".")[0] for module in found}


@pytest.mark.parametrize(
    ("folder", "foreign"),
    [("tests", "benchmarks"), *((f, "tests") for f in ("benchmarks", "docs", "examples", "fides_plugins", "handlers"))],
)
def test_only_tests_import_tests_and_tests_import_no_benchmark(folder: str, foreign: str) -> None:
    leaning = [str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / folder).rglob("*.py") if foreign in imported(f)]
    assert leaning == []


def test_unit_tests_stand_in_the_rooms_of_the_package() -> None:
    tests = REPOSITORY / "tests" / "unit"
    rooms = {file.parent.relative_to(tests) for file in tests.rglob("test_*.py")} - {Path("project")}
    assert [str(room) for room in rooms if not (REPOSITORY / "fides_plugins" / room / "__init__.py").is_file()] == []
