"""`fides serve-verifier`: the verification model in an enclave, with signed receipts."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fides_plugins.cli._output import console
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


def serve_verifier(
    bundle: Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.", metavar="BUNDLE")],
    evidence: Annotated[Kind, typer.Option(help="Hardware that vouches for the keys.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port; 0 takes a free one.")] = 8443,
    client: Annotated[
        list[str] | None,
        typer.Option(help="Public key (hex) of a client that is answered; repeatable. Default: anyone."),
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

    from fides_plugins.bundle import Bundle
    from fides_plugins.enclave.http import ServerLimits
    from fides_plugins.enclave.providers import make_provider
    from fides_plugins.enclave.serve import serve
    from fides_plugins.enclave.verifier import Verifier, VerifierOptions

    options = VerifierOptions(
        clients=frozenset(_key(text) for text in client or ()),
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


def _announce(verifier: Verifier, where: str) -> None:
    """One line that programs can wait for, then what an operator should know."""
    out = console(stderr=True)
    out.print(f"verifier ready: HTTP on {where}", soft_wrap=True)
    out.print(f"bundle {verifier.bundle.digest}, key {verifier.key_id.hex()}, {verifier.tee}", soft_wrap=True)
    if verifier.tee == "development":
        text = "warning: development evidence: no hardware protects this verifier"
        out.print(text, style="bold red", soft_wrap=True)
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
