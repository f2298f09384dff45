"""`fides audit verify` and `fides audit run`: what an auditor does with a log and with recorded predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fides_plugins.cli._output import AsJson, console, print_json, print_table, progress
from fides_plugins.errors import SettingsError

#: Share of rows without a verdict that --check tolerates, as does the alert FidesVerificationFailing.
MAX_UNJUDGED = 0.05


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="Check an audit log; judge recorded predictions.", no_args_is_help=True)
    group.command("verify")(verify)
    group.command("run")(run)
    app.add_typer(group, name="audit")


def verify(
    log: Annotated[Path, typer.Argument(help="Folder of the log.", metavar="LOG")],
    key_file: Annotated[str, typer.Option(help="File with the key of a keyed log.")] = "",
    anchor: Annotated[
        str,
        typer.Option(help="The log's `anchor_file`, or an earlier `verify --json`: its lines must be there."),
    ] = "",
    archived: Annotated[
        bool, typer.Option("--archived", help="Accept that the oldest segments were moved away.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find any line of an audit log that was removed, moved or altered. Exit status 1 if there is one."""
    from fides_plugins.audit.anchor import read_anchors
    from fides_plugins.audit.chain import read_key
    from fides_plugins.audit.verify import verify_log

    anchors = read_anchors(anchor) if anchor else None
    with progress(quiet=as_json) as bar:
        task = bar.add_task("segments", total=None)
        report = verify_log(log, read_key(key_file), anchors, archived, on_segment=lambda name: bar.advance(task))
    if as_json:
        print_json(report.to_json())
    else:
        rows = [
            (
                lane.lane,
                f"{lane.lines:,}",
                f"{lane.rows:,}",
                f"{lane.statuses.get('attacked', 0):,}",
                f"{sum(lane.lost.values()):,}",
                f"{lane.seq}:{lane.hash[:16]}",
                str(lane.n_findings),
            )
            for lane in report.lanes
        ]
        print_table(f"Audit log {log.name}", ("lane", "lines", "rows", "attacked", "lost", "head", "findings"), rows)
        for finding in report.findings:
            console().print(str(finding), style="red", soft_wrap=True)
        console().print("Every line holds." if report.ok else "The log was tampered with, or its disk lost lines.")
    if not report.ok:
        raise typer.Exit(1)


def run(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    source: Annotated[Path, typer.Option("--input", help="Recorded predictions: Parquet or JSON Lines.")],
    out: Annotated[Path, typer.Option("--out", help="Verdicts, as Parquet; must not exist.")],
    settings: Annotated[str, typer.Option(help="TOML file with settings; the environment wins over it.")] = "",
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Workers, for Ray.")] = 2,
    address: Annotated[str, typer.Option(help="Ray cluster; a local one is started where none is given.")] = "",
    probabilities: Annotated[bool, typer.Option(help="Write the probabilities to use, K numbers a row.")] = True,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Exit with 1 if more is attacked than the false-alarm rate explains, or too much has no verdict.",
        ),
    ] = False,
    max_unjudged: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of rows without a verdict that --check lets pass.")
    ] = MAX_UNJUDGED,
    as_json: AsJson = False,
) -> None:
    """Judge recorded predictions after the fact. Run again, an interrupted run continues where it stopped."""
    from fides_plugins.settings import Settings, read_toml

    try:
        import pyarrow  # noqa: F401
    except ImportError as error:  # missing, or a release that does not go with the installed numpy
        raise SettingsError(
            f"pyarrow cannot be used: {error}", "Install it with: pip install 'fides-plugins[audit]'"
        ) from None
    from fides_plugins.batch.run import audit_run

    used = Settings.for_host(read_toml(settings) if settings else None)
    with progress(quiet=as_json) as bar:
        task = bar.add_task("rows", total=None)
        summary = audit_run(
            bundle,
            source,
            out,
            used,
            engine=engine,
            workers=workers,
            address=address,
            probabilities=probabilities,
            on_start=lambda total, done: bar.update(task, total=total, completed=done),
            on_rows=lambda n: bar.advance(task, n),
        )
    if as_json:
        print_json(summary)
    else:
        _print_summary(out.name, summary, max_unjudged)
    if check and (summary["more_than_false_alarms"] or _too_few_judged(summary, max_unjudged)):
        raise typer.Exit(1)


def _too_few_judged(summary: dict[str, Any], max_unjudged: float) -> bool:
    return not summary["judged"] or summary["unjudged_share"] > max_unjudged


def _print_summary(name: str, summary: dict[str, Any], max_unjudged: float) -> None:
    rows = summary["rows"]
    low, high = summary["attacked_interval"]
    table = [(status, f"{count:,}", f"{count / rows:.3%}") for status, count in summary["statuses"].items()]
    table += [(what, f"{summary[what]:,}", f"{summary[what] / rows:.3%}") for what in ("disagreements", "refused")]
    print_table(f"{summary['judged']:,} of {rows:,} rows judged into {name}", ("rows", "number", "share"), table)
    out = console()
    if summary["judged"]:
        text = "more than" if summary["more_than_false_alarms"] else "no more than"
        out.print(
            f"Attacked: {summary['attacked_share']:.3%} of the judged rows (95 % interval {low:.3%} to {high:.3%}), "
            f"{text} the false-alarm rate of {summary['false_alarm_rate']:g} explains."
        )
    if _too_few_judged(summary, max_unjudged):
        out.print(
            f"{summary['unjudged']:,} of {rows:,} rows could not be judged: whether they were attacked is not known.",
            style="red",
            soft_wrap=True,
        )
    for reason, count in summary["reasons"].items():
        out.print(f"  {count:,} x {reason}", soft_wrap=True)
    again = f", {summary['resumed_rows']:,} of them by an earlier run" if summary["resumed_rows"] else ""
    out.print(f"{summary['seconds']:.1f} s, {summary['rows_per_second']:,.0f} rows per second{again}.")
