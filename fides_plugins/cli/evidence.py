"""`fides evidence verify`: decide from a shell whether a verifier's evidence is trusted."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fides_plugins.cli._output import AsJson, console, print_json, print_table, read_file
from fides_plugins.errors import InputError

Insecure = Annotated[
    bool, typer.Option("--insecure-accept-development", help="Accept evidence without hardware. Tests only.")
]


def register(app: typer.Typer) -> None:
    """Add the command group."""
    group = typer.Typer(help="Attestation evidence of verifiers.", no_args_is_help=True)
    group.command("verify")(verify)
    # Without a callback Typer would make the only command of a group the group itself.
    group.callback()(lambda: None)
    app.add_typer(group, name="evidence")


def verify(
    file: Annotated[Path, typer.Argument(help="Evidence document, quote or SEV-SNP report.", metavar="FILE")],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="TOML file with an [evidence] table; without one, nothing is trusted."),
    ] = None,
    collateral: Annotated[Path | None, typer.Option(help="Intel's collateral (JSON), for SGX and TDX.")] = None,
    vcek: Annotated[Path | None, typer.Option(help="The chip's certificate (DER), for SEV-SNP.")] = None,
    chain: Annotated[Path | None, typer.Option(help="ASK and ARK (PEM), for SEV-SNP.")] = None,
    now: Annotated[str, typer.Option(help="Check as of this moment, RFC 3339; default: now.")] = "",
    insecure_accept_development: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Verify evidence against a policy: exit status 0 trusted, 1 refused with the reason."""
    import dataclasses

    from fides_plugins.attestation.policy import EvidencePolicy
    from fides_plugins.attestation.refusal import Refusal
    from fides_plugins.attestation.verify import sniff, verify_evidence

    moment = _moment(now)
    rules = EvidencePolicy() if policy is None else EvidencePolicy.from_toml(policy)
    data = read_file(file)
    given = endorsements(collateral, vcek, chain)
    answer: dict[str, Any] = {"trusted": False, "relaxations": list(rules.relaxations())}
    try:
        with warnings_shown():
            evidence = dataclasses.replace(sniff(data), **given)
            trusted = verify_evidence(evidence, rules, moment, insecure_development=insecure_accept_development)
        answer |= {"trusted": True, **trusted.summary()}
    except Refusal as refusal:
        answer |= {"code": refusal.code, "reason": refusal.cause_text, "remedy": refusal.remedy}
    if as_json:
        print_json(answer)
    else:
        _print(answer)
    if not answer["trusted"]:
        raise typer.Exit(1)


def endorsements(collateral: Path | None, vcek: Path | None, chain: Path | None) -> dict[str, Any]:
    """What the manufacturer says about the hardware, of those files that are given."""
    files = {"collateral": collateral, "vcek": vcek, "chain": chain}
    read = {name: read_file(file) for name, file in files.items() if file is not None}
    return {name: data if name == "vcek" else data.decode("utf-8", "replace") for name, data in read.items()}


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Say on standard error, once, that development evidence was accepted."""
    from fides_plugins.attestation.verify import InsecureEvidenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", InsecureEvidenceWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        console(stderr=True).print(f"warning: {text}", style="bold red")


def _print(answer: dict[str, Any]) -> None:
    if not answer["trusted"]:
        text = f"refused ({answer['code']}): {answer['reason']} {answer['remedy']}".rstrip()
        console().print(text, style="bold red")
        return
    rows = [(name, value) for name, value in answer.items() if name not in ("trusted", "measurements")]
    rows += list(answer["measurements"].items())
    print_table("trusted", ("what", "value"), [(n, ", ".join(v) if isinstance(v, list) else str(v)) for n, v in rows])


def _moment(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time; now where the text is empty."""
    if not text:
        return datetime.datetime.now(datetime.timezone.utc).timestamp()
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise InputError(f"{text!r} is not an RFC 3339 time.", "Write it like 2026-06-01T12:00:00Z.")
    return moment.timestamp()
