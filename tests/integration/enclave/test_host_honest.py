"""A host that does not lie, and one that starts and stops: who is answered, and with which verdict."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from typer.testing import CliRunner

from fides_plugins import oip
from fides_plugins.attestation.wire import RECEIPT_OUTPUT
from fides_plugins.cli import app
from fides_plugins.client import AsyncTritonClient, TritonClient
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.launch.triton import is_available
from fides_plugins.settings import Settings
from tests.support.enclave_world import MODEL, World, lie_with, refused, rows, swap_top_two
from tests.support.verifiers import IDENTITY, RunningVerifier

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("honest_again"),
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]


def test_honest_answers_are_trusted_within_the_budget(world: World) -> None:
    with world.client() as client:
        found: Counter[str] = Counter()
        for batch in range(20):
            found.update(client.infer({"image": rows(32, seed=100 + batch)}).counts())
    # 640 rows at a budget of 1%: more than 17 false alarms have a probability below 0.1%.
    assert found["trusted"] >= 640 - 17
    assert found["trusted"] + found["attacked"] == 640
    assert client.alarm is None
    assert not client.refusals


def test_every_way_of_asking_gives_the_same_verdict(world: World) -> None:
    query = {"image": rows(4)}
    with world.client() as client:
        answer = client.ask(query)
    assert answer.refusal is None
    assert answer.verdict.status_text.tolist() == ["trusted"] * 4
    raw = oip.read_answer(answer.raw.content, answer.raw.headers[oip.JSON_LENGTH], ["logits"])
    assert raw["logits"].tobytes() == answer.output.tobytes()
    reference = answer.reference
    assert reference is not None
    options: dict[str, Any] = {"identity": IDENTITY, "output": "logits"}
    front, policy = world.triton.grpc_address, world.hardware.policy(world.bundle)

    async def asynchronously() -> list[Any]:
        answers = []
        for protocol, url in (("http", world.front.url), ("grpc", front)):
            async with AsyncTritonClient(
                url, MODEL, world.bundle, policy, protocol=protocol, trust=world.trust(), **options
            ) as client:
                answers += await asyncio.gather(*(client.ask(query) for _ in range(8)))
        return answers

    answers = asyncio.run(asynchronously())
    with TritonClient(front, MODEL, world.bundle, policy, protocol="grpc", trust=world.trust(), **options) as client:
        answers.append(client.ask(query))
    for scheme in ("hpke", "commitment"):
        with world.direct(scheme) as client:
            answers.append(client.ask(query))
    assert len(answers) == 19
    for other in answers:
        assert other.refusal is None, other.refusal
        np.testing.assert_array_equal(other.verdict.label, answer.verdict.label)
        np.testing.assert_array_equal(other.verdict.p_value, answer.verdict.p_value)
        np.testing.assert_array_equal(other.reference, reference)


def test_ordinary_clients_of_the_host_are_served_as_before(world: World) -> None:
    """A client that sends no signed request gets its answer, an empty receipt and no verdict."""
    answer = world.triton.api.infer(MODEL, {"image": rows(2)})
    assert [s.decode() for s in answer["FIDES_STATUS"].ravel()] == ["indeterminate"] * 2
    assert [r.decode() for r in answer[RECEIPT_OUTPUT].ravel()] == ["", ""]


def test_a_restarted_verifier_is_found_again(world: World) -> None:
    query = {"image": rows(1)}
    with world.client() as client:
        assert client.infer(query).status_text.tolist() == ["trusted"]
        with RunningVerifier(world.hardware.verifier(world.bundle)) as running:
            world.back.target = running.http
            # The old request is not answered by the new start; evidence is fetched again, once.
            assert client.infer(query).status_text.tolist() == ["trusted"]
            assert len(client.checker.trust.keys()) == 2
        assert client.refusals == {"receipt-missing": 1}


def test_a_dead_verifier_is_an_attack_and_not_a_hang(world: World) -> None:
    with world.client() as client:
        client.infer({"image": rows(1)})
        world.back.target = "127.0.0.1:9"  # nobody listens there
        assert refused(client, {"image": rows(1)}) == "receipt-missing"


def test_the_mode_is_the_clients_own_choice(world: World) -> None:
    world.front.on_response = lie_with(swap_top_two)
    with world.client(settings=Settings(mode="reject")) as client:
        verdict = client.infer({"image": rows(1)})
    assert verdict.status_text.tolist() == ["attacked"]
    assert verdict.refused.tolist() == [True]


def test_the_client_library_is_an_ordinary_client_of_the_verifier(world: World) -> None:
    with tritonclient.http.InferenceServerClient(world.verifier_url) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(world.bundle.manifest.name)


@pytest.mark.parametrize("lie", [False, True], ids=["honest", "lying"])
def test_infer_from_a_shell(world: World, tmp_path: Path, lie: bool) -> None:
    """With development evidence, because a shell has the real clock and our PKI's day is fixed."""
    identity = tmp_path / "identity.pem"
    runner = CliRunner()
    public = runner.invoke(app, ["new-identity", str(identity)]).stdout.strip()
    options = VerifierOptions(clients=frozenset((bytes.fromhex(public),)))
    rules = tmp_path / "policy.toml"
    name, digest = world.bundle.manifest.name, world.bundle.digest
    rules.write_text(f'[evidence]\nclients = ["{public}"]\nmodels.{name}.bundle_digests = ["{digest}"]\n')
    np.save(tmp_path / "rows.npy", rows(2))
    if lie:
        world.front.on_response = lie_with(swap_top_two)
    with RunningVerifier(Verifier(world.bundle, DevelopmentProvider(), options)) as running:
        world.back.target = running.http
        command = ["infer", world.front.url, MODEL, str(tmp_path / "rows.npy"), "--policy", str(rules)]
        command += ["--bundle", str(world.folder), "--verifier", f"http://{world.back.url}", "--json"]
        command += ["--identity", str(identity), "--insecure-accept-development"]
        result = runner.invoke(app, command)
        for server, address in (("triton-http", world.front.url), ("triton-grpc", world.triton.grpc_address)):
            other = runner.invoke(app, ["infer", address, *command[2:-4], *command[-3:], "--server", server])
            assert other.exit_code == (1 if lie and server == "triton-http" else 0), other.output
            assert "Verdict" in other.stdout
    assert result.exit_code == int(lie), result.output
    assert "nothing is protected" in result.stderr
    found = json.loads(result.stdout)
    assert [r["status"] for r in found["rows"]] == ["attacked" if lie else "trusted"] * 2
    assert found["receipt_refused"] is None
