"""Fixtures for people who test plug-ins; pytest finds them by itself once fides-plugins is installed.

Every fixture gives fresh objects: no plug-in manager outlives a test. Imports are inside the fixtures,
because pytest loads this module in every run on a machine where the package is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fides_plugins.bundle import Bundle
    from fides_plugins.manager import FidesPluginManager
    from fides_plugins.pipeline import Pipeline

MakeManager = Callable[..., "FidesPluginManager"]
MakePipeline = Callable[..., "Pipeline"]


@pytest.fixture
def fides_bundle() -> Bundle:
    """A real bundle in memory: ten classes, and a verification model that reads its input as logits."""
    from fides_plugins.testing import memory_bundle

    return memory_bundle()


@pytest.fixture
def fides_manager(fides_bundle: Bundle) -> MakeManager:
    """Make a manager with the built-ins and the given plug-ins: `fides_manager(MyPlugin, mode="flag")`.

    Keywords are settings. Installed plug-ins are left out, so that a test sees only what it names;
    `plugins={"entry_points": True}` lets them in.
    """

    def make(*plugins: Any, bundle: Bundle | None = None, **settings: Any) -> FidesPluginManager:
        from fides_plugins.manager import create_plugin_manager

        return create_plugin_manager(_settings(settings), bundle or fides_bundle, _named(plugins))

    return make


@pytest.fixture
def fides_pipeline(fides_bundle: Bundle, fides_manager: MakeManager) -> Iterator[MakePipeline]:
    """Make a pipeline with the given plug-ins: `fides_pipeline(MyPlugin, mode="flag").run(query, service)`.

    Keywords are settings; pipelines are closed when the test ends.
    """
    made: list[Pipeline] = []

    def make(*plugins: Any, bundle: Bundle | None = None, **settings: Any) -> Pipeline:
        from fides_plugins.pipeline import Pipeline

        manager = fides_manager(*plugins, bundle=bundle, **settings)
        made.append(Pipeline(_settings(settings), bundle or fides_bundle, manager))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


def _settings(values: dict[str, Any]) -> Any:
    from fides_plugins.settings import Settings

    plugins = {"entry_points": False, **values.get("plugins", {})}
    return Settings.from_mapping({**values, "plugins": plugins})


def _named(plugins: tuple[Any, ...]) -> dict[str, Any]:
    """A name for each plug-in: as `check_plugin` names it, numbered where two are alike."""
    from fides_plugins.testing import plugin_name

    named: dict[str, Any] = {}
    for plugin in plugins:
        name = plugin_name(plugin)
        while name in named:
            name += "-2"
        named[name] = plugin
    return named
