"""The Triton commands of `fides attach`, `detach`, `check`, `watch` and `reset`."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fides_plugins.cli._output import AsJson, console, print_findings, print_json
from fides_plugins.cli.hosts import adds, assignments, graded
from fides_plugins.errors import InputError, SettingsError

if TYPE_CHECKING:
    from fides_plugins.serving.triton.operator.watch import Event

Repository = Annotated[Path, typer.Argument(help="The model repository.")]
Model = Annotated[str, typer.Argument(help="Name of the model.")]
Url = Annotated[str, typer.Argument(help="host:port of Triton's HTTP endpoint.")]
Metrics = Annotated[str, typer.Option(help="Address of the metrics page, if not port 8002 of the host.")]
Live = Annotated[str, typer.Option(help="Switch this running server (explicit mode) without a failed request.")]
Data = Annotated[
    Path | None,
    typer.Option(help="An .npz file with real inputs by name; values are generated otherwise."),
]


def _read_data(path: Path | None) -> dict[str, Any] | None:
    from fides_plugins.array_files import open_npz

    if path is None:
        return None
    with open_npz(path) as archive:
        found = archive.read(*archive.names)
    if not found:
        raise InputError(f"{path.name} holds no array.", "Make it with numpy.savez(FILE, INPUT_NAME=ROWS).")
    return found


def attach_triton(
    repository: Repository,
    model: Model,
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="Folder that `fides fit` wrote; it is copied.")],
    mode: Annotated[str, typer.Option(help="observe, flag, correct or reject.")] = "observe",
    on_error: Annotated[str, typer.Option(help="open or closed.")] = "open",
    takeover: Annotated[bool, typer.Option("--takeover", help="Answer under the model's own name (default).")] = False,
    serve_as: Annotated[str, typer.Option("--as", help="Answer under this name; the model stays as it is.")] = "",
    from_server: Annotated[str, typer.Option(help="Take the model's full configuration from this server.")] = "",
    live: Live = "",
    version: Annotated[int, typer.Option(help="The version to protect, if several are served.")] = 0,
    input_name: Annotated[str, typer.Option("--input", help="Input that the verification model takes.")] = "",
    output_name: Annotated[str, typer.Option("--output", help="Output that holds the classes.")] = "",
    output_kind: Annotated[str, typer.Option(help="logits or probabilities. Default: what the bundle says.")] = "",
    decode: Annotated[str, typer.Option(help="Decoder of encoded inputs: image:size=224x224,mode=RGB,...")] = "",
    pass_inputs: Annotated[bool, typer.Option(help="Hand the inputs to detectors and observers, too.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting, as key=value; may be repeated."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Attach although the bundle fails for the mode.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Protect MODEL of a Triton REPOSITORY with new files only; print the start-up flag that switches it on."""
    from fides_plugins.serving.triton.attach import attach
    from fides_plugins.serving.triton.plan import AttachOptions

    if takeover and serve_as:
        raise SettingsError("--takeover and --as exclude each other.", "Choose one.")
    values = {"mode": mode, "on_error": on_error, **assignments(settings)}
    options = AttachOptions(
        bundle, serve_as, version or None, input_name, output_name, output_kind, decode, pass_inputs, values
    )
    readiness = graded(bundle, str(values["mode"]), force)
    done = attach(repository, model, options, from_server=from_server, live=live)
    if as_json:
        print_json(
            {
                "model": done.model,
                "protected": done.public,
                "with_verdict": done.verdict_model,
                "base": done.base,
                "flag": done.flag,
                "written": sorted([*done.files, *done.links]),
                "notes": list(done.notes),
                "readiness": readiness,
            }
        )
        return
    out = console()
    out.print(f"{done.public}: protected; {done.verdict_model} adds the verdict; {done.base} is the bare model.")
    for note in done.notes:
        out.print(f"Note: {note}")
    flagged, plain = "Start tritonserver with:", "Start tritonserver as before."
    if live:
        out.print("The running server was switched.")
        flagged, plain = "Its next start needs:", "Its next start needs nothing more."
    out.print(f"{flagged} {done.flag}" if done.flag else plain, soft_wrap=True)


