"""The host changes the answer, with and without knowing the reference."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fides_plugins.attestation import sealing
from fides_plugins.attestation.receipt import open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import from_text, to_text
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.enclave.verifier import VerifierOptions
from fides_plugins.errors import ServerError
from fides_plugins.launch.triton import is_available
from fides_plugins.testing import fake_logits
from fides_plugins.training.attacks import OutputAttack, default_registry
from fides_plugins.types import softmax
from tests.support.enclave_world import MODEL, World, lie_with, logits_of, refused, rows, swap_top_two
from tests.support.lying_host import Message
from tests.support.triton_models import images
from tests.support.verifiers import Asked, RunningVerifier, receipt_keys, reference_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("honest_again"),
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

ATTACKS = [default_registry().output(name) for name in default_registry().names("output")]


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
    known = reference_of(world.bundle, query["image"])
    world.front.on_response = lie_with(lambda logits: shaped_lie(known))
    with world.client() as client:
        verdict = client.infer(query)
    assert verdict.status_text.tolist() == ["trusted"]
    assert verdict.label[0] != best


def test_the_host_cannot_read_an_encrypted_reference(world: World) -> None:
    query, best = near_tie()
    plain = reference_of(world.bundle, query["image"]).tobytes()
    learned: list[bytes] = []

    def try_to_read(message: Message) -> Message:
        receipt = open_receipt(from_text(str(message.tensors[RECEIPT_OUTPUT]), "receipt"), receipt_keys(world.verifier))
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
    assert all(plain not in output and len(output) == len(plain) + 32 + 16 for output in learned)


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
    receipt = open_receipt(anybody.answer(own.text, query["image"]).receipt, receipt_keys(anybody))
    info = sealing.context(own.request.nonce, own.request.input_digest)
    assert sealing.unseal(receipt.output, own.key, info) == reference_of(world.bundle, query["image"]).tobytes()
    with RunningVerifier(anybody) as running:
        world.back.target = world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer(query)
    assert caught.value.code == "evidence-clients"


def test_without_encryption_the_commitment_binds_the_host(world: World) -> None:
    """The host reads the reference from the verifier's answer, and then wants to give another answer."""
    query, _ = near_tie()
    with world.direct("commitment") as client:
        pending = client.checker.begin(query["image"])
        honest = np.asarray(world.triton.api.infer(MODEL, query)["logits"])
        commitment = client.checker.commitment(honest)
        answer = world.verifier.answer(pending.text, query["image"], commitment)
        assert answer.reference is not None  # the host can read it now
        lie = shaped_lie(answer.reference)
        with pytest.raises(Refusal) as caught:
            client.checker.check(pending, to_text(answer.receipt), lie)
        assert caught.value.code == "receipt-commitment"
        # It cannot commit again, now that it knows: the nonce is spent.
        with pytest.raises(Refusal) as caught:
            world.verifier.answer(pending.text, query["image"], client.checker.commitment(lie))
        assert caught.value.code == "request-replay"
        # Nor leave the commitment out.
        fresh = client.checker.begin(query["image"])
        with pytest.raises(Refusal) as caught:
            world.verifier.answer(fresh.text, query["image"])
        assert caught.value.code == "request-commitment"


def test_without_encryption_no_input_is_asked_about_twice(world: World) -> None:
    """The host reads the reference, drops the receipt and shows another start of the verifier: a second answer to
    the same input would be shaped by what it knows by then."""
    query, _ = near_tie()
    asked: list[Message] = []

    def count(message: Message) -> Message:
        asked.append(message)
        return message

    with RunningVerifier(world.hardware.verifier(world.bundle)) as second, world.direct("commitment") as client:

        def drop(message: Message) -> Message:
            world.back.target = second.http
            message.tensors.clear()
            return message

        world.front.on_request, world.back.on_response = count, drop
        assert refused(client, query) == "receipt-missing"
        assert len(asked) == 1
        # The next request is made for the new start.
        world.back.on_response = None
        assert client.infer({"image": rows(1)}).status_text.tolist() == ["trusted"]
        assert len(asked) == 2


def test_a_commitment_changed_by_the_host_is_refused(world: World) -> None:
    def recommit(message: Message) -> Message:
        message.parameters[COMMITMENT_PARAMETER] = to_text(tensor_digest(np.zeros((1, 10), np.float32)))
        return message

    world.back.on_request = recommit
    with world.direct("commitment") as client:
        assert refused(client, {"image": rows(1)}) == "receipt-commitment"
