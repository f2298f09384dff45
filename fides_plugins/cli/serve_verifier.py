"""`fides serve-verifier`: the verification model in an enclave, with signed receipts."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fides_plugins.cli._output import console, read_file
from fides_plugins.cli.evidence import endorsements
from fides_plugins.cli.infer import Scheme
from fides_plugins.errors import InputError

if TYPE_CHECKING:
    from fides_plugins.enclave.verifier import Verifier


class Kind(str, Enum):
    """Values of --evidence."""

    tdx = "tdx"
    sev_snp = "sev-snp"
    gramine_sgx = "gramine-sgx"
    development = "development"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve-verifier")(serve_verifier)
    app.command("sign-clients")(sign_clients)


def serve_verifier(
    bundle: Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.", metavar="BUNDLE")],
    evidence: Annotated[Kind, typer.Option(help="Hardware that vouches for the keys.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port; 0 takes a free one.")] = 8443,
    client: Annotated[
        list[str] | None,
        typer.Option(help="Public key (hex) of a client that is answered; repeatable. Default: anyone."),
    ] = None,
    client_set: Annotated[
        Path | None, typer.Option(help="Signed set of clients that are answered (sign-clients), in place of --client.")
    ] = None,
    scheme: Annotated[list[Scheme] | None, typer.Option(help="hpke or commitment; repeat it. Default: both.")] = None,
    decimals: Annotated[
        int | None, typer.Option(help="Round references, against extraction; 2 or more, see the how-to.", min=1, max=9)
    ] = None,
    rate: Annotated[float, typer.Option(help="Rows per second and client.", min=0.1)] = 1000.0,
    collateral: Annotated[Path | None, typer.Option(help="Intel's collateral (JSON) to hand out.")] = None,
    vcek: Annotated[Path | None, typer.Option(help="The chip's certificate (DER) to hand out.")] = None,
    chain: Annotated[Path | None, typer.Option(help="AMD's ASK and ARK (PEM) to hand out.")] = None,
    workers: Annotated[int, typer.Option(help="Requests that run at once.", min=1, max=64)] = 2,
    queue: Annotated[int, typer.Option(help="Requests that wait; more are refused.", min=0)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.", min=0.1)] = 10.0,
    max_body_mb: Annotated[
        int | None,
        typer.Option(help="Largest body, in MiB. Default: what 1024 rows of the bundle's input need.", min=1, max=256),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the model.", min=1)] = 1,
) -> None:
    """Serve the verification model over the Open Inference Protocol, one signed receipt per request."""
    import asyncio

    from fides_plugins.attestation.clients import ClientSet
    from fides_plugins.bundle import Bundle
    from fides_plugins.enclave.connections import ServerLimits
    from fides_plugins.enclave.providers import make_provider
    from fides_plugins.enclave.serve import serve
    from fides_plugins.enclave.verifier import Verifier, VerifierOptions

    text, clients = "", frozenset(_key(text) for text in client or ())
    if client_set is not None:
        if clients:
            raise InputError("--client and --client-set exclude each other.", "Sign a set with all clients in it.")
        text = read_file(client_set).decode("utf-8", "replace").strip()
        clients = frozenset(ClientSet.open(text).clients)
    options = VerifierOptions(
        clients=clients,
        client_set=text,
        schemes=tuple(s.value for s in Scheme if s in (scheme or Scheme)),
        decimals=decimals,
        rate=rate,
        burst=2 * rate,
        **endorsements(collateral, vcek, chain),
    )
    verifier = Verifier(Bundle.load(bundle), make_provider(evidence.value), options, threads)
    limits = ServerLimits(
        workers=workers,
        queue=queue,
        timeout_s=timeout,
        body_bytes=None if max_body_mb is None else max_body_mb << 20,
        buffered_bytes=max(48, 2 * (max_body_mb or 0)) << 20,
    )
    asyncio.run(serve(verifier, host, port, limits, ready=lambda free: _announce(verifier, f"{host}:{free}")))


def sign_clients(
    operator: Annotated[Path, typer.Argument(help="The operator's private key (new-identity).", metavar="KEY")],
    out: Annotated[Path, typer.Option(help="File for the signed set; one that exists is replaced.", metavar="FILE")],
    set_id: Annotated[str, typer.Option("--id", help="Name of the set, as policies give it.")],
    serial: Annotated[int, typer.Option(help="Number of this version of the set; must grow.", min=0)],
    client: Annotated[list[str], typer.Option(help="Public key (hex) of a client; repeat it.")],
    days: Annotated[float, typer.Option(help="Days for which the set holds, from now.", min=0.01)] = 30.0,
) -> None:
    """Sign the set of clients that a verifier may answer, so that it changes without a new policy for each client."""
    import time

    from fides_plugins.attestation.clients import ClientSet
    from fides_plugins.cli.infer import read_identity

    now = int(time.time())
    keys = tuple(sorted({_key(text) for text in client}))
    # Clocks of clients may be a little behind.
    start, end = now - 300, now + int(days * 86_400)
    signed = ClientSet(id=set_id, serial=serial, not_before=start, not_after=end, clients=keys)
    try:
        out.write_text(signed.sign(read_identity(operator)) + "\n")
    except OSError as error:
        raise InputError(f"Cannot write {out.name}: {error.strerror}.") from None


def _announce(verifier: Verifier, where: str) -> None:
    """One line that programs can wait for, then what an operator should know."""
    out = console(stderr=True)
    out.print(f"verifier ready: HTTP on {where}", soft_wrap=True)
    out.print(f"bundle {verifier.bundle.digest}, key {verifier.key_id.hex()}, {verifier.tee}", soft_wrap=True)
    if verifier.tee == "development":
        text = "warning: development evidence: no hardware protects this verifier"
        out.print(text, style="bold red", soft_wrap=True)
    report, statement = verifier.evidence().report, verifier.evidence().statement
    # A TD report has RTMR3, of 48 bytes, before its report data.
    at = report.find(statement.report_data()) if verifier.tee == "tdx" and statement is not None else -1
    if at >= 48 and not any(report[at - 48 : at]):
        text = (
            "warning: RTMR3 is zero: no evidence vouches for what this machine was started with after its kernel; "
            "clients refuse it unless their policy sets allow_zero_registers"
        )
        out.print(text, style="bold yellow", soft_wrap=True)
    if not verifier.options.clients:
        text = "warning: no --client is given: the host can ask for references in its own name"
        out.print(text, style="bold yellow", soft_wrap=True)


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise InputError(f"--client {text[:80]!r} is not a public key of 32 bytes in hexadecimal.")
    return key
