"""The import graph: no circle, type-only imports included. The layers themselves are `lint-imports`' to hold."""

from __future__ import annotations

import grimp


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
