"""Make a plug-in manager: built-ins, installed plug-ins, configured modules. There is no global one.

Order of loading: built-ins, entry points (sorted by name), `settings.plugins.load`, then what the
caller passes. pluggy asks the last loaded first, so what a user adds comes before the built-ins.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

import pluggy

from fides_plugins import hookspecs
from fides_plugins.builtin import builtin_plugins
from fides_plugins.bundle import Bundle
from fides_plugins.errors import FidesError, PluginError
from fides_plugins.settings import Settings

logger = logging.getLogger("fides_plugins")

LoadState = Literal["loaded", "blocked", "failed"]


@dataclass(frozen=True)
class PluginInfo:
    """What became of one plug-in at start-up."""

    name: str
    source: str
    state: LoadState
    hooks: tuple[str, ...] = ()
    detail: str = ""


@dataclass
class LoadReport:
    """Every plug-in that was considered, in load order."""

    plugins: list[PluginInfo] = field(default_factory=list)

    def state(self, name: str) -> LoadState | None:
        """State of the plug-in called `name`; None if it was never seen."""
        return next((p.state for p in self.plugins if p.name == name), None)

    def fail(self, name: str, detail: str) -> None:
        """Turn the entry of a loaded plug-in into a failed one."""
        self.plugins = [
            replace(p, state="failed", detail=detail) if p.name == name and p.state == "loaded" else p
            for p in self.plugins
        ]


class FidesPluginManager(pluggy.PluginManager):
    """pluggy's manager with a report of what was loaded.

    Attributes
    ----------
    report:
        What became of each plug-in.
    inline_plugins:
        Names whose calls need no thread of their own, because their time is bounded by arithmetic.
    """

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT_NAME)
        self.add_hookspecs(hookspecs)
        self.report = LoadReport()
        self.inline_plugins: frozenset[str] = frozenset()

    def add_plugin(self, plugin: Any, name: str, source: str) -> None:
        """Register a plug-in after checking its hooks.

        Raises
        ------
        PluginError
            If the name is taken, the object has no hook, an unknown hook, or an argument that the hook
            does not have.
        """
        if self.has_plugin(name):
            raise PluginError(f"Two plug-ins are called {name!r}.", "Rename one, or block it.")
        if isinstance(plugin, type):
            plugin = plugin()
        try:
            self.register(plugin, name=name)
            callers = self.get_hookcallers(plugin) or []
            unknown = [c.name for c in callers if c.spec is None]
        except pluggy.PluginValidationError as error:
            if self.has_plugin(name):
                self.unregister(name=name)
            raise PluginError(f"Plug-in {name!r} does not fit its hook: {' '.join(str(error).split())}") from error
        hooks = tuple(sorted(c.name for c in callers if c.spec is not None))
        if unknown or not hooks:
            self.unregister(name=name)
            raise PluginError(*_hook_problem(name, unknown))
        self.report.plugins.append(PluginInfo(name, source, "loaded", hooks))


def create_plugin_manager(
    settings: Settings, bundle: Bundle | None = None, extra: Mapping[str, Any] | None = None, *, strict: bool = True
) -> FidesPluginManager:
    """A fresh manager with everything that settings ask for, configured.

    Parameters
    ----------
    settings:
        Which plug-ins to load, require and block.
    bundle:
        Handed to `fides_configure`; the built-ins take their models from it.
    extra:
        Name to plug-in object, loaded last: for hosts and tests.
    strict:
        False never raises for a plug-in: what would have stopped start-up is in the report as failed.
        For showing people what is wrong, never for serving.

    Raises
    ------
    PluginError
        If a plug-in that settings load or require cannot be loaded or configured. An installed plug-in
        that nobody requires and that fails is logged and reported, and the rest goes on.
    """
    manager = FidesPluginManager()
    blocked, required = set(settings.plugins.blocked), set(settings.plugins.required)
    builtins = builtin_plugins(settings, bundle)
    # What the host itself brings (its metrics) may ask for the same as the built-ins; foreign plug-ins may not.
    trusted = {**builtins, **(extra or {})}
    manager.inline_plugins = frozenset(n for n, p in trusted.items() if getattr(p, "runs_inline", False))
    for name, plugin in builtins.items():
        _add(manager, name, "built-in", blocked, lambda plugin=plugin: plugin, must=strict)
    if settings.plugins.entry_points:
        for entry in sorted(metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP), key=lambda e: e.name):
            _add(manager, entry.name, _origin(entry), blocked, entry.load, must=strict and entry.name in required)
    for target in settings.plugins.load:
        name = target.partition(":")[2] or target
        _add(manager, name, f"module {target}", blocked, lambda target=target: import_target(target), must=strict)
    for name, plugin in (extra or {}).items():
        _add(manager, name, "host", blocked, lambda plugin=plugin: plugin, must=strict)
    missing = sorted(n for n in required if manager.report.state(n) != "loaded")
    if missing and strict:
        raise PluginError(
            f"Required plug-in(s) not loaded: {', '.join(missing)}.",
            "Install them, unblock them, or take them out of `plugins.required`.",
        )
    _configure(manager, settings, bundle, strict)
    return manager


def _add(manager: FidesPluginManager, name: str, source: str, blocked: set[str], load: Any, must: bool) -> None:
    if name in blocked:
        manager.report.plugins.append(PluginInfo(name, source, "blocked", detail="settings block it"))
        return
    try:
        manager.add_plugin(load(), name, source)
    except Exception as error:  # importing foreign code may raise anything; it must not take the host down
        detail = _detail(error)
        manager.report.plugins.append(PluginInfo(name, source, "failed", detail=detail))
        if must:
            raise PluginError(
                f"Plug-in {name!r} ({source}) cannot be loaded: {detail}",
                "Mend or install it, or take it out of the settings.",
            ) from error
        logger.error("plug-in %r (%s) cannot be loaded: %s", name, source, detail)


def _configure(manager: FidesPluginManager, settings: Settings, bundle: Bundle | None, strict: bool) -> None:
    for implementation in reversed(manager.hook.fides_configure.get_hookimpls()):
        given = {"settings": settings, "bundle": bundle}
        try:
            implementation.function(*(given[a] for a in implementation.argnames))
        except Exception as error:  # foreign code; named for the person who starts the server
            if not strict:
                manager.report.fail(implementation.plugin_name, _detail(error))
                continue
            if isinstance(error, FidesError):
                raise
            raise PluginError(
                f"Plug-in {implementation.plugin_name!r} failed in fides_configure: {type(error).__name__}: {error}",
                "Check its options, or block it.",
            ) from error


def _detail(error: Exception) -> str:
    return str(error) if isinstance(error, FidesError) else f"{type(error).__name__}: {error}"


def _origin(entry: metadata.EntryPoint) -> str:
    package = f" ({entry.dist.name} {entry.dist.version})" if entry.dist is not None else ""
    return f"entry point {entry.value}{package}"


def import_target(target: str) -> Any:
    """The object behind `package.module` or `package.module:attribute`.

    Raises
    ------
    PluginError
        If there is no such module or attribute.
    """
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise PluginError(
                f"There is no module {module_name!r} on the path of {sys.executable.rpartition('/')[2]}.",
                "Install the package that holds it into the server's environment; "
                "to try a module of the current folder, set PYTHONPATH=. for the command.",
            ) from None
        raise
    if not attribute:
        return module
    if not hasattr(module, attribute):
        raise PluginError(f"Module {module_name!r} has no {attribute!r}.")
    return getattr(module, attribute)


def _hook_problem(name: str, unknown: list[str]) -> tuple[str, str]:
    known = [n for n in vars(hookspecs) if n.startswith("fides_")]
    if not unknown:
        return (
            f"Plug-in {name!r} implements no hook.",
            "Mark a function or method with `@hookimpl`; see docs/reference/hooks.md.",
        )
    near = difflib.get_close_matches(unknown[0], known, n=1)
    return (
        f"Plug-in {name!r} implements {unknown[0]!r}, which is no hook.",
        f"Did you mean {near[0]!r}?" if near else f"Hooks are: {', '.join(known)}.",
    )
