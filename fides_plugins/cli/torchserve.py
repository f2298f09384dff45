"""The TorchServe commands of `fides attach`, `fides detach` and `fides check`."""

from __future__ import annotations

import mimetypes
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fides_plugins.cli._output import AsJson, console, print_findings, print_json, read_file
from fides_plugins.cli.hosts import adds, assignments
from fides_plugins.errors import SettingsError

Force = Annotated[bool, typer.Option("--force", "-f", help="Replace the output if it exists.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the new archive goes.")]


def attach_torchserve(
    archive: Annotated[Path, typer.Argument(help="A .mar, a .tar.gz or an unpacked folder; it is not changed.")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Folder that `fides fit` wrote.")],
    output: Output,
    mode: Annotated[str, typer.Option(help="observe, flag, correct or reject.")] = "observe",
    on_error: Annotated[str, typer.Option(help="open or closed.")] = "",
    rows: Annotated[str, typer.Option(help="any, worst or refuse: when rows are not requests.")] = "",
    rows_per_request: Annotated[int, typer.Option(help="Rows that every request makes.")] = 0,
    envelope: Annotated[str, typer.Option(help="request, grpc, always or never: verdicts in bodies.")] = "",
    parser: Annotated[str, typer.Option(help="Module in the archive that reads bodies.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key, as key=value.")] = None,
    vendor: Annotated[bool, typer.Option("--vendor", help="Put the package into the archive.")] = False,
    python: Annotated[str, typer.Option(help="The server's Python, to import the handler with.")] = "",
    skip_import_check: Annotated[
        bool, typer.Option("--skip-import-check", help="Run none of the archive's code: no import, no row to try.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a protected copy of a model archive.

    To see whether a worker could load it, the handler is imported. That runs code of the archive: in a process that
    can write into a scratch folder only and open no TCP connection, but can read what you can read. Use
    --skip-import-check for an archive that you do not trust so far.
    """
    given = dict(locals())
    import yaml

    from fides_plugins.serving.torchserve.attach import attach
    from fides_plugins.settings import nest

    section = {name: given[name] for name in ("on_error", "rows", "rows_per_request", "envelope", "parser")}
    section = {"mode": mode, **{key: value for key, value in section.items() if value}}
    for key, text in assignments(set_).items():
        try:
            section[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SettingsError(f"--set {key}: the value is not valid yaml.") from None
    section = nest(section, prefix="")
    done = attach(
        archive,
        bundle,
        output,
        section,
        vendor=vendor,
        force=force,
        python=python or None,
        check_import=not skip_import_check,
    )
    if as_json:
        print_json({"output": str(output), **asdict(done)})
        return
    out = console()
    out.print(f"{output.name} is protected in mode {section['mode']}.")
    out.print(f"  handler: {done.handler or done.original_handler}{'' if done.handler else ' (not imported)'}")
    out.print(f"  added {len(done.added)} entries, changed {', '.join(done.changed)}")
    for note in done.notes:
        out.print(f"  note: {note}")
    out.print("Serve it like the original; for metrics, config.properties needs:")
    out.print("  metrics_mode=prometheus")
    out.print("  model_metrics_auto_detect=true")


def detach_torchserve(
    archive: Annotated[Path, typer.Argument(help="An archive that `fides attach torchserve` wrote.")],
    output: Output,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the archive that was there before."""
    from fides_plugins.serving.torchserve.attach import detach

    removed = detach(archive, output, force=force)
    if as_json:
        print_json({"output": str(output), "removed": list(removed)})
    else:
        console().print(f"{output.name} is the original archive again; {len(removed)} entries were taken out.")


def check_torchserve(
    url: Annotated[str, typer.Argument(help="Root of the inference API, such as http://localhost:8080.")],
    model: Annotated[str, typer.Argument(help="Name under which the model is served.")],
    body: Annotated[Path, typer.Option("--input", "-i", help="File with a real request for this model.")],
    content_type: Annotated[str, typer.Option(help="Content type of the request; by the file's name if empty.")] = "",
    management: Annotated[str, typer.Option(help="Root of the management API, if not at port + 1.")] = "",
    metrics: Annotated[str, typer.Option(help="Address of the metrics page, if not at port + 2.")] = "",
    token: Annotated[
        str, typer.Option(help="Inference key, where token authorization is on.", envvar="TS_INFERENCE_KEY")
    ] = "",
    repeat: Annotated[int, typer.Option(min=1, help="Requests to time, after a first one.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Send a real inference through a served model, once and then to time it, and say what is wrong."""
    from fides_plugins.serving.torchserve.check import check

    kind = content_type or mimetypes.guess_type(body.name)[0] or "application/octet-stream"
    findings = check(
        url,
        model,
        read_file(body),
        content_type=kind,
        management_url=management,
        metrics_url=metrics,
        token=token,
        repeat=repeat,
    )
    print_findings(url, model, findings, as_json)


register_attach = adds("torchserve", attach_torchserve)
register_detach = adds("torchserve", detach_torchserve)
register_check = adds("torchserve", check_torchserve)
