"""`fides fit`: from a service model and data, or from stored predictions, to a bundle."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fides_plugins.cli._output import console, print_json, print_table, progress
from fides_plugins.cli._service import Encoding, InputName, RequestKey, ResponseKey, ask, service_option
from fides_plugins.errors import SettingsError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.progress import Progress

    from fides_plugins.training import stages
    from fides_plugins.training.distil.students import Student
    from fides_plugins.training.fit_report import FitReport

# Options by their panel in `--help`.
_model = partial(typer.Option, rich_help_panel="The verification model")
_own = partial(typer.Option, rich_help_panel="A student of your own")
_workers = partial(typer.Option, rich_help_panel="Several workers")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fit")(fit)


def fit(
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    service: Annotated[
        str,
        service_option(
            help="ONNX file, TorchScript file, package.module:factory, grpc://host:port/model (Triton) "
            "or http://host:port/predictions/model (TorchServe)."
        ),
    ] = "",
    data: Annotated[
        Path | None,
        service_option(
            help="An .npz file with the rows, named as the service's input, and optionally `labels` and `groups`; "
            "or a folder of images by class."
        ),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Instead of service and data: an .npz file with both models' answers.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same graphs on the same machine.")] = 0,
    false_alarm_rate: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Smallest budget that the calibration must support.")
    ] = 0.01,
    name: Annotated[str, typer.Option(help="Name of the bundle.")] = "fides",
    bundle_version: Annotated[int, typer.Option(min=1, help="Version of the bundle; grows with each release.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    agreement: Annotated[float, _model(min=0.0, max=1.0, help="Wanted agreement with the service.")] = 0.99,
    max_cost: Annotated[float, _model(min=0.0, help="Largest share of the service's multiply-adds.")] = 0.125,
    max_size: Annotated[float, _model(min=0.0, help="Largest share of the service's parameters.")] = 0.1,
    max_macs: Annotated[int | None, _model(min=1, help="Largest number of multiply-adds.")] = None,
    max_parameters: Annotated[int | None, _model(min=1, help="Largest number of parameters.")] = None,
    tolerance: Annotated[float, _model(min=0.0, help="What an unfreezing step must add to be kept.")] = 0.002,
    epochs: Annotated[int, _model(min=1, help="Epochs per step.")] = 20,
    transfer_rows: Annotated[int, _model(min=1, help="About how many rows the service is asked.")] = 16_000,
    temperature: Annotated[
        float | None, _model(min=0.1, help="Temperature of the distillation. Default: 5, less for many classes.")
    ] = None,
    alpha: Annotated[float, _model(min=0.0, help="Weight of the service's answer.")] = 0.8,
    beta: Annotated[float, _model(min=0.0, help="Weight of the labels.")] = 0.2,
    input_kind: Annotated[
        str, service_option(help="image, vector, tokens, bytes or audio. Default: found from the rows.")
    ] = "",
    augment: Annotated[
        str, _model(help="auto: ask the service about changed copies of the rows, too; none: only about the rows.")
    ] = "auto",
    flip: Annotated[
        bool, _model("--flip", help="A mirrored image has the same class, so train on mirrored copies too.")
    ] = False,
    scale: Annotated[
        float | None,
        service_option(
            help="Factor for the pixel values. Default: 1/255 where uint8 images meet a service that takes floats."
        ),
    ] = None,
    output_kind: Annotated[
        str, service_option(help="logits or probabilities. Default: inferred from the answers.")
    ] = "",
    input_name: InputName = "",
    output_name: Annotated[str, service_option(help="Name of the service's class output.")] = "",
    encoding: Encoding = "json",
    request_key: RequestKey = "",
    response_key: ResponseKey = "",
    cache: Annotated[
        Path | None,
        service_option(help="Keep the service's answers here. Default: beside the bundle until the fit succeeds."),
    ] = None,
    student: Annotated[
        list[str] | None,
        _own(help="Pre-trained network: package.module:factory or a TorchScript file. Can be repeated."),
    ] = None,
    student_weights: Annotated[
        list[Path] | None, _own(help="State dict (.safetensors), one for each --student or none.")
    ] = None,
    student_size: Annotated[str, _own(help="Height x width of the images it takes, such as 32x32.")] = "",
    student_channels: Annotated[int | None, _own(help="Channels of the images it takes.")] = None,
    student_mean: Annotated[str, _own(help="Mean of its normalisation, one number per channel: 0.5,0.5,0.5.")] = "",
    fine_tune_rate: Annotated[float, _own(min=1e-7, help="Highest learning rate of its unfrozen layers.")] = 4e-3,
    student_std: Annotated[str, _own(help="Standard deviation, likewise.")] = "",
    student_from_scratch: Annotated[
        bool, _own(help="Train the whole network from its first weights; it gives the classes itself.")
    ] = False,
    engine: Annotated[str, _workers(help="What runs the distillation: local, torchrun or ray.")] = "local",
    workers: Annotated[int, _workers(min=1, help="Workers, for torchrun and ray.")] = 2,
    address: Annotated[str, _workers(help="Ray cluster; a local one is started where none is given.")] = "",
    checkpoints: Annotated[
        Path | None,
        _workers(help="Keep every epoch here, and go on from it. Default for several workers: beside the bundle."),
    ] = None,
) -> None:
    """Make a bundle: verification model, detector, re-classifier and calibration."""
    given = {**locals(), "augment": augment != "none"}
    if augment not in ("auto", "none"):
        raise SettingsError(f"There is no augmentation {augment!r}.", "Choose auto or none.")
    if predictions is not None:
        if service or data is not None:
            raise SettingsError("--predictions stands in for --service and --data.", "Give one or the other.")
        _from_predictions(predictions, out, name, false_alarm_rate, seed, as_json)
        return
    if not service or data is None:
        raise SettingsError("Nothing to fit.", "Give --service and --data, or --predictions.")
    if output_kind not in ("", "logits", "probabilities"):
        raise SettingsError(f"Unknown output kind {output_kind!r}.", "Choose logits or probabilities.")
    if engine not in ("local", "torchrun", "ray"):
        raise SettingsError(f"There is no engine {engine!r}.", "Choose local, torchrun or ray.")
    from pydantic import TypeAdapter

    from fides_plugins.training.distil.distributed import is_member, member, run_ray, run_torchrun
    from fides_plugins.training.distil.workers import Worker
    from fides_plugins.training.fit import FitOptions, fit_service
    from fides_plugins.training.fit_report import FitReport

    if engine == "torchrun" and not is_member():
        raise typer.Exit(run_torchrun(sys.argv[1:], workers))
    # Kept until the bundle is there, unless a folder is named: then it is the user's.
    kept = checkpoints or (out.parent / f".{out.name}.checkpoints" if engine != "local" or is_member() else None)
    chosen = {field.name: given[field.name] for field in fields(FitOptions)}
    options = FitOptions(**{**chosen, "output_kind": output_kind or None})
    students = _students(
        student or [],
        student_weights or [],
        size=_size(student_size),
        channels=student_channels,
        mean=_numbers(student_mean, "--student-mean"),
        std=_numbers(student_std, "--student-std"),
        from_scratch=student_from_scratch,
    )
    rest = {option: given[option] for option in ("seed", "cache", "name", "bundle_version")}
    rest |= {"options": options, "students": students}

    def run(model: str, source: Path, target: Path, who: Worker, tell: stages.Progress | None = None) -> FitReport:
        with ask(model, given) as teacher:
            return fit_service(teacher, source, target, progress=tell, who=who, **rest)

    if engine == "ray":
        # Workers have folders of their own as working directories.
        source, target = data.resolve(), out.resolve()
        model = str(Path(service).resolve()) if Path(service).is_file() else service
        found = run_ray(
            lambda who: asdict(run(model, source, target, who)), workers, (kept or out).resolve(), address=address
        )
        report, first = TypeAdapter(FitReport).validate_python(found), True
    else:
        with member(kept) as who, progress(as_json or not who.first) as bar:
            report, first = run(service, data, out, who, _ticks(bar)), who.first
    if first and kept is not None and checkpoints is None:
        shutil.rmtree(kept, ignore_errors=True)
    if not first:
        return
    if as_json:
        print_json(asdict(report))
    else:
        show(report)


def _ticks(bar: Progress) -> stages.Progress:
    """Progress of a fit: one bar for each stage."""
    tasks: dict[str, Any] = {}

    def tick(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done, total=total)

    return tick


def show(report: FitReport) -> None:
    """Print a report for people."""
    from fides_plugins.readiness import Readiness
    from fides_plugins.training.stages import KEPT_BY_CHANGE

    def cost(value: Any) -> tuple[str, str]:
        return ("unknown", "unknown") if value is None else (f"{value.parameters:,}", f"{value.macs:,}")

    rows = [(f"service {report.service}", "", *cost(report.service_cost), "", "")]
    rows += [
        (s.student, s.action, f"{s.parameters:,}", f"{s.macs:,}", f"{s.agreement:.4f}", "yes" if s.kept else "no")
        for s in report.steps
    ]
    print_table(
        "Trade-off (agreement on the rows that choose)",
        ("student", "step", "parameters", "multiply-adds", "agreement", "kept"),
        rows,
    )
    screen = console()
    screen.print(report.kind)
    if report.changes:
        kept = ", ".join(f"{name} {share:.0%}" for name, share in report.changes.items())
        none = "" if max(report.changes.values()) >= KEPT_BY_CHANGE else ", so no copies were used"
        screen.print(f"Changed copies that kept their class: {kept}{none}.")
    met = "" if report.reached else " (less than wanted; see --agreement, --max-cost, --max-size)"
    screen.print(f"Chosen: {report.student}, agreement {report.agreement:.4f} on rows that no training saw{met}.")
    if report.service_accuracy is not None and report.verification_accuracy is not None:
        screen.print(
            f"Accuracy there: service {report.service_accuracy:.4f}, "
            f"verification model {report.verification_accuracy:.4f}."
        )
    counts = ", ".join(f"{part} {n:,}" for part, n in report.rows.items())
    screen.print(f"Rows: {counts}. The service answered {report.asked:,}, {report.remembered:,} came from the cache.")
    plain = report.forms[0].caught if report.forms else {}
    print_table(
        "Lies caught at the budget, were answers written so",
        ("answers", *plain, "honest rows that are no distribution"),
        [
            (f.form, *(f"{f.caught[a]:.3f}" if a in f.caught else "n/a" for a in plain), f"{f.errors:.1%}")
            for f in report.forms
        ],
    )
    if report.told_form:
        screen.print(
            f"The service answers so already: {report.told_form}. What was trained has learned from such answers."
        )
    readiness = Readiness.model_validate(report.readiness)
    screen.print(readiness.sentence())
    print_table("Ready for", ("mode", "grade", "why"), readiness.table(), justify="left")
    if report.scale != 1.0:
        screen.print(f"Pixel values were multiplied by {report.scale:.6g}.")
    screen.print(f"Bundle {report.bundle}, digest {report.digest[:16]}..., {sum(report.seconds.values()):.0f} s.")


def _from_predictions(
    predictions: Path, out: Path, name: str, false_alarm_rate: float, seed: int, as_json: bool
) -> None:
    from fides_plugins.training.detector.detection import fit_predictions

    with progress(as_json) as bar:
        task = bar.add_task("train detection", total=100)
        bundle = fit_predictions(
            predictions,
            out,
            name=name,
            false_alarm_rate=false_alarm_rate,
            seed=seed,
            progress=lambda share: bar.update(task, completed=round(100 * share)),
        )
    found = bundle.manifest.provenance["detection"]
    if as_json:
        print_json({"bundle": str(out), "digest": bundle.digest, "detection": found})
        return
    console().print(
        f"Bundle {out}, digest {bundle.digest[:16]}...: {found['training_rows']} rows to train on, "
        f"{found['calibration_rows']} to calibrate, agreement {found['agreement']:.4f}."
    )


def _students(specs: Sequence[str], weights: Sequence[Path], **form: Any) -> stages.MakeStudents | None:
    if not specs:
        if weights or any(v not in (None, False) for v in form.values()):
            raise SettingsError("The options --student-... describe a student.", "Name it with --student.")
        return None
    if weights and len(weights) != len(specs):
        raise SettingsError(f"{len(specs)} students and {len(weights)} files of weights.", "Give one for each.")

    def make(images: NDArray[Any], n_classes: int) -> Sequence[Student]:
        from fides_plugins.training.distil.pretrained import pretrained_student

        files: list[Path | None] = [*weights] or [None] * len(specs)
        return [
            pretrained_student(spec, images, n_classes, weights=file, **form)
            for spec, file in zip(specs, files, strict=True)
        ]

    return make


def _size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise SettingsError(f"{text!r} is no size.", "Write it as --student-size 32x32.") from None
    return height, width


def _numbers(text: str, option: str) -> tuple[float, ...] | None:
    if not text:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"{text!r} is no list of numbers.", f"Write it as {option} 0.5,0.5,0.5.") from None
