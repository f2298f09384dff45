"""`fides plugins`: what is loaded and why, a new plug-in package, and the contract's check."""

from __future__ import annotations

import keyword
import logging
import re
import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated

import typer

from fides_plugins import __version__
from fides_plugins.cli._output import AsJson, console, print_json, print_table
from fides_plugins.errors import InputError, SettingsError

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
#: Hooks that a new package can start from.
HOOKS = ("verify", "detect", "reclassify", "record")
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


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
    as_json: AsJson = False,
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
        plugins = [asdict(plugin) for plugin in manager.report.plugins]
        print_json({"plugins": plugins, "order": _order(manager), "stops_start": stops})
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
    folder = _write_package(name, hook, into)
    typer.echo(f"Made {folder}. Next:")
    typer.echo(f"  pip install -e '{folder}[test]' && pytest {folder}")
    typer.echo("  fides plugins")


def check(
    target: Annotated[str, typer.Argument(help="The plug-in, as package.module or package.module:attribute.")],
    classes: Annotated[str, typer.Option("--classes", help="Numbers of classes to try.")] = "2,10,1000",
    as_json: AsJson = False,
) -> None:
    """Run a plug-in against the contract of its hooks. Exit status 1 if it breaks it.

    The module may be in the current folder, as for `python -m`; a server looks only on its own path.
    """
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


def _write_package(name: str, hook: str, into: Path) -> Path:
    """Write the package `name` with an implementation of `hook` from the templates into a new folder below `into`."""
    distribution = name.replace("_", "-").lower()
    if not _NAME.fullmatch(distribution) or keyword.iskeyword(distribution):
        raise InputError(f"{name!r} cannot be a package name.", "Use lower-case words and hyphens: fides-quiet-hours.")
    chosen = hook.removeprefix("fides_")
    if chosen not in HOOKS:
        raise InputError(f"{hook!r} is no hook that a new package can start from.", f"Use one of: {', '.join(HOOKS)}.")
    folder = into / distribution
    if folder.exists():
        raise InputError(f"{folder} exists already.", "Choose another name or folder.")
    plugin = distribution.removeprefix("fides-")
    module = distribution.replace("-", "_")
    values = {
        "distribution": distribution,
        "module": module,
        "plugin": plugin,
        "class_name": "".join(part.capitalize() for part in plugin.split("-")),
        "hook": f"fides_{chosen}",
        # This release's hooks; added arguments do not break a plug-in, so no upper bound.
        "fides_version": __version__,
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{module}/__init__.py": f"{chosen}.py",
        f"src/{module}/py.typed": "",
        f"tests/test_{module}.py": f"test_{chosen}.py",
    }
    templates = resources.files("fides_plugins.cli") / "templates"
    for path, template in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        source = templates.joinpath(f"{template}.tmpl").read_text(encoding="utf-8") if template else ""
        target.write_text(Template(source).substitute(values), encoding="utf-8")
    return folder


def _stops_start(manager: FidesPluginManager, required: tuple[str, ...]) -> list[str]:
    """Names that would stop a server: required and not loaded, configured and failed, or built in and failed."""
    names = {n for n in required if manager.report.state(n) != "loaded"}
    for plugin in manager.report.plugins:
        # An installed plug-in that imports but cannot configure itself stops the start as well.
        if plugin.state == "failed" and (plugin.hooks or not plugin.source.startswith("entry point")):
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
    rows = [
        (p.name, p.state, ", ".join(h.removeprefix("fides_") for h in p.hooks), p.source)
        for p in manager.report.plugins
    ]
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
