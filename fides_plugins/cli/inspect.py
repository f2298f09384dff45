"""`fides inspect`: check a bundle and show what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fides_plugins.cli._output import AsJson, console, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.", metavar="BUNDLE")],
    as_json: AsJson = False,
) -> None:
    """Check every digest of a bundle and show what it holds."""
    from fides_plugins.bundle import Bundle
    from fides_plugins.readiness import Readiness

    loaded = Bundle.load(bundle)
    manifest = loaded.manifest
    if as_json:
        print_json({"digest": loaded.digest, **manifest.model_dump(mode="json")})
        return
    names = ", ".join(manifest.class_names[:6]) + (", ..." if loaded.n_classes > 6 else "")
    rows = [
        ("name", f"{manifest.name} (version {manifest.bundle_version})"),
        ("digest", loaded.digest),
        ("classes", f"{loaded.n_classes}: {names}"),
        ("service output", manifest.service.output_kind),
    ]
    if manifest.input is not None:
        shape = "x".join("N" if s is None else str(s) for s in manifest.input.shape)
        rows.append(("input", f"{manifest.input.name} {manifest.input.dtype} {shape}"))
    if manifest.calibration is not None:
        rows.append(("calibration", f"{manifest.calibration.n_rows} rows"))
    readiness = Readiness.of(loaded)
    if readiness is not None:
        console().print(readiness.sentence())
        print_table("Ready for", ("mode", "grade", "why"), readiness.table(), justify="left")
    print_table(f"Bundle {manifest.name}", ("what", "value"), rows)
    print_table(
        "Files (all digests hold)",
        ("file", "bytes", "SHA-256"),
        [(n, f"{s.size:,}", s.sha256[:16]) for n, s in manifest.files.items()],
    )
