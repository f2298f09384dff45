"""`fides infer`: ask an untrusted service about a picture or an array, and show the verdict."""

from __future__ import annotations

import math
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fides_plugins.cli._output import AsJson, print_json, print_table, read_file
from fides_plugins.cli.evidence import Insecure, warnings_shown
from fides_plugins.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from numpy.typing import NDArray

    from fides_plugins.bundle import Bundle
    from fides_plugins.client.calls import Answer


class Server(str, Enum):
    """Kinds of servers."""

    triton_http = "triton-http"
    triton_grpc = "triton-grpc"
    torchserve = "torchserve"


class Scheme(str, Enum):
    """Values of --scheme."""

    hpke = "hpke"
    commitment = "commitment"


class Source(str, Enum):
    """Values of --receipt-from."""

    host = "host"
    verifier = "verifier"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("infer")(infer)
    app.command("new-identity")(new_identity)


def infer(
    url: Annotated[str, typer.Argument(help="Address of the service, host:port.", metavar="URL")],
    model: Annotated[str, typer.Argument(help="Served model.", metavar="MODEL")],
    file: Annotated[Path, typer.Argument(help="Picture, or .npy array with the rows first.", metavar="FILE")],
    bundle: Annotated[Path, typer.Option(help="Bundle with detector and calibration.")],
    policy: Annotated[Path, typer.Option(help="TOML file with an [evidence] table: which verifiers are trusted.")],
    verifier: Annotated[str, typer.Option(help="Address of the verifier, http://host:port.")] = "",
    evidence: Annotated[Path | None, typer.Option(help="Evidence document instead of the verifier's endpoint.")] = None,
    identity: Annotated[Path | None, typer.Option(help="Private key that the verifier knows (new-identity).")] = None,
    server: Annotated[Server, typer.Option(help="Kind of server.")] = Server.triton_http,
    scheme: Annotated[Scheme, typer.Option(help="How the reference is kept from the host.")] = Scheme.hpke,
    receipt_from: Annotated[
        Source, typer.Option(help="Who returns the receipt: the host, or the verifier itself.")
    ] = Source.host,
    output: Annotated[str, typer.Option(help="Class output; default: the only one.")] = "",
    mean: Annotated[float, typer.Option(help="Subtracted from pixels, which are scaled to 0..1.")] = 0.0,
    std: Annotated[float, typer.Option(help="Divides pixels after that.", min=1e-6)] = 1.0,
    insecure_accept_development: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Ask a service and show the verdict: exit status 0 if every row is trusted, 1 otherwise."""
    from fides_plugins.attestation.policy import EvidencePolicy
    from fides_plugins.bundle import Bundle

    loaded = Bundle.load(bundle)
    spec = loaded.manifest.input
    inputs = {spec.name if spec is not None else "input": _tensor(file, loaded, mean, std)}
    options: dict[str, Any] = {
        "verifier_url": verifier,
        "evidence": evidence,
        "identity": None if identity is None else read_identity(identity),
        "scheme": scheme.value,
        "receipt_from": receipt_from.value,
        "insecure_development": insecure_accept_development,
    }
    rules = EvidencePolicy.from_toml(policy)
    with warnings_shown():
        if server is Server.torchserve:
            from fides_plugins.client import TorchServeClient

            address = url if "://" in url else f"http://{url}"
            with TorchServeClient(address, model, loaded, rules, **options) as service:
                answer = service.ask(inputs)
        else:
            from fides_plugins.client import TritonClient

            protocol: Any = server.value.removeprefix("triton-")
            with TritonClient(url, model, loaded, rules, protocol=protocol, output=output, **options) as client:
                answer = client.ask(inputs)
    _show(answer, loaded, as_json)
    if answer.verdict.counts()["trusted"] != answer.verdict.n_rows:
        raise typer.Exit(1)


def new_identity(
    file: Annotated[Path, typer.Argument(help="File for the private key (PEM); must not exist.", metavar="FILE")],
) -> None:
    """Make a client's key, and print the public one for `fides serve-verifier --client`."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise InputError(f"Cannot write {file.name}: {error.strerror}.") from None
    with os.fdopen(handle, "wb") as out:
        out.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    typer.echo(key.public_key().public_bytes_raw().hex())


def read_identity(path: Path) -> Ed25519PrivateKey:
    """The private key in a file of `new-identity`."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_file(path), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path.name} is not an Ed25519 private key in PEM.", "Make one with `fides new-identity`.")
    return key


def _tensor(path: Path, bundle: Bundle, mean: float, std: float) -> NDArray[Any]:
    """The tensor that service and verifier see: an array as it is, a picture in the shape that the bundle wants."""
    import numpy as np

    from fides_plugins.array_files import read_npy
    from fides_plugins.serving.triton.decoders import ImageDecoder

    spec = bundle.manifest.input
    if spec is None:
        raise InputError("The bundle does not describe its input.")
    if path.suffix == ".npy":
        array = read_npy(path)
        try:
            return array.astype(spec.dtype, copy=False)
        except ValueError:
            raise InputError(
                f"{path.name} holds {array.dtype}; the bundle takes {spec.dtype}.", "Save numbers."
            ) from None
    shape = [d for d in spec.shape[1:] if d is not None]
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(f"The bundle takes {spec.shape}, which is no picture (1 or 3, height, width).", "Give a .npy.")
    channels, height, width = shape
    mode, (means, stds) = "L" if channels == 1 else "RGB", np.array([[mean], [std]], np.float32)
    decoder = ImageDecoder(height, width, mode, "NCHW", 255, means, stds)
    try:
        return decoder.tensor([path]).astype(spec.dtype, copy=False)
    except InputError:
        raise InputError(f"{path.name} is not a readable picture.") from None


def _show(answer: Answer, bundle: Bundle, as_json: bool) -> None:
    from fides_plugins.serving.http import rows_of

    names = bundle.class_names
    rows = [
        {
            "status": row.status.text,
            "label": row.label if row.label >= 0 else None,
            "class_name": names[row.label] if 0 <= row.label < len(names) else None,
            "service_label": row.service_label,
            "score": None if math.isnan(row.score) else row.score,
            "p_value": None if math.isnan(row.p_value) else row.p_value,
            "corrected": row.corrected,
            "refused": row.refused,
            "reason": row.reason,
        }
        for row in rows_of(answer.verdict)
    ]
    if as_json:
        code = answer.refusal.code if answer.refusal is not None else None
        print_json({"rows": rows, "receipt_refused": code})
        return
    columns = ("status", "class_name", "score", "p_value", "reason")
    texts = [[f"{r[c]:.4g}" if isinstance(r[c], float) else str(r[c] or "") for c in columns] for r in rows]
    print_table("Verdict", columns, texts)
