"""A lying host around a real Triton: every lie is refused or found, each with its own reason.

    client -> front (proxy of the host) -> Triton -> plug-in `remote` -> back (proxy of the host) -> verifier

The verifier's evidence comes from the hardware of our own PKI (`tests/pki.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from typer.testing import CliRunner

from fides_plugins.attestation import sealing
from fides_plugins.attestation.keys import key_id, raw_public
from fides_plugins.attestation.receipt import open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import from_text, to_text
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.cli import app
from fides_plugins.client import AsyncTritonClient, TritonClient
from fides_plugins.client.trust import EvidenceUrl, Trust
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.errors import ServerError
from fides_plugins.serving.triton.server import TritonServer, is_available
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits
from fides_plugins.training.attacks import OutputAttack, default_registry
from fides_plugins.types import softmax
from tests.lying_host import LyingHost, Message
from tests.pki import NOW_S
from tests.triton_models import image_bundle, images, set_parameter, template_repository
from tests.verifiers import IDENTITY, IDENTITY_PUBLIC, Asked, Hardware, RunningVerifier

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]
MODEL = "digits__fides"
ATTACKS = [a for a in default_registry() if isinstance(a, OutputAttack)]


@dataclass
class World:
    """Everything between a client and a verifier."""

    hardware: Hardware
    folder: Path
    bundle: Bundle
    verifier: Verifier
    verifier_url: str
    triton: TritonServer
    front: LyingHost
    back: LyingHost

    def trust(self, **changes: Any) -> Trust:
        return Trust(
            self.hardware.policy(self.bundle, **changes),
            EvidenceUrl(f"http://{self.back.url}"),
            roots=self.hardware.roots,
            clock=lambda: NOW_S,
        )

    def client(self, **options: Any) -> TritonClient:
        chosen: dict[str, Any] = {"identity": IDENTITY, "trust": self.trust(), **options}
        return TritonClient(self.front.url, MODEL, self.bundle, chosen["trust"].policy, **chosen)

    def direct(self, scheme: str) -> TritonClient:
        """A client that asks the verifier itself, through the host's proxy."""
        return self.client(scheme=scheme, receipt_from="verifier", verifier_url=f"http://{self.back.url}")


def enclave_repository(target: Path, verifier_url: str) -> Path:
    """The template, with the plug-in `remote` in place of the model in the server, and FIDES_RECEIPT handed out."""
    repository = template_repository(target)
    verify = repository / "fides_verify" / "config.pbtxt"
    set_parameter(verify, "fides.plugins.options.remote.url", f"http://{verifier_url}")
    set_parameter(verify, "fides.plugins.blocked", "verifier")
    for model, line in (
        ("fides_validate", '  { name: "FIDES_REASON" data_type: TYPE_STRING dims: [ 1 ] }\n'),
        (MODEL, '  { name: "FIDES_REASON" data_type: TYPE_STRING dims: [ 1 ] }\n'),
        (MODEL, '      output_map { key: "FIDES_REASON" value: "FIDES_REASON" }\n'),
    ):
        config = repository / model / "config.pbtxt"
        text = config.read_text()
        assert text.count(line) == 1
        separator = "," if "data_type" in line else ""
        more = line.replace("FIDES_REASON", RECEIPT_OUTPUT)
        config.write_text(text.replace(line, line.rstrip("\n") + separator + "\n" + more))
    return repository


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("enclave")
    hardware = Hardware()
    bundle = Bundle.load(image_bundle(root / "bundle"))
    verifier = hardware.verifier(bundle)
    with (
        RunningVerifier(verifier) as running,
        LyingHost(running.http) as back,
        TritonServer(enclave_repository(root / "repository", back.url), auto_complete=False) as triton,
        LyingHost(triton.http_address) as front,
    ):
        yield World(hardware, root / "bundle", bundle, verifier, running.http, triton, front, back)


@pytest.fixture(autouse=True)
def _honest_again(world: World) -> Iterator[None]:
    yield
    world.front.honest()
    world.back.honest()
    world.back.target = world.verifier_url