def detach_triton(
    repository: Repository,
    model: Model,
    live: Live = "",
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Remove files that were changed since attach, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove exactly what attach wrote for MODEL; with --live switch the running server back first."""
    from fides_plugins.serving.triton.attach import detach

    done, left = detach(repository, model, live=live, force=force)
    removed = sorted([*done.files, *done.links])
    if as_json:
        print_json({"model": done.model, "removed": removed, "kept": left})
        return
    console().print(f"Removed {len(removed)} files and links of {done.public}.")
    for name in left:
        console().print(f"Kept {name}: it holds files that attach did not write.")
    if live:
        console().print("The running server was switched back.")
    else:
        console().print(
            f"A running server serves {done.public} protected until it is restarted; --live URL would have "
            "switched it back.",
            soft_wrap=True,
        )


def check_triton(
    url: Url,
    model: Model,
    data: Data = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each inference.")] = 10.0,
    metrics: Metrics = "",
    as_json: AsJson = False,
) -> None:
    """Send one real inference through every step of MODEL and say what is wrong and how to fix it.

    Exit status 1 if something is bad or the service alarm is raised.
    """
    from fides_plugins.serving.triton.operator.api import TritonApi
    from fides_plugins.serving.triton.operator.check import check

    findings = check(TritonApi(url, metrics_url=metrics), model, _read_data(data), timeout)
    print_findings(url, model, findings, as_json)


def watch_triton(
    url: Url,
    model: Annotated[str, typer.Option(help="Watch only this model.")] = "",
    interval: Annotated[float, typer.Option(help="Seconds between two probes.")] = 0.2,
    timeout: Annotated[float, typer.Option(help="Seconds after which a step that does nothing is dead.")] = 0.5,
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="Probe once and change nothing; exit 1 if protection is not full, 3 if only the alarm is raised.",
        ),
    ] = False,
    data: Data = None,
    metrics: Metrics = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per event.")] = False,
) -> None:
    """Probe protected models with real inferences; reload dead steps (the server must be in explicit mode).

    Each start settles the models: it loads fallback and ensembles as they are on disk, so that a later switch is
    fast. Where files of a step changed since Triton loaded it, the service model's too, Triton loads them now: their
    processes change, while the old ones go on serving, and a new validation withdraws the service alarm.

    With --once it only probes, and says whether the service alarm is raised. As an exec liveness check of Kubernetes it
    needs a shell that takes 3 for alive: a restart would withdraw the alarm.
    """
    from fides_plugins.serving.triton.operator.api import TritonApi
    from fides_plugins.serving.triton.operator.watch import Watcher, watch_forever

    report = partial(print_event, as_json=as_json)
    watcher = Watcher(
        TritonApi(url, metrics_url=metrics),
        model=model,
        timeout_s=timeout,
        heal=not once,
        inputs=_read_data(data),
        report=report,
    )
    if once:
        sound, raised = watcher.look(), watcher.report_alarms()
        if raised or not sound:
            raise typer.Exit(3 if sound else 1)
        return
    try:
        watch_forever(watcher, interval)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def print_event(event: Event, as_json: bool) -> None:
    """What a watch saw or did, in one line."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    if as_json:
        typer.echo(json.dumps({"time": now, **event.__dict__}))
    else:
        text = f"{now} {event.kind} {event.model} ({event.seconds:.2f} s) {event.detail}".rstrip()
        console().print(text, soft_wrap=True)


def reset_triton(
    url: Url,
    model: Model,
    metrics: Metrics = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the alarm to be withdrawn.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Withdraw the service alarm of MODEL: reload its validation (explicit mode) and check that it is gone."""
    from fides_plugins.serving.triton.operator.api import TritonApi
    from fides_plugins.serving.triton.operator.reset import reset

    done = reset(TritonApi(url, metrics_url=metrics), model, timeout)
    if as_json:
        print_json(done.__dict__)
    elif done.under_attack:
        console().print(f"{done.step} is a new process, and {model} is under attack again: the attack goes on.")
    else:
        what = "is withdrawn" if done.was_under_attack else "was not raised"
        console().print(f"{done.step} is a new process; the service alarm of {model} {what}.")
    if done.under_attack:
        raise typer.Exit(1)


register_attach = adds("triton", attach_triton)
register_detach = adds("triton", detach_triton)
register_check = adds("triton", check_triton)
register_watch = adds("triton", watch_triton)
register_reset = adds("triton", reset_triton)
