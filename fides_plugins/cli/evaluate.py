"""`fides evaluate`: how good a bundle's detection is, on rows it was not fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fides_plugins.cli._output import console, print_json, print_table, progress
from fides_plugins.cli._service import Encoding, InputName, RequestKey, ResponseKey, ask, service_option
from fides_plugins.errors import SettingsError, TrainingError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fides_plugins.training.predictions import AttackedRows


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", metavar="BUNDLE")],
    predictions: Annotated[
        Path | None,
        typer.Option(help="An .npz file with both models' answers on rows that the bundle was not fitted on."),
    ] = None,
    service: Annotated[str, service_option(help="The honest service, in any form that `fides fit` takes.")] = "",
    data: Annotated[
        Path | None,
        service_option(help="Its inputs: an .npz file with `images` and optionally `labels`, or a folder by class."),
    ] = None,
    fit_predictions: Annotated[
        Path | None,
        typer.Option(help="Rows to train on again without each attack. Default: a half of the rows is spent on it."),
    ] = None,
    unseen: Annotated[
        bool, typer.Option("--unseen/--no-unseen", help="Train again without each attack (the slow part).")
    ] = True,
    false_alarm_rate: Annotated[
        float | None, typer.Option(min=1e-6, max=0.5, help="Budget for `detected`. Default: the bundle's.")
    ] = None,
    monitor_error: Annotated[
        float, typer.Option(min=1e-12, max=0.5, help="Chance of ever raising a false service alarm.")
    ] = 1e-6,
    plugin: Annotated[
        list[str] | None, typer.Option(help="A plug-in with more attacks, package.module or package.module:attribute.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page here.")] = None,
    seed: Annotated[int, typer.Option(help="Of attacks, bootstrap and training.")] = 0,
    input_name: InputName = "",
    output_name: Annotated[str, service_option(help="Name of its class output.")] = "",
    encoding: Encoding = "json",
    request_key: RequestKey = "",
    response_key: ResponseKey = "",
    cache: Annotated[Path | None, service_option(help="Keep the service's answers here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack a bundle's detection and measure what it catches, each figure with a 95% interval."""
    given = dict(locals())
    if (predictions is None) == (data is None) or (data is not None) != bool(service):
        raise SettingsError("Nothing to evaluate on.", "Give --predictions, or --service and --data.")
    from fides_plugins.bundle import Bundle
    from fides_plugins.training.evaluation.evaluate import evaluate as run
    from fides_plugins.training.predictions import load_predictions

    loaded = Bundle.load(bundle)
    spec = loaded.manifest.verification
    temperatures = loaded.manifest.service.temperature, 1.0 if spec is None else spec.temperature
    registry = _registry(plugin or [])
    with progress(as_json) as bar:
        task = bar.add_task("evaluate", total=100)

        def tell(what: str, done: float) -> None:
            bar.update(task, description=what, completed=round(100 * done))

        images: NDArray[Any] | None = None
        extra: list[AttackedRows] = []
        skipped: dict[str, str] = {}
        if predictions is not None:
            rows = load_predictions(predictions, *temperatures)
        else:
            from fides_plugins.training.evaluation.service_attacks import ask_service

            with ask(service, given) as teacher:
                asked = ask_service(loaded, teacher, str(data), cache=cache, seed=seed, progress=tell)
            rows, images, extra, skipped = asked.rows, asked.images, list(asked.attacked), asked.skipped
        found = run(
            loaded,
            rows,
            registry=registry,
            fit_rows=None if fit_predictions is None else load_predictions(fit_predictions, *temperatures),
            extra=extra,
            false_alarm_rate=false_alarm_rate,
            monitor_error=monitor_error,
            unseen=unseen,
            seed=seed,
            progress=tell,
        )
    if skipped:
        found.result["skipped"] = skipped
    if report is not None:
        from fides_plugins.training.evaluation.report import render

        try:
            report.write_text(render(loaded, rows, found, images), encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"{report.name} cannot be written: {error.strerror}.", "Choose another place."
            ) from None
    if as_json:
        print_json(found.result)
    else:
        _show(found.result, report)


def _registry(load: list[str]) -> Any:
    from fides_plugins.manager import create_plugin_manager
    from fides_plugins.settings import Settings
    from fides_plugins.training.attacks import default_registry

    manager = create_plugin_manager(Settings.from_mapping({"plugins": {"load": load, "required": load}}))
    return default_registry(manager)


def _show(result: dict[str, Any], report: Path | None) -> None:
    from fides_plugins.training.evaluation.evaluate import MEASURES

    clean = result["clean"]
    low, high = clean["false_alarm_rate_interval"]
    screen = console()
    screen.print(
        f"{clean['rows']:,} rows, {clean['classes']} classes, agreement {clean['agreement']:.4f}. "
        f"False alarms {clean['false_alarm_rate']:.4f} ({low:.4f} to {high:.4f}) at a budget of {clean['budget']:g}."
    )
    for note in result["notes"]:
        screen.print(note, style="yellow")
    for section, title in (("attacks", "Attacks"), ("unseen", "The same attacks, each left out of training")):
        if result[section]:
            print_table(title, ("attack", *MEASURES), [_line(n, v, MEASURES) for n, v in result[section].items()])
    shares = clean["escalation"]
    print_table(
        "Caught where the most doubtful rows are asked again of an exact copy",
        ("attack", *(f"{float(share):.0%} asked" for share in shares)),
        [
            ("false alarms", *(f"{entry['false_alarm_rate']:.4f}" for entry in shares.values())),
            ("cost, of the service's", *(f"{entry['cost']:.3f}" for entry in shares.values())),
            *(
                (name, *(f"{entry['detected']:.3f}" for entry in values["escalation"].values()))
                for name, values in result["attacks"].items()
            ),
        ],
    )
    rules = result["comparison"]
    lines = [
        (f"{name} ({section})", *map(_difference, table.values()))
        for section in ("seen", "unseen")
        for name, table in rules[section].items()
    ]
    if lines:
        columns = ("attack", *next(iter(rules["seen"].values())))
        print_table("Caught more (+) or less (-) than a rule of thumb at equal false-alarm rate", columns, lines)
    monitor = result["monitor"]
    print_table(
        f"Requests until the service alarm ({monitor['attack']}, error {monitor['error']:g})",
        ("requests attacked", "median", "p95"),
        [(f, *_delays(v)) for f, v in monitor.items() if isinstance(v, dict)],
    )
    low, high = monitor["false_alarms_interval"]
    screen.print(
        f"False alarms of the monitor: {monitor['false_alarms']} ({low:.1f} to {high:.1f}) in "
        f"{monitor['clean_sequences']} benign sequences of {monitor['clean_rows']:,} rows."
    )
    for name, reason in result.get("skipped", {}).items():
        screen.print(f"Not tried: {name}. {reason}")
    if report is not None:
        screen.print(f"Report: {report}")


def _line(name: str, values: dict[str, Any], measures: tuple[str, ...]) -> tuple[str, ...]:
    return (name, *("n/a" if values[m] is None else f"{values[m]:.3f}" for m in measures))


def _difference(cell: dict[str, Any]) -> str:
    if cell["no_worse"] is None:
        return "n/a"
    return f"{cell['difference']:+.3f}{'' if cell['no_worse'] else ' worse'}"


def _delays(values: dict[str, Any]) -> tuple[str, str]:
    median, p95 = ("not reached" if values[q] is None else f"{values[q]:.0f}" for q in ("median", "p95"))
    return median, p95