def rows(n: int, seed: int = 5) -> NDArray[np.float32]:
    return images(fake_logits(n, 10, seed=seed))


def logits_of(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.log(np.maximum(probabilities, 1e-9)).astype(np.float32)


def lie_with(change: Any) -> Any:
    """A hook that changes the service's logits."""

    def hook(message: Message) -> Message:
        message.tensors["logits"] = np.asarray(change(message.tensors["logits"]), dtype=np.float32)
        return message

    return hook


def swap_top_two(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    lie = logits.copy()
    for row in lie:
        a, b = np.argsort(row)[-2:]
        row[[a, b]] = row[[b, a]]
    return lie


# Honest traffic


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
    assert answer.raw.as_numpy("logits").tobytes() == answer.output.tobytes()
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


# The host changes the answer


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_changed_answers_are_attacked(world: World, attack: OutputAttack) -> None:
    query, clean = {"image": rows(48, seed=9)}, {}
    changed_rows: list[NDArray[np.bool_]] = []

    def lie(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        clean["label"] = logits.argmax(axis=1)
        attacked, changed = attack.apply(softmax(logits), np.random.default_rng(3))
        changed_rows.append(changed)
        return np.where(changed[:, None], logits_of(attacked), logits)

    world.front.on_response = lie_with(lie)
    with world.client() as client:
        verdict = client.infer(query)
        (changed,) = changed_rows
        assert changed.sum() >= 40
        assert (verdict.status_text[changed] == "attacked").all()
        assert np.char.find(verdict.reason[changed], "false-alarm rate").min() >= 0
        # Re-classification on the client: what the service would have said.
        np.testing.assert_array_equal(verdict.label[changed], clean["label"][changed])
        assert verdict.corrected[changed].all()
        assert client.alarm is not None
        assert client.alarm.rows_since_reset <= 48


def test_rows_that_are_left_alone_stay_trusted(world: World) -> None:
    def lie(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        out = logits.copy()
        out[1] = swap_top_two(logits[1:2])[0]
        return out

    world.front.on_response = lie_with(lie)
    with world.client() as client:
        assert client.infer({"image": rows(3)}).status_text.tolist() == ["trusted", "attacked", "trusted"]


@pytest.mark.parametrize(
    "nonsense",
    [
        np.zeros((1, 3), np.float32),
        np.full((1, 10), np.nan, np.float32),
        np.zeros((2, 10), np.float32),
        np.zeros((0, 10), np.float32),
        np.zeros((10,), np.float32),
        np.zeros((1, 10), np.int64),
    ],
    ids=["narrow", "nan", "rows", "empty", "flat", "integers"],
)
def test_answers_that_are_none_are_not_trusted(world: World, nonsense: NDArray[Any]) -> None:
    def replace(message: Message) -> Message:
        message.tensors["logits"] = nonsense
        for entry in message.document["outputs"]:
            if entry["name"] == "logits":
                entry["datatype"] = "INT64" if nonsense.dtype == np.int64 else "FP32"
        return message

    world.front.on_response = replace
    with world.client() as client:
        verdict = client.infer({"image": rows(1)})
    assert "trusted" not in verdict.status_text
    assert verdict.refused.all() or verdict.corrected.all()


def test_lengths_that_do_not_fit_are_errors_and_not_crashes(world: World) -> None:
    def shift(message: Message) -> Message:
        body, _ = message.render("outputs")
        for entry in message.document["outputs"]:
            entry["parameters"]["binary_data_size"] += 3
            entry["shape"] = [7, *entry["shape"]]
        message.render = lambda part: (
            json.dumps(message.document).encode() + body[-40:],
            str(len(json.dumps(message.document))),
        )  # type: ignore[method-assign]
        return message

    world.front.on_response = shift
    with world.client() as client, pytest.raises(ServerError):
        client.infer({"image": rows(1)})


# The host tampers with receipts


def refused(client: TritonClient, query: dict[str, NDArray[Any]]) -> str:
    """The reason for which an answer is refused; nothing of it may be usable."""
    answer = client.ask(query)
    assert answer.refusal is not None
    verdict = answer.verdict
    assert verdict.status_text.tolist() == ["attacked"] * verdict.n_rows
    assert verdict.refused.all()
    assert (verdict.label == -1).all()
    assert not verdict.probabilities.any()
    assert verdict.reason[0].startswith(f"{answer.refusal.code}: ")
    assert client.refusals[answer.refusal.code] >= 1
    return answer.refusal.code


def with_receipt(change: Any) -> Any:
    def hook(message: Message) -> Message:
        message.tensors[RECEIPT_OUTPUT] = change(message.tensors[RECEIPT_OUTPUT])
        return message

    return hook


def without_receipt(message: Message) -> Message:
    del message.tensors[RECEIPT_OUTPUT]
    return message


def test_a_replayed_receipt_is_refused(world: World) -> None:
    query = {"image": rows(1)}
    with world.client() as client:
        assert client.infer(query).status_text.tolist() == ["trusted"]
        old = world.front.seen[-1]
        world.front.on_response = with_receipt(lambda receipt: old)
        assert refused(client, query) == "receipt-nonce"
    with world.client() as other:
        assert refused(other, query) == "receipt-nonce"


@pytest.mark.parametrize("hook", [without_receipt, with_receipt(lambda receipt: "")], ids=["dropped", "emptied"])
def test_a_missing_receipt_is_an_attack(world: World, hook: Any) -> None:
    world.front.on_response = hook
    with world.client() as client:
        assert refused(client, {"image": rows(2)}) == "receipt-missing"


def test_a_request_that_is_not_passed_on_is_an_attack(world: World) -> None:
    def drop(message: Message) -> Message:
        message.parameters.pop(PARAMETER, None)
        return message

    world.front.on_request = drop
    with world.client() as client:
        assert refused(client, {"image": rows(2)}) == "receipt-missing"


def test_another_input_cannot_be_shown_to_the_enclave(world: World) -> None:
    def swap(message: Message) -> Message:
        message.tensors["image"] = rows(1, seed=77)
        return message

    world.back.on_request = swap
    with world.client() as client:
        # The client signed for its own tensor, so the enclave refuses, and there is no receipt.
        assert refused(client, {"image": rows(1)}) == "receipt-missing"
        with pytest.raises(Refusal) as caught:
            world.verifier.answer(client.core.checker.begin(rows(1)).text, rows(1, seed=77))
        assert caught.value.code == "request-input"


def test_a_receipt_for_another_input_is_refused(world: World) -> None:
    """The host feeds both models another input, and asks the verifier with a second client's help."""
    other = rows(1, seed=77)
    accomplice = Asked(world.verifier, other)
    foreign = to_text(world.verifier.answer(accomplice.text, other).receipt)
    world.front.on_response = with_receipt(lambda receipt: foreign)
    with world.client() as client:
        assert refused(client, {"image": rows(1)}) == "receipt-nonce"


def test_another_bundle_is_refused(world: World, tmp_path: Path) -> None:
    swapped = Bundle.load(image_bundle(tmp_path / "other", bundle_version=2))
    assert swapped.digest != world.bundle.digest
    with RunningVerifier(world.hardware.verifier(swapped)) as running:
        # The host answers with the other verifier, and keeps the evidence of the first.
        with world.client() as client:
            assert client.infer({"image": rows(1)}).status_text.tolist() == ["trusted"]
            world.back.target, world.back.evidence_from = running.http, world.verifier_url
            assert refused(client, {"image": rows(1)}) == "receipt-missing"
        # Or shows that verifier's evidence.
        world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer({"image": rows(1)})
        assert caught.value.code == "evidence-bundle"


def test_an_old_bundle_is_refused(world: World) -> None:
    with world.client(trust=world.trust(minimum_bundle_version=2)) as client, pytest.raises(Refusal) as caught:
        client.infer({"image": rows(1)})
    assert caught.value.code == "evidence-bundle-version"


def test_another_program_is_refused(world: World) -> None:
    with RunningVerifier(world.hardware.verifier(world.bundle, measurement="patched")) as running:
        world.back.target = world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer({"image": rows(1)})
    assert caught.value.code == "evidence-measurement"


def test_another_enclaves_key_is_refused(world: World) -> None:
    """A receipt with the right contents, signed by a key of the host's or of another enclave."""
    stranger = Ed25519PrivateKey.generate()

    def resign(own_id: bool) -> Any:
        def change(receipt: str) -> str:
            keys = {world.verifier.key_id: world.verifier._signing.public_key()}
            opened = open_receipt(from_text(receipt, "receipt"), keys)
            identity = key_id(raw_public(stranger.public_key())) if own_id else world.verifier.key_id
            return to_text(opened.sign(stranger, identity))

        return change

    with world.client() as client:
        world.front.on_response = with_receipt(resign(own_id=True))
        assert refused(client, {"image": rows(1)}) == "receipt-key"
        world.front.on_response = with_receipt(resign(own_id=False))
        assert refused(client, {"image": rows(1)}) == "receipt-signature"


def test_development_evidence_is_refused(world: World) -> None:
    options = VerifierOptions(clients=frozenset((IDENTITY_PUBLIC,)))
    development = Verifier(world.bundle, DevelopmentProvider(), options, clock=lambda: NOW_S)
    with RunningVerifier(development) as running:
        world.back.target = world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer({"image": rows(1)})
        assert caught.value.code == "evidence-development"


def test_every_byte_of_a_receipt_matters(world: World) -> None:
    """Each byte is changed on the way from a real Triton to the client, one request per byte."""
    query = {"image": rows(1)}
    with world.client() as client:
        client.infer(query)
        length = len(from_text(world.front.seen[-1], "receipt"))
        codes: Counter[str] = Counter()
        for position in range(length):

            def flip(receipt: str, position: int = position) -> str:
                data = bytearray(from_text(receipt, "receipt"))
                data[position] ^= 0x01
                return to_text(bytes(data))

            world.front.on_response = with_receipt(flip)
            codes[refused(client, query)] += 1
    assert length > 400
    assert sum(codes.values()) == length
    assert set(codes) == {
        "receipt-malformed",
        "receipt-algorithm",
        "receipt-key",
        "receipt-unprotected",
        "receipt-signature",
    }


# The host lies adaptively: it wants to know the reference first


def near_tie() -> tuple[dict[str, NDArray[np.float32]], int]:
    """An input whose two best classes are almost equal: there a lie below the threshold exists."""
    logits = fake_logits(1, 10, seed=31)
    best = int(logits[0].argmax())
    logits[0, (best + 3) % 10] = logits[0, best] - 0.02
    return {"image": images(logits)}, best


def shaped_lie(reference: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest distribution to the reference with another top class."""
    return swap_top_two(logits_of(reference))


def test_a_lie_shaped_to_the_reference_would_pass(world: World) -> None:
    """Why the reference must be kept from the host: given it, the host finds a wrong answer that is trusted."""
    query, best = near_tie()
    known = world.verifier._reference(query["image"])
    world.front.on_response = lie_with(lambda logits: shaped_lie(known))
    with world.client() as client:
        verdict = client.infer(query)
    assert verdict.status_text.tolist() == ["trusted"]
    assert verdict.label[0] != best


def test_the_host_cannot_read_an_encrypted_reference(world: World) -> None:
    query, best = near_tie()
    plain = world.verifier._reference(query["image"]).tobytes()
    learned: list[bytes] = []

    def try_to_read(message: Message) -> Message:
        receipt = open_receipt(
            from_text(str(message.tensors[RECEIPT_OUTPUT]), "receipt"),
            {world.verifier.key_id: world.verifier._signing.public_key()},
        )
        learned.append(receipt.output)
        with pytest.raises(Refusal, match="not sealed"):
            sealing.unseal(
                receipt.output, X25519PrivateKey.generate(), sealing.context(receipt.nonce, receipt.input_digest)
            )
        # The best it can do: swap its own answer's top two, without knowing the reference.
        logits = message.tensors["logits"]
        assert isinstance(logits, np.ndarray)
        message.tensors["logits"] = swap_top_two(logits * np.float32(1.5))
        return message

    world.front.on_response = try_to_read
    with world.client() as client:
        verdict = client.infer(query)
    assert verdict.status_text.tolist() == ["attacked"]
    assert verdict.label.tolist() == [best]
    assert learned
    assert all(plain not in output and len(output) == len(plain) + sealing.OVERHEAD_BYTES for output in learned)


def test_the_host_cannot_ask_in_its_own_name(world: World) -> None:
    query, _ = near_tie()
    own = Asked(world.verifier, query["image"], identity=Ed25519PrivateKey.generate())
    with pytest.raises(Refusal) as caught:
        world.verifier.answer(own.text, query["image"])
    assert caught.value.code == "request-client"
    # Nor can it ask again in the client's name: the request's nonce is spent.
    asked: list[str] = []

    def keep(message: Message) -> Message:
        asked.append(message.parameters[PARAMETER])
        return message

    world.back.on_request = keep
    with world.client() as client:
        client.infer(query)
    with pytest.raises(Refusal) as caught:
        world.verifier.answer(asked[-1], query["image"])
    assert caught.value.code == "request-replay"


def test_a_verifier_that_answers_anybody_tells_the_host(world: World) -> None:
    """What the list of clients is for; the policy's `clients` refuses such a verifier."""
    query, _ = near_tie()
    anybody = world.hardware.verifier(world.bundle, options=VerifierOptions())
    own = Asked(anybody, query["image"], identity=Ed25519PrivateKey.generate())
    receipt = open_receipt(
        anybody.answer(own.text, query["image"]).receipt, {anybody.key_id: anybody._signing.public_key()}
    )
    info = sealing.context(own.request.nonce, own.request.input_digest)
    assert sealing.unseal(receipt.output, own.key, info) == anybody._reference(query["image"]).tobytes()
    with RunningVerifier(anybody) as running:
        world.back.target = world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer(query)
    assert caught.value.code == "evidence-clients"


def test_without_encryption_the_commitment_binds_the_host(world: World) -> None:
    """The host reads the reference from the verifier's answer, and then wants to give another answer."""
    query, _ = near_tie()
    with world.direct("commitment") as client:
        pending = client.core.checker.begin(query["image"])
        honest = np.asarray(world.triton.api.infer(MODEL, query)["logits"])
        commitment = client.core.checker.commitment(honest)
        answer = world.verifier.answer(pending.text, query["image"], commitment)
        assert answer.reference is not None  # the host can read it now
        lie = shaped_lie(answer.reference)
        with pytest.raises(Refusal) as caught:
            client.core.checker.check(pending, to_text(answer.receipt), lie)
        assert caught.value.code == "receipt-commitment"
        # It cannot commit again, now that it knows: the nonce is spent.
        with pytest.raises(Refusal) as caught:
            world.verifier.answer(pending.text, query["image"], client.core.checker.commitment(lie))
        assert caught.value.code == "request-replay"
        # Nor leave the commitment out.
        fresh = client.core.checker.begin(query["image"])
        with pytest.raises(Refusal) as caught:
            world.verifier.answer(fresh.text, query["image"])
        assert caught.value.code == "request-commitment"


def test_a_commitment_changed_by_the_host_is_refused(world: World) -> None:
    def recommit(message: Message) -> Message:
        message.parameters[COMMITMENT_PARAMETER] = to_text(tensor_digest(np.zeros((1, 10), np.float32)))
        return message

    world.back.on_request = recommit
    with world.direct("commitment") as client:
        assert refused(client, {"image": rows(1)}) == "receipt-commitment"


# Starts and restarts


def test_a_restarted_verifier_is_found_again(world: World) -> None:
    query = {"image": rows(1)}
    with world.client() as client:
        assert client.infer(query).status_text.tolist() == ["trusted"]
        with RunningVerifier(world.hardware.verifier(world.bundle)) as running:
            world.back.target = running.http
            # The old request is not answered by the new start; evidence is fetched again, once.
            assert client.infer(query).status_text.tolist() == ["trusted"]
            assert len(client.core.checker.trust.keys()) == 2
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
    rules.write_text(f'[evidence]\nbundle_digests = ["{world.bundle.digest}"]\nclients = ["{public}"]\n')
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
