"""`fides attach`, `detach`, `check`, `watch` and `reset`: one sub-command for each model server.

A model server is an entry point in the group `fides_plugins.hosts`. It names a module (or an object)
with any of the functions `register_attach`, `register_detach`, `register_check`, `register_watch` and
`register_reset`. Each takes a Typer application and adds one command to it, named like the entry point.
They are looked for when one of the five groups is used, so that no other command imports them.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

from fides_plugins.cli._output import console
from fides_plugins.errors import FidesError, PluginError, SettingsError
from fides_plugins.settings import Settings

ENTRY_POINT_GROUP = "fides_plugins.hosts"

#: Groups of commands and their help, in the order of `fides --help`.
GROUPS = {
    "attach": "Protect a model that is already served; nothing that exists is edited.",
    "detach": "Remove exactly what attach wrote.",
    "check": "Send a real inference and say what is wrong.",
    "watch": "Probe a protected model with real inferences and bring dead steps back.",
    "reset": "Withdraw the service alarm after an incident.",
}


def register(app: typer.Typer) -> None:
    """Add the five groups to `app`."""
    for name, help_text in GROUPS.items():
        app.add_typer(typer.Typer(cls=_HostGroup, help=help_text, no_args_is_help=True), name=name)


def adds(server: str, command: Callable[..., None]) -> Callable[[typer.Typer], None]:
    """A function `register_...` that adds `command` under the model server's name."""

    def register_command(app: typer.Typer) -> None:
        app.command(server)(command)

    return register_command


def assignments(pairs: Sequence[str] | None) -> dict[str, str]:
    """Values by key of the options `--set key=value`."""
    values = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise SettingsError(f"--set {pair!r} is not of the form key=value.")
        values[key] = value
    return values


def graded(folder: Path, mode: str, force: bool) -> dict[str, str] | None:
    """The grade of a bundle for a mode, told on standard error first; None where its fit measured none.

    Raises
    ------
    FidesError
        If there is no such bundle or mode, or the grade is FAIL and `force` is not given.
    """
    from fides_plugins.bundle import Bundle
    from fides_plugins.readiness import Readiness, require_ready

    bundle = Bundle.load(folder)
    found = require_ready(bundle, Settings.from_mapping({"mode": mode}).mode, force)
    readiness = Readiness.of(bundle)
    if found is None or readiness is None:
        return None
    console(stderr=True).print(f"{found.grade} for {mode}. {readiness.sentence()}")
    return found._asdict()


class _HostGroup(TyperGroup):
    """A group that looks for its commands when they are first asked for."""

    _found: MutableMapping[str, Any] | None

    @property
    def commands(self) -> MutableMapping[str, Any]:
        if self._found is None:
            self._found = host_commands(str(self.name))
        return self._found

    @commands.setter
    def commands(self, given: MutableMapping[str, Any]) -> None:
        # Typer hands over the commands of the group's application, which has none.
        self._found = None


def host_commands(group: str) -> dict[str, Any]:
    """The commands of a group, by model server; one that cannot be used says why when it is called."""
    entries: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        entries.setdefault(entry.name, []).append(entry)
    commands = {}
    for name, found in sorted(entries.items()):
        try:
            command = _command(group, name, found)
        except FidesError as error:
            command = _refusal(name, error)
        if command is not None:
            commands[name] = command
    return commands


def _command(group: str, name: str, entries: Sequence[metadata.EntryPoint]) -> Any:
    """The server's command; None where it has none for this group."""
    origins = " and ".join(sorted(_origin(entry) for entry in entries))
    if len(entries) > 1:
        raise PluginError(f"The model server {name!r} comes from {origins}.", "Uninstall all but one.")
    app = typer.Typer()
    try:
        register = getattr(entries[0].load(), f"register_{group}", None)
        if register is None:
            return None
        register(app)
        made = typer.main.get_group(app).commands
    except Exception as error:  # foreign code may raise anything; the other servers' commands must still work
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(
            f"The model server {name!r} of {origins} cannot be loaded: {cause}.", "Fix the package, or uninstall it."
        ) from error
    if list(made) != [name]:
        raise PluginError(
            f"The model server {name!r} of {origins} adds {sorted(made)} to `fides {group}`.",
            f"It must add one command, called {name!r}.",
        )
    return made[name]


def _refusal(name: str, error: FidesError) -> Any:
    app = typer.Typer()

    @app.command(
        name,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def refuse() -> None:
        """Cannot be used; call it to see why."""
        raise error

    return typer.main.get_group(app).commands[name]


def _origin(entry: metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
