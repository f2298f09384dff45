"""`fides evidence verify`: decide from a shell whether a verifier's evidence is trusted."""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fides_plugins.cli._output import console, print_json, print_table, read_file
from fides_plugins.errors import InputError


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
    insecure_accept_development: Annotated[
        bool, typer.Option("--insecure-accept-development", help="Accept evidence without hardware. Tests only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify evidence against a policy: exit status 0 trusted, 1 refused with the reason."""
    import dataclasses

    from fides_plugins.attestation.policy import EvidencePolicy
    from fides_plugins.attestation.refusal import Refusal
    from fides_plugins.attestation.verify import InsecureEvidenceWarning, sniff, verify_evidence

    moment = _moment(now)
    rules = EvidencePolicy() if policy is None else EvidencePolicy.from_toml(policy)
    data = read_file(file)
    given: dict[str, Any] = {}
    if collateral is not None:
        given["collateral"] = read_file(collateral).decode("utf-8", "replace")
    if vcek is not None:
        given["vcek"] = read_file(vcek)
    if chain is not None:
        given["chain"] = read_file(chain).decode("utf-8", "replace")
    answer: dict[str, Any] = {"trusted": False, "relaxations": list(rules.relaxations())}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", InsecureEvidenceWarning)
            evidence = dataclasses.replace(sniff(data), **given)
            trusted = verify_evidence(evidence, rules, moment, insecure_development=insecure_accept_development)
        for warning in caught:
            console(stderr=True).print(f"warning: {warning.message}", style="bold red")
        answer |= {"trusted": True, **trusted.summary()}
    except Refusal as refusal:
        answer |= {"code": refusal.code, "reason": refusal.cause_text, "remedy": refusal.remedy}
    if as_json:
        print_json(answer)
    else:
        _print(answer)
    if not answer["trusted"]:
        raise typer.Exit(1)


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
