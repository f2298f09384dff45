"""`fides plugins`: what is loaded and why, a new plug-in package, and the contract's check."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fides_plugins.cli._output import console, print_json, print_table

if TYPE_CHECKING:
    from fides_plugins.manager import FidesPluginManager

#: Hooks of a request, in the order in which they run; the two around its life come first and last.
HOOK_ORDER = (
    "fides_configure",
    "fides_verify",
    "fides_detect",
    "fides_reclassify",
    "fides_record",
    "fides_unconfigure",
    "fides_attacks",
)


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    group = typer.Typer(help="Show, make and check hook plug-ins.", invoke_without_command=True)
    group.callback()(show)
    group.command("new")(new)
    group.command("check")(check)
    app.add_typer(group, name="plugins")


def show(
    context: typer.Context,
    settings: Annotated[
        Path | None, typer.Option("--settings", help="TOML file with the settings; FIDES_ variables go on top.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Bundle that the built-ins load from.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a server with these settings would load: from where, which hooks, in which order.

    Exit status 1 when a plug-in would stop the server's start.
    """
    if context.invoked_subcommand is not None:
        return
    from fides_plugins.bundle import Bundle
    from fides_plugins.manager import create_plugin_manager
    from fides_plugins.settings import Settings, read_toml

    values = read_toml(settings) if settings is not None else {}
    loaded = Settings.for_host(values)
    if bundle is None and loaded.bundle:
        # A relative bundle lies beside the settings file that names it.
        bundle = (settings.parent if settings is not None else Path()) / loaded.bundle
    content = Bundle.load(bundle) if bundle is not None else None
    # What fails is shown below; the library's log line would say it twice.
    logging.getLogger("fides_plugins").addHandler(logging.NullHandler())
    manager = create_plugin_manager(loaded, content, strict=False)
    stops = _stops_start(manager, loaded.plugins.required)
    if as_json:
        print_json(
            {
                "plugins": [
                    {"name": p.name, "source": p.source, "state": p.state, "hooks": list(p.hooks), "detail": p.detail}
                    for p in manager.report.plugins
                ],
                "order": _order(manager),
                "stops_start": stops,
            }
        )
    else:
        _print(manager, stops, without_bundle=content is None)
    if stops:
        raise typer.Exit(1)


def new(
    name: Annotated[str, typer.Argument(help="Name of the package, such as fides-quiet-hours.")],
    hook: Annotated[
        str, typer.Option("--hook", help="The hook it implements: verify, detect, reclassify or record.")
    ] = "detect",
    into: Annotated[Path, typer.Option("--into", help="Folder in which the package's folder is made.")] = Path("."),
) -> None:
    """Make a ready package: entry point, one hook, its tests, README."""
    from fides_plugins.cli._new_plugin import write_package

    folder = write_package(name, hook, into)
    typer.echo(f"Made {folder}. Next:")
    typer.echo(f"  pip install -e '{folder}[test]' && pytest {folder}")
    typer.echo("  fides plugins")


def check(
    target: Annotated[str, typer.Argument(help="The plug-in, as package.module or package.module:attribute.")],
    classes: Annotated[str, typer.Option("--classes", help="Numbers of classes to try.")] = "2,10,1000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a plug-in against the contract of its hooks. Exit status 1 if it breaks it.

    The module may be in the current folder, as for `python -m`; a server looks only on its own path.
    """
    from fides_plugins.errors import SettingsError
    from fides_plugins.manager import import_target
    from fides_plugins.testing import check_plugin

    try:
        counts = tuple(int(part) for part in classes.split(","))
    except ValueError:
        raise SettingsError(f"--classes {classes!r} is no list of numbers.", "Give it as 2,10,1000.") from None
    # As `python -m` does, unless Python was told not to (`-P`, PYTHONSAFEPATH).
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, "")
    report = check_plugin(import_target(target), class_counts=counts, raises=False)
    slowest = {hook: round(report.slowest_ms(hook), 3) for hook in report.hooks if report.slowest_ms(hook)}
    if as_json:
        print_json({"name": report.name, "hooks": list(report.hooks), "ok": report.ok, "problems": report.problems,
                    "notes": report.notes, "calls": len(report.calls), "slowest_ms": slowest})  # fmt: skip
    else:
        for problem in report.problems:
            console().print(f"- {problem}", soft_wrap=True)
        for note in report.notes:
            console().print(f"Note: {note}", soft_wrap=True)
        times = ", ".join(f"{hook} at most {ms:g} ms" for hook, ms in slowest.items())
        verdict = "keeps its contract" if report.ok else "breaks its contract"
        typer.echo(f"{report.name} {verdict} ({len(report.calls)} calls{'; ' + times if times else ''}).")
    if not report.ok:
        raise typer.Exit(1)


def _stops_start(manager: FidesPluginManager, required: tuple[str, ...]) -> list[str]:
    """Names that would stop a server: required and not loaded, configured and failed, or built in and failed."""
    names = {n for n in required if manager.report.state(n) != "loaded"}
    for plugin in manager.report.plugins:
        if plugin.state == "failed" and not plugin.source.startswith("entry point"):
            names.add(plugin.name)
        # An installed plug-in that imports but cannot configure itself stops the start as well.
        if plugin.state == "failed" and plugin.hooks:
            names.add(plugin.name)
    return sorted(names)


def _order(manager: FidesPluginManager) -> dict[str, list[str]]:
    """Hook to plug-in names, first asked first."""
    working = {p.name for p in manager.report.plugins if p.state == "loaded"}
    order = {}
    for hook in HOOK_ORDER:
        names = [i.plugin_name for i in getattr(manager.hook, hook).get_hookimpls() if i.plugin_name in working]
        # pluggy asks from the end of its list; at shutdown plug-ins are told in load order.
        order[hook] = names if hook == "fides_unconfigure" else names[::-1]
    return order


def _print(manager: FidesPluginManager, stops: list[str], without_bundle: bool) -> None:
    rows: list[Any] = []
    for plugin in manager.report.plugins:
        what = ", ".join(h.removeprefix("fides_") for h in plugin.hooks)
        rows.append((plugin.name, plugin.state, what, plugin.source))
    if rows:
        print_table("Plug-ins, in load order", ("plug-in", "state", "hooks", "from"), rows, "left")
        order = [(hook, " > ".join(names)) for hook, names in _order(manager).items() if names]
        if order:
            print_table(
                "Order of calls (verify and detect ask all at once)", ("hook", "first asked first"), order, "left"
            )
    else:
        typer.echo("No plug-in is installed or configured.")
    for plugin in manager.report.plugins:
        if plugin.state != "loaded":
            console().print(f"{plugin.name} is {plugin.state}: {plugin.detail}", soft_wrap=True)
    if without_bundle:
        typer.echo("Without a bundle there are no built-ins: give one with --bundle.")
    if stops:
        console().print(f"A server would not start because of: {', '.join(stops)}.", soft_wrap=True)
